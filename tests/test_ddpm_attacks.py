"""Attacks on a class-conditional DDPM: what they learn, and that the pipeline is the same afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ddpm_models import Place
from PIL import Image

from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.utils.run_records import module_hash
from ddpm_ext import attacks
from ddpm_ext import evaluate as evaluate_script
from ddpm_ext.attacks import attack, attack_images
from ddpm_ext.loading import load_pipeline
from ddpm_ext.metrics import make_judge
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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("ddpm"))


@pytest.mark.parametrize("name", BUDGETS)
def test_an_attack_leaves_the_pipeline_as_it_was(place, name):
    pipeline = load_pipeline(str(place.base))
    before, table = module_hash(pipeline.unet), pipeline.unet.class_embedding
    images = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8)
    sampling, budget = SamplingConfig(2, 3.0), BUDGETS[name](num_steps=3, batch_size=2, learning_rate=0.1)
    plain = generate(pipeline, ["boot"] * 3, sampling)
    made = attack(name, pipeline, "boot", images, budget, ["boot"] * 3, sampling)
    assert made.shape == plain.shape == (3, 8, 8, 1) and (made != plain).any()
    assert module_hash(pipeline.unet) == before and pipeline.unet.class_embedding is table
    assert all(value.requires_grad for value in pipeline.unet.parameters())
    assert np.array_equal(attack(name, pipeline, "boot", images, budget, ["boot"] * 3, sampling), made)
    with pytest.raises(FloatingPointError, match=f"{name} of boot: non-finite loss"):
        attack(name, pipeline, "boot", images, replace(budget, learning_rate=1e30), ["boot"], sampling)
    assert module_hash(pipeline.unet) == before and pipeline.unet.class_embedding is table


def test_a_learned_row_changes_its_label_alone(place):
    pipeline, sampling = load_pipeline(str(place.base)), SamplingConfig(2, 3.0)
    images, asked = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), ["bag", "coat"]
    others = generate(pipeline, asked, sampling)
    row, network = RowInversionConfig(num_steps=3, learning_rate=0.1), FineTuningConfig(num_steps=3, learning_rate=0.1)
    assert np.array_equal(attack("inversion", pipeline, "boot", images, row, asked, sampling), others)
    assert not np.array_equal(attack("relearning", pipeline, "boot", images, network, asked, sampling), others)


def test_a_row_starts_where_it_is_told_to(place, monkeypatch):
    pipeline, rows = load_pipeline(str(place.base)), {}

    def see(denoiser, images, *, parameters, **_):
        rows[len(rows)] = parameters[0].detach().clone()

    monkeypatch.setattr(attacks, "learn", see)
    table, images = pipeline.unet.class_embedding.weight, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    for budget in (RowInversionConfig(), RowInversionConfig(initial_label="coat")):
        attack("inversion", pipeline, "boot", images, budget, ["boot"], SamplingConfig(1, 1.0))
    assert torch.equal(rows[0], table[[1]]) and torch.equal(rows[1], table[[2]])
    config = LabelEvaluationConfig(str(place.judge), attacks=["inversion"])
    config.inversion.initial_label = "shoe"
    with pytest.raises(ValueError, match="initial_label 'shoe' is no label of the pipeline: bag, boot, coat"):
        attack_images(config, LabelledDataConfig(str(place.data)), pipeline, ["boot"])


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
    with pytest.raises(ValueError, match="wants 10 held-out images of boot in split 'test', but there are 8"):
        attack_images(config, data, load_pipeline(str(place.base)), ["boot"])
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
    images = attack_images(config, data, pipeline, [label])["inversion", label]
    made = attack("inversion", pipeline, label, images, budget, [label] * 8, sampling)
    assert sum(judge.shows(made, label)) >= 6


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
    with pytest.raises(ValueError, match=r"evaluation\.control is about attacks, and there is none"):
        config_of("none", **{"evaluation.attacks": "[]"}).check_inputs()
