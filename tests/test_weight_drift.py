"""The audit of somebody else's checkpoint against its base: drift per tensor, in the numbers and on the page."""

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from short_evaluations import BASE, ROOT, evaluate, twin_of_base
from torch import nn

from barrier_diffusers.evaluation.weight_drift import network_drift, weight_drift
from barrier_diffusers.models.exporting import export_single_file
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.workflow.definitions import WORKFLOWS


def test_the_drift_of_each_tensor():
    base = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    judged = copy.deepcopy(base)
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
        judged[0].weight.copy_(torch.tensor([[1.0, 2.0, 2.0], [0.3, -0.4, 0.0]]))
        judged[1].weight.copy_(base[1].weight * (1 + 1e-6))
    found = network_drift(base, judged)
    assert (found["num_tensors"], found["num_changed"], found["num_rounded"]) == (4, 1, 1)
    first, second = found["details"]["tensors"]
    assert (
        first["name"] == "0.weight" and first["norm"] == pytest.approx(0.5) and first["largest"] == pytest.approx(0.4)
    )
    assert first["relative"] == pytest.approx(0.5 / 3) and not first["rounded"]
    assert second["name"] == "1.weight" and second["rounded"]
    assert found["norm"] == pytest.approx(0.5) and found["largest"] == pytest.approx(0.4)
    assert network_drift(base, base)["details"]["tensors"] == [] and network_drift(base, base)["relative"] == 0
    with pytest.raises(ValueError, match="0.weight has shape .2, 3. in the base and .2, 4. in what is judged"):
        network_drift(base, nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))


def test_a_network_that_only_one_has_is_said():
    base, judged = load_pipeline(str(BASE)), load_pipeline(str(BASE))
    judged.register_modules(safety_checker=nn.Linear(1, 1))
    assert weight_drift(base, judged)["safety_checker"] == {"incomparable": "only what is judged has it"}
    assert weight_drift(base, judged)["unet"]["num_changed"] == 0


def test_one_report_on_a_file_of_somebody_else(tmp_path, monkeypatch):
    """A checkpoint in one file, as such models are given away; the base has the configurations."""
    monkeypatch.chdir(ROOT)
    path = export_single_file(load_pipeline(str(twin_of_base(tmp_path / "twin"))), tmp_path / "theirs.safetensors")
    metrics = evaluate(
        tmp_path / "out",
        pretrained_model_name_or_path=path,
        base_model=BASE,
        attacks="[misspelled]",
        **{"fidelity.extractors": "[]", "evaluation.images_per_label": 1},
    )
    drift = metrics["weight_drift"]
    assert (
        drift["text_encoder"]["num_changed"] == 1 and drift["unet"]["num_changed"] == drift["vae"]["num_changed"] == 0
    )
    (entry,) = drift["text_encoder"]["details"]["tensors"]
    assert entry["name"].endswith("token_embedding.weight") and entry["largest"] == pytest.approx(1, abs=1e-5)
    assert "before" in str(metrics["classes"].keys()) and metrics["attacks"]
    known = WORKFLOWS["sd"][-1].metrics  # a sweep may ask for it
    assert any(fnmatchcase("weight_drift.unet.relative", name) for name in known)
    page = (tmp_path / "out/report.html").read_text()
    assert "Drift of the weights from the base" in page and "token_embedding" in page
