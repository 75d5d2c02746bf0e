"""The meta step for classifiers, against its definition written out with torch's own optimizer."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from classifiers import labelled, run_train, run_unlearn, write_data
from safetensors.torch import load_file

from barrier_diffusers.training.seeds import one_of, seeded
from classification_ext.data import make_splits, pixels_of
from classification_ext.methods import METHODS
from classification_ext.models import load_classifier
from classification_ext.robust import ClassifierRelearner
from classification_ext.settings import ClassifierRobustConfig, ForgetConfig

META = {"robust.meta_steps": "[1,2]", "robust.meta_learning_rates": "[0.05]", "robust.meta_num_images": 4}
BARE = {"trained_weights": "all", "barrier.lambda_interval": 0, "method.alpha": 1.0, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    data = write_data(folder / "data")
    run_train(data, folder / "base")
    return folder


def test_relearning_is_sgd_on_drawn_images_and_is_taken_back(place):
    model = load_classifier(str(place / "base")).eval()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_(True)
    before, flags = copy.deepcopy(model), [value.requires_grad for value in model.parameters()]
    splits = make_splits(labelled(20), labelled(10, seed=1), ForgetConfig(forget_class="east"))
    config = ClassifierRobustConfig(meta_steps=[2, 3], meta_learning_rates=[0.01, 0.05], meta_num_images=4)
    relearner = ClassifierRelearner(config, model, splits, seed=3)

    generator = seeded(3, "relearner", 5)
    plain, num_steps = copy.deepcopy(before).requires_grad_(True), one_of([2, 3], generator)
    optimizer = torch.optim.SGD(plain.parameters(), one_of([0.01, 0.05], generator), momentum=0.9)
    taught = [part[torch.randperm(len(part), generator=generator)[:4]] for part in (splits.forget, splits.retain)]
    for _ in range(num_steps):
        batches = [{"images": part.images, "labels": part.labels} for part in taught]
        sum(F.cross_entropy(plain(pixels_of(batch)), batch["labels"]) / 2 for batch in batches).backward()
        optimizer.step()
        optimizer.zero_grad()

    state = torch.get_rng_state()
    with relearner.relearned(5):
        assert [value.requires_grad for value in model.parameters()] == flags
        for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and now.grad is None


def test_a_run_has_a_meta_part_and_resumes_to_the_same_bits(place, tmp_path):
    settings = {
        **BARE,
        **META,
        "robust.meta_lives": "[5]",
        "num_train_epochs": 3,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 9,
    }
    run_unlearn(place / "base", place / "data", tmp_path / "run", **settings)
    history = json.loads((tmp_path / "run/manifest.json").read_text())["history"]
    assert min(history["meta"]) > 0 and len(history["meta"]) == len(history["objective"]) > 1
    whole = load_file(tmp_path / "run/model.safetensors")
    run_unlearn(place / "base", place / "data", tmp_path / "run", **settings, resume_from_checkpoint="step-1")
    for name, value in load_file(tmp_path / "run/model.safetensors").items():
        assert torch.equal(value, whole[name])
    run_unlearn(place / "base", place / "data", tmp_path / "other", **{**settings, **OFF})
    assert any(
        not torch.equal(value, whole[name]) for name, value in load_file(tmp_path / "other/model.safetensors").items()
    )


def test_a_relearner_that_breaks_the_classifier_does_not_end_the_run(place, tmp_path):
    changes = {"robust.meta_steps": "[20]", "robust.meta_learning_rates": "[1e30]", "num_train_epochs": 1}
    with pytest.warns(UserWarning, match="broke the network"):
        run_unlearn(place / "base", place / "data", tmp_path / "run", **{**BARE, **META, **changes})
    history = json.loads((tmp_path / "run/manifest.json").read_text())["history"]
    assert set(history["meta"]) == {0.0} and all(math.isfinite(value) for value in history["objective"])


OFF = {
    "robust.meta_steps": "[]",
    "robust.meta_lives": "[1]",
    "robust.meta_learning_rates": "[1e-3,3e-3,1e-2]",
    "robust.meta_num_images": 10,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"robust.meta_steps": "[1]", "method.name": "ft", "method.alpha": 0},
            "method 'ft' has no loss of the forget",
        ),
        ({"robust.meta_steps": "[1]", "method.name": "retrain", "method.alpha": 0}, "leave robust.meta_steps empty"),
        ({"robust.meta_every": 2}, "robust settings are read with robust.meta_steps alone"),
        ({"robust.meta_steps": "[1]", "saliency_mask": 0.5}, "saliency_mask would hold what robust.meta_steps moves"),
        ({"robust.meta_steps": "[0]"}, "robust.meta_steps"),
        ({"robust.meta_learning_rates": "[]"}, "robust.meta_learning_rates is empty"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(place, tmp_path, changes, message):
    with pytest.raises((ValueError, SystemExit), match=message):
        run_unlearn(place / "base", place / "data", tmp_path / "run", **{**BARE, **changes})
    assert not (tmp_path / "run").exists()


def test_every_method_says_whether_it_takes_the_meta_step():
    takes = {name for name, one in METHODS.items() if one.loss and one.over == "forget" and not one.shadow_label}
    assert takes == {"rl", "ga", "boundary_shrink"}
