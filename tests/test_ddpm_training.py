"""ddpm_ext/train.py: label dropout, the retrain recipe, resuming, mistakes."""

import json
import shutil

import pytest
import torch
from ddpm_models import LABELS, Place

from barrier_diffusers.utils.command_line import parse_config
from ddpm_ext.settings import TrainConfig
from ddpm_ext.train import build_unet, drop_labels, training_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("ddpm"))


def test_labels_are_dropped_at_the_given_rate():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(4000)
    dropped = drop_labels(labels, 0.1, 3)
    is_null = dropped == 3
    assert torch.equal(dropped[~is_null], labels[~is_null])
    assert 0.09 < is_null.double().mean() < 0.11
    assert torch.equal(drop_labels(labels, 0.0, 3), labels)


def test_a_short_training_learns_and_saves_a_pipeline(place, tmp_path):
    pipeline = place.train(
        tmp_path, max_train_steps=40, learning_rate=1e-2, label_dropout=0.2, num_train_timesteps=1000
    )
    assert pipeline.labels == LABELS and pipeline.unet.config.num_class_embeds == 4
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["num_images"] == 24 and content["num_steps"] == 40
    assert content["loss_of_the_last_100_steps"] < 0.9  # noise itself has 1
    config = parse_config(TrainConfig, place.train_words(tmp_path))
    torch.manual_seed(0)
    first = build_unet(config, 3).class_embedding.weight
    moved = (pipeline.unet.class_embedding.weight - first).norm(dim=1)
    assert moved.shape == (4,) and (moved > 0).all()  # every label's row, and that of "no label"


def test_retraining_never_sees_the_excluded_label(place, tmp_path):
    words = place.train_words(tmp_path, exclude_labels="[boot]")
    rows = training_rows(parse_config(TrainConfig, words))
    assert rows.names == LABELS and sorted(set(rows.labels.tolist())) == [0, 2] and len(rows) == 16
    pipeline = place.train(tmp_path, exclude_labels="[boot]", adam_weight_decay=0.0, max_train_steps=6)
    torch.manual_seed(0)
    first = build_unet(parse_config(TrainConfig, words), 3).class_embedding.weight
    assert torch.equal(pipeline.unet.class_embedding.weight[1], first[1])
    assert not torch.equal(pipeline.unet.class_embedding.weight[0], first[0])


def test_a_resumed_run_ends_with_the_same_bits(place, tmp_path):
    whole = place.train(tmp_path / "whole", checkpointing_steps=2)
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "half" / "checkpoints")
    half = place.train(tmp_path / "half", checkpointing_steps=2, resume_from_checkpoint="step-2")
    for (name, one), other in zip(whole.unet.named_parameters(), half.unet.parameters(), strict=True):
        assert torch.equal(one, other), name
    losses = [(tmp_path / run / "manifest.json").read_text() for run in ("whole", "half")]
    assert len({json.loads(text)["loss_of_the_last_100_steps"] for text in losses}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exclude_labels": "[shoe]"}, "no label 'shoe'; the data has bag, boot, coat"),
        ({"resolution": 10}, "resolution is 10, but must be a multiple of 4"),
        ({"label_dropout": 1.0}, "label_dropout is 1.0"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"max_train_steps": 0}, "max_train_steps is 0"),
        ({"unet.attention_levels": "[true]"}, "names 1 levels"),
        ({"train_batch_size": 100}, "24 images are left"),
        ({"data.dataset_name": "cifar10"}, "either data.train_data_dir"),
        ({"data.train_data_dir": "nowhere"}, "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError)) as caught:
        place.train(tmp_path / "run", **changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
