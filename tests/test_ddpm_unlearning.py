"""ddpm_ext/unlearn.py on a tiny model: what moves, what is read, what is written."""

import json
import shutil

import numpy as np
import pytest
import torch
from ddpm_models import LABELS, Place

from barrier_diffusers import Barrier
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.training.seeds import seeded
from barrier_diffusers.utils.command_line import parse_config
from ddpm_ext.diffusion import LabelDenoiser
from ddpm_ext.loading import load_pipeline
from ddpm_ext.settings import UnlearnConfig, chosen_objective
from ddpm_ext.unlearn import unlearning_rows

TARGETS = ("to_q", "to_k", "to_v", "class_embedding")
FEW_STEPS = {"objective.num_inference_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("ddpm"))


def moved(place, after):
    """Names of the parameters that differ from the base's."""
    before = dict(load_pipeline(str(place.base)).unet.named_parameters())
    return {name for name, value in after.named_parameters() if not torch.equal(value, before[name])}


def is_target(name):
    return name.rpartition(".")[0].split(".")[-1] in TARGETS


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ga", {"objective.alpha": 0.5}),
        ("rl", {"barrier.use_actual_bounds": True}),
        ("kl", {"barrier.constraint": "projection", "barrier.projection_energy": 0.9}),
        ("esd", FEW_STEPS),
        ("esd", {**FEW_STEPS, "barrier.constraint": "projection", "barrier.projection_energy": 0.9}),
    ],
)
def test_only_the_targets_move(place, tmp_path, name, changes):
    metrics, after = place.unlearn(tmp_path, **{"objective.name": name, **changes})
    changed = moved(place, after)
    assert changed and all(is_target(entry) for entry in changed)
    assert {"class_embedding.weight"} < changed
    assert metrics["num_trainable"] < metrics["num_parameters"]
    assert metrics["percent_trainable"] == pytest.approx(
        100 * metrics["num_trainable"] / metrics["num_parameters"], 1e-3
    )
    assert max(metrics["drift"].values()) > 0
    history = json.loads((tmp_path / "manifest.json").read_text())["history"]
    assert len(history["objective"]) == 3 and np.isfinite(history["objective"]).all()
    for file in ("before_after.png", "loss_curves.png", "report.html", "barrier_config.json", "model_index.json"):
        assert (tmp_path / file).is_file()


def test_a_projection_moves_no_row_of_the_table_but_the_forgotten_one(place, tmp_path):
    settings = {"barrier.constraint": "projection", "barrier.projection_energy": 0.98, "label_dropout": 0.3}
    _, after = place.unlearn(tmp_path, max_train_steps=10, **settings)
    before = load_pipeline(str(place.base)).unet.class_embedding.weight
    change = (after.class_embedding.weight - before).norm(dim=1)
    assert change[1] > 1e-3 and change[[0, 2, 3]].max() < 1e-6


def test_without_protection_nothing_is_fitted(place, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("setup_protection was called")

    monkeypatch.setattr(Barrier, "setup_protection", refuse)
    metrics, after = place.unlearn(tmp_path, **{"barrier.lambda_interval": 0.0})
    assert moved(place, after) and "protection" in json.loads((tmp_path / "manifest.json").read_text())["history"]
    assert not (tmp_path / "barrier_regions.safetensors").exists() and metrics["seconds_setup"] < 1


def test_a_saliency_mask_holds_entries(place, tmp_path):
    settings = {"barrier.lambda_interval": 0.0, "saliency_mask": 0.25, "objective.name": "ga"}
    _, after = place.unlearn(tmp_path, **settings)
    before = dict(load_pipeline(str(place.base)).unet.named_parameters())
    trained = [(value, before[name]) for name, value in after.named_parameters() if is_target(name)]
    share = sum(int((now != then).sum()) for now, then in trained) / sum(now.numel() for now, _ in trained)
    assert 0 < share <= 0.26


def test_a_resumed_run_ends_with_the_same_bits(place, tmp_path):
    settings = {"objective.name": "kl", "max_train_steps": 4, "checkpointing_steps": 2, "barrier.lambda_interval": 1.0}
    _, whole = place.unlearn(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "half" / "checkpoints")
    _, half = place.unlearn(tmp_path / "half", **settings, resume_from_checkpoint="step-2")
    for (name, one), other in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name


def rows_of(place, tmp_path, **changes):
    config = parse_config(UnlearnConfig, place.unlearn_words(tmp_path, **changes))
    return unlearning_rows(config, chosen_objective(config), load_pipeline(str(place.base)))


@torch.no_grad()
def nearest_by_hand(place, images):
    """The label whose answers on boots are nearest to those of their own label, in batches of 4."""
    denoiser = LabelDenoiser(load_pipeline(str(place.base)))
    images = images[take_evenly(range(len(images)), 32, 0)]
    generator, totals = seeded(0, "nearest label", 0), torch.zeros(3)
    for start in [*range(0, len(images), 4)] * 2:
        drawn = denoiser.noised(images[start : start + 4], generator)
        answers = [
            denoiser.network(drawn.noisy, drawn.timesteps, class_labels=torch.full_like(drawn.timesteps, label)).sample
            for label in range(3)
        ]
        totals += torch.stack([(answer - answers[1]).square().flatten(1).mean(1).sum() for answer in answers])
    return 0 if totals[0] < totals[2] else 2


def test_rows_hold_what_the_objective_reads_and_nothing_else(place, tmp_path):
    rows = rows_of(place, tmp_path, **{"objective.alpha": 1.0, "label_dropout": 0.5, "max_retain_images": 12})
    assert rows.forget.labels.tolist() == [1] * 8 and set(rows.forget.anchors.tolist()) <= {0, 2}
    assert set(rows.retain.labels.tolist()) == {0, 2, 3} and len(rows.retain) == 12
    assert rows.forget.null_label is None and "unconditional" not in rows.forget[0]
    named = rows_of(place, tmp_path, **{"objective.anchor": "coat", "barrier.lambda_interval": 0.0})
    assert set(named.forget.anchors.tolist()) == {2} and named.retain is None
    two = rows_of(place, tmp_path, concept="[bag,boot]", **{"objective.anchor": "coat"})
    assert sorted(set(two.forget.labels.tolist())) == [0, 1]
    nearest = rows_of(place, tmp_path, concept="[bag,boot]", **{"objective.anchor_choice": "nearest"})
    assert set(nearest.forget.anchors.tolist()) == {2}  # all that is left
    one = rows_of(place, tmp_path, concept="boot", **{"objective.anchor_choice": "nearest"})
    assert one.forget.anchors.tolist() == [nearest_by_hand(place, one.forget.images)] * 8
    own = rows_of(place, tmp_path, **{"objective.name": "esd"})
    assert own.forget.images is None and own.forget.null_label == 3 and own.forget.anchors is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept": "shoe"}, "no label 'shoe'; the pipeline has bag, boot, coat"),
        ({"concept": str(LABELS).replace("'", "")}, "every label is to be forgotten"),
        ({"concept": "[boot,boot]"}, "concept names 'boot' twice"),
        ({"objective.name": "uce"}, "edits cross-attention"),
        ({"objective.anchor_prompt": "a boot"}, "a label is no prompt"),
        ({"objective.anchor": "boot"}, "is to be forgotten itself"),
        ({"objective.anchor": "shoe"}, "objective.anchor 'shoe' is no label"),
        ({"objective.anchor": "coat", "objective.anchor_choice": "nearest"}, "but an anchor is named"),
        ({"objective.name": "ga", "objective.anchor_choice": "nearest"}, "does not read objective.anchor_choice"),
        ({"objective.name": "ga", "objective.anchor": "coat"}, "does not read objective.anchor"),
        ({"saliency_mask": 0.5, "barrier.constraint": "projection"}, "use one of the two"),
        ({"pretrained_model_name_or_path": "nowhere"}, "holds no model_index.json"),
        ({"evaluation.judge": "nowhere"}, "nowhere"),
        ({"evaluation.attribute": "colour"}, "no head 'colour'; it has class"),
        ({"barrier.targets": "[attn2.to_q]"}, "no module ends with 'attn2.to_q'"),
        ({"train_batch_size": 0}, "train_batch_size is 0"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError)) as caught:
        place.unlearn(tmp_path / "run", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
