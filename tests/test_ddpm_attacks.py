"""Attacks on a class-conditional DDPM: what they learn, and that the pipeline is the same afterwards."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from ddpm_models import Place
from PIL import Image

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.evaluation.attacks.base import Forgotten
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.utils.run_records import module_hash
from ddpm_ext import attacks
from ddpm_ext import evaluate as evaluate_script
from ddpm_ext.attacks import attack, attackers_view
from ddpm_ext.loading import load_pipeline
from ddpm_ext.metrics import make_evaluation_labels, make_judge
from ddpm_ext.settings import (
    EvaluateConfig,
    FineTuningConfig,
    LabelEvaluationConfig,
    LabelledDataConfig,
    RowInversionConfig,
)

ROOT = Path(__file__).resolve().parent.parent
SHORT = {"evaluation.attacks": "[inversion,relearning]", "evaluation.inversion.num_steps": 2}
BUDGETS = {"inversion": RowInversionConfig, "relearning": FineTuningConfig}
SHORT |= {"evaluation.relearning.num_steps": 2, "evaluation.relearning.num_images": 3}


def known(images, label="boot", count=3, **changes):
    """What an attacker knows of a label, with byte images (N, C, S, S) of it."""
    rows = LabelledImages(images, torch.zeros(len(images), dtype=torch.long), [label])
    pictures = attacks.as_dataset(rows)
    assert torch.equal(attacks.as_bytes(pictures), images)
    return Forgotten(label, [label] * count, pictures, pictures, SamplingConfig(2, 3.0), images.shape[-1], **changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("ddpm"))


@pytest.mark.parametrize("name", BUDGETS)
def test_an_attack_leaves_the_pipeline_as_it_was(place, name):
    pipeline = load_pipeline(str(place.base))
    before, table = module_hash(pipeline.unet), pipeline.unet.class_embedding
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    sampling, budget = SamplingConfig(2, 3.0), BUDGETS[name](num_steps=3, batch_size=2, learning_rate=0.1)
    plain, asked = generate(pipeline, ["boot"] * 3, sampling), known(images)
    made = attack(name, pipeline, asked, budget)
    assert made.images_NHWC.shape == plain.shape == (3, 8, 8, 1) and (made.images_NHWC != plain).any()
    assert made.num_training_images == 4 and made.failed is None
    assert module_hash(pipeline.unet) == before and pipeline.unet.class_embedding is table
    assert all(value.requires_grad for value in pipeline.unet.parameters())
    assert np.array_equal(attack(name, pipeline, asked, budget).images_NHWC, made.images_NHWC)
    with pytest.raises(FloatingPointError, match=f"{name} of boot: non-finite loss"):
        attack(name, pipeline, asked, replace(budget, learning_rate=1e30))
    assert module_hash(pipeline.unet) == before and pipeline.unet.class_embedding is table


def test_a_learned_row_changes_its_label_alone(place):
    pipeline, others = load_pipeline(str(place.base)), ["bag", "coat"]
    images = known(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), retain_prompts=others, retain_labels=others)
    images, sampling = replace(images, prompts=others), images.sampling
    before = generate(pipeline, others, sampling)
    row, network = RowInversionConfig(num_steps=3, learning_rate=0.1), FineTuningConfig(num_steps=3, learning_rate=0.1)
    network = replace(network, num_images=4)
    inverted, relearned = attack("inversion", pipeline, images, row), attack("relearning", pipeline, images, network)
    assert np.array_equal(inverted.images_NHWC, before) and inverted.marks[0].retained_NHWC is None
    assert not np.array_equal(relearned.images_NHWC, before)
    assert np.array_equal(relearned.marks[0].retained_NHWC, relearned.images_NHWC)  # the same labels and seeds


def test_a_row_starts_where_it_is_told_to(place, monkeypatch):
    pipeline, rows = load_pipeline(str(place.base)), {}

    def see(denoiser, images, *, parameters, budget, after_step, **_):
        rows[len(rows)] = parameters[0].detach().clone()
        after_step(budget.num_steps)

    monkeypatch.setattr(attacks, "learn", see)
    table, images = pipeline.unet.class_embedding.weight, known(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), count=1)
    for budget in (RowInversionConfig(), RowInversionConfig(initial_label="coat")):
        attack("inversion", pipeline, images, budget)
    assert torch.equal(rows[0], table[[1]]) and torch.equal(rows[1], table[[2]])
    config = LabelEvaluationConfig(str(place.judge), attacks=["inversion"])
    config.inversion.initial_label = "shoe"
    with pytest.raises(ValueError, match="initial_label 'shoe' is no label of the pipeline: bag, boot, coat"):
        viewed(config, LabelledDataConfig(str(place.data)), pipeline)


def viewed(config, data, pipeline, label="boot"):
    """What an attacker knows of one label."""
    (found,) = attackers_view(config, data, pipeline, make_evaluation_labels(config, pipeline.labels, [label]))
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"saliency_mask": 0.25, "barrier.lambda_interval": 0.0, "objective.name": "ga"}]
)
def test_a_run_and_an_evaluation_report_the_same_attacks(place, tmp_path, settings):
    metrics, _ = place.unlearn(tmp_path / "run", **SHORT, **settings)
    assert [(entry["attack"], entry["concept"]) for entry in metrics["attacks"]] == [
        ("inversion", "boot"),
        ("relearning", "boot"),
    ]
    assert [entry["num_training_images"] for entry in metrics["attacks"]] == [8, 3]
    for entry in metrics["attacks"]:
        assert entry["pre_attack"]["value"] == 100 - metrics["unlearning_accuracy"]
        assert entry["post_attack"]["num_images"] == 5
    assert "inversion" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "attacks.png").is_file()
    settings = {"pretrained_model_name_or_path": tmp_path / "run", "concept": "boot", "evaluation.judge": place.judge}
    settings |= {"evaluation.images_per_label": 5, "evaluation.sampling.num_inference_steps": 2, **SHORT}
    words = place.words(tmp_path / "judged", settings)
    words = [word for word in words if word not in ("--report_to", "none")]
    evaluate_script.main(parse_config(EvaluateConfig, words))
    judged = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert judged["attacks"] == metrics["attacks"] and set(judged["seconds_attacks"]) == set(BUDGETS)
    for folder in (tmp_path / "run", tmp_path / "judged"):  # nothing but the weights tells the two apart
        assert np.asarray(Image.open(folder / "attacks.png")).std() > 0
    one, other = ((tmp_path / name / "attacks.png").read_bytes() for name in ("run", "judged"))
    assert one == other


def test_numbers_are_kept_if_an_attack_fails(place, tmp_path):
    with pytest.raises(FloatingPointError, match="inversion of boot"):
        place.unlearn(tmp_path, **SHORT, **{"evaluation.inversion.learning_rate": 1e30})
    assert "unlearning_accuracy" in json.loads((tmp_path / "metrics.json").read_text())
    assert (tmp_path / "manifest.json").is_file()


def test_what_an_attack_needs(place):
    with pytest.raises(ValueError, match="scored by evaluation.judge"):
        LabelEvaluationConfig(None, attacks=["inversion"])
    with pytest.raises(ValueError, match="names one twice"):
        LabelEvaluationConfig(attacks=["inversion", "inversion"])
    data = LabelledDataConfig(str(place.data))
    config = LabelEvaluationConfig(str(place.judge), attacks=["relearning"])
    with pytest.raises(ValueError, match="wants 10 held-out images of boot, but there are 8"):
        viewed(config, data, load_pipeline(str(place.base)))
    with pytest.raises(ValueError, match="set concept"):
        EvaluateConfig(pretrained_model_name_or_path="x", output_dir="y", data=data, evaluation=config)


def test_a_label_that_was_only_renamed_comes_back(monkeypatch):
    """The embedded DDPM with boot's row in bag's place: forgotten for everyone who asks, but not by the network."""
    monkeypatch.chdir(ROOT)
    pipeline, label = load_pipeline("assets/fashion_ddpm"), "bag"
    table = pipeline.unet.class_embedding.weight
    with torch.no_grad():
        table[pipeline.labels.index(label)] = table[pipeline.labels.index("boot")]
    config, data = LabelEvaluationConfig(rendering="ink"), LabelledDataConfig("assets/fashion_mnist")
    judge, sampling = make_judge(config, pipeline.labels), SamplingConfig(15, 3.0)
    assert not any(judge.shows(generate(pipeline, [label] * 8, sampling), label))
    budget = RowInversionConfig(num_steps=100, batch_size=16, num_images=100, learning_rate=3e-2)
    config.attacks, config.inversion = ["inversion"], budget
    images = replace(viewed(config, data, pipeline, label), prompts=[label] * 8, sampling=sampling)
    assert sum(judge.shows(attack("inversion", pipeline, images, budget).images_NHWC, label)) >= 6


def test_what_a_grid_tries():
    others = known(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), retain_labels=["bag", "coat"])
    row, network = RowInversionConfig(), FineTuningConfig(marks=[1, 7], num_steps=9)
    assert [(one.budget.initial_label, one.budget.learning_rate) for one in row.variants("standard", others)] == [
        (None, 2e-2),
        ("bag", 2e-2),
    ]
    tried = [one.budget for one in network.variants("standard", others)]
    assert [one.learning_rate for one in tried] == [3e-5, 1e-4, 3e-4, 1e-3]
    assert all((one.marks, one.num_steps, one.num_images) == ([1, 7], 7, 10) for one in tried)
    assert FineTuningConfig().variants("standard", others)[0].budget.marks[-1] == 200
    assert len(row.variants("thorough", others)) == 6 and row.further("standard", others) == []
    grid = network.variants("thorough", others)
    assert {(one.budget.learning_rate, one.budget.num_images) for one in grid} == set(
        product((3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (2, 10, 30))  # there are no 60
    )
    assert len({one.name for one in grid}) == 15 and all(one.num_images == 10 for one in grid)
    assert [
        one.budget.num_steps for one in (*row.further("thorough", others), *network.further("thorough", others))
    ] == [
        1000,
        200,
    ]


GRID = {"evaluation.attack_budget": "standard", "evaluation.relearning.marks": "[1,2]"}


def test_a_grid_reports_its_strongest_and_goes_on_where_it_was(place, tmp_path, monkeypatch):
    settings = {"pretrained_model_name_or_path": place.base, "concept": "boot", "evaluation.judge": place.judge}
    settings |= {"evaluation.images_per_label": 5, "evaluation.sampling.num_inference_steps": 2, **SHORT, **GRID}
    settings |= {"evaluation.control": another(place, tmp_path / "control")}

    def judged(name, cache, **changes):
        words = place.words(tmp_path / name, {**settings, "cache_dir": tmp_path / cache, **changes})
        words = [word for word in words if word not in ("--report_to", "none")]
        evaluate_script.main(parse_config(EvaluateConfig, words))
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    first = judged("first", "cache")
    curves = json.loads((tmp_path / "first" / "attack_curves.json").read_text())
    assert [(row["model"], row["attack"]) for row in curves] == [
        (model, attack) for model in ("erased", "control") for attack, count in (("inversion", 2), ("relearning", 4))
        for _ in range(count)
    ]  # fmt: skip
    for model, key in (("erased", "attacks"), ("control", "control_attacks")):
        for record in first[key]:
            mine = [row for row in curves if (row["model"], row["attack"]) == (model, record["attack"])]
            best = max(mark["shown"]["value"] for row in mine for mark in row["marks"].values())
            assert record["post_attack"]["value"] == best and record["num_cells"] == len(mine)
    assert all("retained" in mark for row in curves if row["attack"] == "relearning" for mark in row["marks"].values())
    assert set(first["control"]) == {"unlearning_accuracy", "retain_accuracy"}

    def no_more(*_, **__):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(attacks, "learn", no_more)
        again = judged("again", "cache")
    apart = judged("apart", "other", **{"evaluation.attack_workers": 2})
    for other in (again, apart):
        assert {key: other[key] for key in ("attacks", "control_attacks", "attack_gaps")} == {
            key: first[key] for key in ("attacks", "control_attacks", "attack_gaps")
        }
    with pytest.raises(
        ValueError, match=r"relearning\.learning_rate is set to 0\.5, but no attacker of attack_budget"
    ):
        judged("untried", "cache", **{"evaluation.relearning.learning_rate": 0.5})


def another(place, folder):
    """A pipeline with other weights."""
    pipeline = load_pipeline(str(place.base))
    with torch.no_grad():
        for weight in pipeline.unet.parameters():
            weight += 0.05 * torch.randn_like(weight)
    pipeline.save_pretrained(folder)
    return folder


def test_a_control_is_attacked_with_the_same_images_and_at_the_same_marks(place, tmp_path, capsys):
    torch.manual_seed(0)
    settings = {"pretrained_model_name_or_path": place.base, "concept": "boot", "evaluation.judge": place.judge}
    settings |= {"evaluation.images_per_label": 5, "evaluation.sampling.num_inference_steps": 2, **SHORT}
    settings |= {"evaluation.control": another(place, tmp_path / "control"), "evaluation.relearning.marks": "[1]"}

    def config_of(name, **changes):
        words = place.words(tmp_path / name, {**settings, **changes})
        return parse_config(EvaluateConfig, [word for word in words if word not in ("--report_to", "none")])

    def judged(name, **changes):
        evaluate_script.main(config_of(name, **changes))
        return json.loads((tmp_path / name / "evaluation.json").read_text())

    record = judged("judged")
    assert list(record["attacks"][1]["curve"]) == ["1", "2"]
    gaps = {gap["attack"]: gap for gap in record["attack_gaps"]}
    for mine, other in zip(record["attacks"], record["control_attacks"], strict=True):
        gap = gaps[mine["attack"]]["marks"]["2"]["gap"]
        assert gap["value"] == pytest.approx(mine["post_attack"]["value"] - other["post_attack"]["value"])
        assert mine["budget"] == other["budget"] and mine["num_training_images"] == other["num_training_images"]
    assert set(gaps["relearning"]["marks"]) == {"1", "2"} and "strongest" in capsys.readouterr().out
    swapped = judged(
        "swapped", **{"pretrained_model_name_or_path": tmp_path / "control", "evaluation.control": place.base}
    )
    assert swapped["control_attacks"] == record["attacks"] and swapped["attacks"] == record["control_attacks"]
    with pytest.raises(ValueError, match="has the weights of what is judged"):
        judged("same", **{"evaluation.control": place.base})
    for setting, changes in {
        "control": {},
        "attack_budget": {"evaluation.control": "null", "evaluation.attack_budget": "standard"},
    }.items():
        with pytest.raises(ValueError, match=rf"evaluation\.{setting} is about attacks, and there is none"):
            config_of(f"without_{setting}", **{"evaluation.attacks": "[]"}, **changes).check_inputs()
