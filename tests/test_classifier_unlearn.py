"""Whole runs of train, unlearn and evaluate on a tiny classifier: they forget, protect and resume."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from classifiers import TRAIN, UNLEARN, run_train, run_unlearn, words, write_data
from forks import Script
from safetensors.torch import load_file

from barrier_diffusers import Barrier
from barrier_diffusers.data.labelled_images import LabelledSource, load_labelled
from classification_ext import evaluate
from classification_ext.methods import METHODS
from classification_ext.metrics import predict
from classification_ext.models import load_classifier
from classification_ext.settings import ClassifierEvaluationConfig, EvaluateConfig

ALL = {"trained_weights": "all", "barrier.lambda_interval": 0, "method.alpha": 0.0}
CASES = {  # method -> what a run needs beyond the others' settings
    "rl": {},
    "ga": {"method.alpha": 0.0, "optimizer": "adamw", "learning_rate": 0.005, "barrier.lambda_interval": 0.01},
    "ft": {**ALL},
    "l1_sparse": {**ALL, "learning_rate": 0.01},
    "boundary_shrink": {**ALL, "method.alpha": 1.0, "learning_rate": 0.01},
    "boundary_expand": {**ALL, "method.alpha": 1.0, "learning_rate": 0.01},
    "fisher": {**ALL, "method.noise": 1e-9, "method.num_samples": 16},
    "wfisher": {**ALL, "method.num_samples": 16, "method.damping": 0.1},
    "retrain": {**ALL, "num_train_epochs": 6, "optimizer": "adamw", "learning_rate": 5e-3, "recipe.flip": False},
}
FORGETS = ("rl", "ga", "boundary_shrink", "boundary_expand", "retrain")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("base") / "classifier"
    metrics = run_train(data, folder)
    assert metrics["test_accuracy"]["value"] > 95
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def is_statistic(name):
    return "running_" in name or "num_batches" in name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_those_that_should_forget(method, base, data, tmp_path):
    metrics, manifest = run_unlearn(base, data, tmp_path / "run", **{"method.name": method, **CASES[method]})
    assert metrics["before"]["unlearning_accuracy"] < 5 and metrics["retain_accuracy"] > 60
    if method in FORGETS:
        assert metrics["unlearning_accuracy"] > 90 and metrics["retain_accuracy"] > 85
    before, after = weights(base), weights(tmp_path / "run")
    if method != "retrain":
        assert all(torch.equal(before[name], after[name]) for name in before if is_statistic(name))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert manifest["hashes"]["base"] != manifest["hashes"]["model"] and manifest["settings"]["forget_class"] == "east"
    assert metrics["trained_percent"] == 100 or method in ("rl", "ga")


def test_only_the_targets_move_and_the_barrier_can_be_loaded(base, data, tmp_path):
    metrics, _ = run_unlearn(base, data, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Unlearning accuracy against the drop" not in page  # one run is no trade-off
    assert f"{metrics['retain_accuracy']:.1f} <small>" in page
    before, after = weights(base), weights(tmp_path / "run")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    shortcuts = {f"network.stages.{stage}.0.shortcut.0.weight" for stage in (1, 2)}
    assert moved == {"network.fc.weight", "network.fc.bias", *shortcuts}
    barrier = Barrier.from_pretrained(tmp_path / "run", load_classifier(str(tmp_path / "run")))
    assert set(barrier.regions) == {name.removesuffix(".weight") for name in moved if name.endswith("weight")}
    drift = barrier.drift_norms()
    assert metrics["drift"] == {name: pytest.approx(value, abs=1e-4) for name, value in drift.items()}


def test_projection_keeps_the_retained_images_logits(base, data, tmp_path):
    """Nearly all of their energy is protected: the logits of every retained training image stay where they were."""
    changes = {"barrier.constraint": "projection", "barrier.projection_energy": 0.9999, "method.alpha": 0.0}
    changes |= {"barrier.targets": "[fc]", "learning_rate": 0.1, "max_train_steps": 20}
    metrics, _ = run_unlearn(base, data, tmp_path / "run", **changes)
    assert metrics["num_trained"] == 64 * 4  # no bias
    assert metrics["drift"]["network.fc"] > 0.01
    read = load_labelled(LabelledSource(str(data), "train"), 8, 1)
    kept = read[(read.labels != 1).nonzero().flatten()]
    before, after = (predict(load_classifier(str(path)), kept, 64) for path in (base, tmp_path / "run"))
    torch.testing.assert_close(before, after, atol=0.3, rtol=0)


def test_saliency_mask_holds_the_other_entries(base, data, tmp_path):
    run_unlearn(base, data, tmp_path / "run", **ALL, saliency_mask=0.1)
    before, after = weights(base), weights(tmp_path / "run")
    names = [name for name in before if not is_statistic(name)]
    moved = sum(int((before[name] != after[name]).sum()) for name in names)
    assert 0 < moved <= round(0.1 * sum(before[name].numel() for name in names))


@pytest.mark.parametrize(
    "changes",
    [{}, {**ALL, "saliency_mask": 0.5}, {**ALL, "method.name": "boundary_expand"}],
    ids=["barrier", "mask", "shadow"],
)
def test_a_resumed_run_ends_bit_by_bit_like_one_that_was_not_stopped(changes, base, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_unlearn(base, data, whole, **changes, max_train_steps=6)
    run_unlearn(base, data, parts, **changes, max_train_steps=4, checkpointing_steps=3)
    run_unlearn(base, data, parts, **changes, max_train_steps=6, resume_from_checkpoint="latest")
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_resumes_bit_by_bit(data, tmp_path):
    short = {"max_train_steps": 8, "lr_scheduler": "one_cycle"}
    run_train(data, tmp_path / "whole", **short)
    run_train(data, tmp_path / "parts", **short, checkpointing_steps=5)
    run_train(data, tmp_path / "parts", **short, checkpointing_steps=5, resume_from_checkpoint="step-5")
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def blackened(images, labels):
    images[labels == 1] = 0


@pytest.mark.parametrize("method", ["retrain", "ft"])
def test_methods_on_retained_images_never_see_a_forget_image(method, base, data, tmp_path):
    """Other forget images, the same weights to the last bit."""
    other = write_data(tmp_path / "other", change=blackened)
    for name, folder in (("a", data), ("b", other)):
        changes = {"method.name": method, **CASES[method], "max_train_steps": 6, "evaluation.before": False}
        run_unlearn(base, folder, tmp_path / name, **changes)
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_without_a_class_is_retraining(base, data, tmp_path):
    changes = {"method.name": "retrain", **CASES["retrain"], "recipe.shift": 1, "train_batch_size": 32}
    run_unlearn(base, data, tmp_path / "unlearn", **changes)
    run_train(data, tmp_path / "train", forget_class="east")
    first, second = weights(tmp_path / "unlearn"), weights(tmp_path / "train")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluate_says_what_unlearn_said_and_attacks_with_shadow_models(base, data, tmp_path):
    random = {"forget_class": None, "forget_count": 30}
    changes = {"method.name": "retrain", **CASES["retrain"], **random}
    run_unlearn(base, data, tmp_path / "shadow", **changes, seed=5)
    metrics, _ = run_unlearn(base, data, tmp_path / "run", **random)
    options = ClassifierEvaluationConfig(
        num_mia_samples=40, shadow_models=[str(tmp_path / "shadow")], retrained=str(tmp_path / "shadow")
    )
    places = {"pretrained_model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "judged")}
    evaluate.main(EvaluateConfig(train_data_dir=str(data), forget_count=30, evaluation=options, **places))
    found = json.loads((tmp_path / "judged" / "evaluation.json").read_text())["metrics"]
    assert found["mia_features"] == metrics["mia_features"] and found["details"] == metrics["details"]
    assert found["lira"]["num_shadow_models"] == 1 and 0 <= found["lira"]["auc"] <= 100
    assert found["average_gap"] >= 0


ROOT = Path(__file__).resolve().parent.parent


def launched(script, settings, folder):
    return Script(f"classification_ext.{script}", words(settings), folder / "said")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_class": "up"}, "error: no label 'up'; the data has north, east, south, west"),
        ({"method.name": "forget"}, "error: unknown method 'forget'; known are boundary_expand"),
    ],
)
def test_mistakes_end_in_one_line(changes, message, base, data, tmp_path):
    places = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": tmp_path / "run"}
    script = launched("unlearn", {**places, **UNLEARN, **changes}, tmp_path)
    status, said = script.wait(), script.output
    lines = [line for line in said.splitlines() if line and "torchvision" not in line]
    assert status == 1 and lines[-1].startswith(message) and "Traceback" not in said


def test_a_signal_leaves_a_checkpoint_to_resume_from(data, tmp_path):
    settings = {"train_data_dir": data, "output_dir": tmp_path / "run", **TRAIN, "num_train_epochs": 500}
    script = launched("train", settings, tmp_path)
    while not re.search(r" [1-9]\d*/2500", script.output):  # 500 epochs of 5 steps: the first is done
        assert script.is_running, f"it ended before the signal came: {script.output[-2000:]}"
        time.sleep(0.02)
    script.send(signal.SIGTERM)
    assert script.wait() == 143 and "--resume_from_checkpoint latest" in script.output
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    metrics = run_train(data, tmp_path / "run", max_train_steps=step + 2, resume_from_checkpoint="latest")
    assert metrics["num_steps"] == step + 2


def test_a_schedule_that_needs_the_number_of_steps(base, data, tmp_path):
    changes = {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_train_steps": 4, "evaluation.before": "false"}
    _, manifest = run_unlearn(base, data, tmp_path / "run", **changes)
    before, after = weights(base), weights(tmp_path / "run")
    assert manifest["num_steps"] == 4 and any(not torch.equal(after[name], before[name]) for name in before)
