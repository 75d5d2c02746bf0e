"""Evaluation: labels in prompts, accuracies with intervals, pictures, the classifier's save and load."""

import numpy as np
import pytest
import torch
from PIL import Image

from barrier_diffusers.data.captions import labels_in_texts
from barrier_diffusers.evaluation.accuracy import Answers, erasure_metrics, share
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.evaluation.judge import attribute_of
from barrier_diffusers.evaluation.pictures import before_after_grid, image_rows, loss_curves, strip
from barrier_diffusers.evaluation.tables import print_metrics

ATTRIBUTES = {"class": ["shirt", "t-shirt", "boot"], "colour": ["red", "blue"], "style": ["photo", "pencil sketch"]}


def test_labels_in_texts_prefers_whole_and_longer_words():
    prompts = ["a photo of a red t-shirt", "a pencil sketch of a blue shirt", "boots", "A boot.", "a bootleg"]
    assert labels_in_texts(prompts, ATTRIBUTES["class"]) == ["t-shirt", "shirt", "boot", "boot", None]
    assert labels_in_texts(prompts, ATTRIBUTES["style"]) == ["photo", "pencil sketch", None, None, None]


def test_attribute_of():
    assert attribute_of(ATTRIBUTES, ["red"]) == "colour"
    with pytest.raises(ValueError, match="cannot recognise cat; it knows class: shirt"):
        attribute_of(ATTRIBUTES, ["cat"])


def test_share_has_the_wilson_interval():
    entry = share([True] * 45 + [False] * 5)
    assert entry["value"] == 90.0 and entry["num_images"] == 50
    # Wilson: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, n, p = 1.959964, 50, 0.9
    centre, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z * np.sqrt(p * (1 - p) / n + z**2 / 4 / n**2) / (1 + z**2 / n)
    assert entry["interval_95"] == pytest.approx([100 * (centre - half), 100 * (centre + half)], abs=2e-3)
    with pytest.raises(ValueError, match="no image to score"):
        share([])


def test_erasure_metrics_by_hand():
    wanted = {"class": ["boot", "boot", "shirt", "shirt", None], "colour": ["red", "blue", "red", None, "blue"]}
    before = {"class": ["boot", "boot", "shirt", "boot", "boot"], "colour": ["red"] * 5}
    after = {"class": ["shirt", "boot", "shirt", "shirt", "boot"], "colour": ["blue", "blue", "red", "red", "blue"]}
    metrics = erasure_metrics(before, after, wanted, "class", ["boot"])
    assert metrics["unlearning_accuracy"] == 50.0
    assert (metrics["retain_accuracy_before"], metrics["retain_accuracy_after"]) == (50.0, 100.0)
    assert metrics["retain_accuracy_drop"] == -50.0
    assert metrics["per_class_after"] == {"boot": 50.0, "shirt": 100.0}
    assert (metrics["colour_accuracy_before"], metrics["colour_accuracy_after"]) == (50.0, 100.0)  # rows 2 and 4
    assert metrics["details"]["colour_accuracy_after"]["num_images"] == 2


def test_print_metrics_shows_every_label(capsys):
    wanted = {"class": ["boot", "shirt"], "colour": ["red", "blue"]}
    print_metrics(erasure_metrics(wanted, wanted, wanted, "class", ["boot"]), "class", ["boot"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("boot", "shirt", "colour", "unlearning accuracy 0.0 %", "(1 images)"))


def test_classifier_round_trip_and_resampling(tmp_path):
    torch.manual_seed(0)
    model = AttributeClassifier(ATTRIBUTES, channels=(4, 8), resolution=16).eval()
    model.save_pretrained(tmp_path)
    loaded = AttributeClassifier.from_pretrained(tmp_path)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    for name, logits in model(pixels).items():
        torch.testing.assert_close(loaded.eval()(pixels)[name], logits)
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8)
    labels = Answers.of(loaded, images).labels
    assert {name: len(values) for name, values in labels.items()} == {"class": 5, "colour": 5, "style": 5}
    assert all(label in ATTRIBUTES[name] for name, values in labels.items() for label in values)


def test_evaluation_config_checks_the_classifier_folder(tmp_path):
    with pytest.raises(ValueError, match="is not an AttributeClassifier, an image classifier of transformers, or"):
        ImageEvaluationConfig(classifier=str(tmp_path))


def test_pictures_are_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    labels = ["a", "a", "b", "b", "c", "c"]
    before_after_grid(images, images, labels, ["b"], tmp_path / "grid.png", columns=2)
    image_rows(images, labels, tmp_path / "rows.png", columns=2)
    strip(images[:2], ["x", "y"], tmp_path / "new" / "strip.png")
    loss_curves({"objective": [1.0, 0.5], "protection": [0.0, 0.1]}, tmp_path / "loss.png")
    for path in (tmp_path / "grid.png", tmp_path / "rows.png", tmp_path / "new" / "strip.png", tmp_path / "loss.png"):
        assert min(Image.open(path).size) > 20
