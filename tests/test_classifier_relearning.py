"""A classifier that forgot and one that never knew are taught again."""

import json

import pytest
import torch
from classifiers import labelled, run_train, write_data

from barrier_diffusers.utils.run_records import module_hash
from classification_ext import evaluate
from classification_ext.data import make_splits
from classification_ext.models import load_classifier
from classification_ext.relearning import lesson, look, relearn
from classification_ext.settings import EvaluateConfig, ForgetConfig, RelearningConfig

BUDGET = RelearningConfig(num_images=4, batch_size=8, learning_rates=[0.01, 0.05], marks=[1, 3, 30])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A classifier that knows all labels, and one that never saw one of them."""
    folder = tmp_path_factory.mktemp("classifiers")
    data = write_data(folder / "data")
    run_train(data, folder / "knows")
    run_train(data, folder / "never", forget_class="east")
    return folder


def splits():
    return make_splits(labelled(20), labelled(10, seed=1), ForgetConfig(forget_class="east"))


def test_a_lesson_is_half_about_what_was_forgotten():
    forgotten, rest = lesson(splits(), BUDGET)
    assert len(forgotten) == len(rest) == 4
    assert {forgotten.names[label] for label in forgotten.labels} == {"east"}
    assert "east" not in {rest.names[label] for label in rest.labels}


def test_relearning_repeats_and_leaves_the_classifier_as_it_was(place):
    model, parts = load_classifier(str(place / "never")), splits()
    before, flags = module_hash(model), [value.requires_grad for value in model.parameters()]
    found = relearn(model, parts, BUDGET, learning_rate=0.05, eval_batch_size=50)
    assert [seen.num_steps for seen in found] == [1, 3, 30]
    assert module_hash(model) == before and [value.requires_grad for value in model.parameters()] == flags
    assert relearn(model, parts, BUDGET, learning_rate=0.05, eval_batch_size=50) == found
    plain = look(model, parts, 0, batch_size=50, device="cpu")
    assert plain.share < 20 and found[-1].share > plain.share + 20  # a few images teach it
    with pytest.raises(RuntimeError):
        relearn(model, parts, BUDGET, learning_rate=0.05, eval_batch_size=50, device="nowhere")
    assert module_hash(model) == before


def test_evaluate_compares_with_a_control(place, capsys):
    settings = {"train_data_dir": str(place / "data"), "forget_class": "east", "relearning": BUDGET}
    settings |= {"pretrained_model_name_or_path": str(place / "knows"), "overwrite_output_dir": True}
    settings |= {"output_dir": str(place / "judged")}
    evaluate.main(EvaluateConfig(**settings, control=str(place / "never")))
    metrics = json.loads((place / "judged" / "evaluation.json").read_text())["metrics"]
    found = metrics["relearning"]
    assert found["before"]["erased"]["shown"]["value"] > found["before"]["control"]["shown"]["value"] + 50
    assert set(found["curves"]["control"]) == {"0.01", "0.05"} and set(found["gap"]["marks"]) == {"1", "3", "30"}
    assert found["gap"]["marks"]["1"]["gap"]["value"] > 50  # it never forgot: the gap is wide at once
    assert found["gap"]["half"]["erased"] == 1.0
    assert "erased model and control under attack" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has the weights of what is judged"):
        evaluate.main(EvaluateConfig(**settings, control=str(place / "knows")))


@pytest.mark.parametrize("changes", [{"marks": []}, {"marks": [3, 1]}, {"learning_rates": []}])
def test_marks_rise_and_there_is_an_attacker(changes):
    with pytest.raises(ValueError, match="relearning needs learning_rates, and marks that rise"):
        RelearningConfig(**changes)


def test_torch_draws_nothing_from_the_global_state(place):
    model, parts = load_classifier(str(place / "never")), splits()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    relearn(model, parts, BUDGET, learning_rate=0.01, eval_batch_size=50)
    assert torch.equal(torch.get_rng_state(), state)
