"""Whoever judges images: our own classifier, an image classifier of transformers, or a CLIP asked with texts."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from short_evaluations import evaluate
from short_runs import ROOT
from small_clip import save_clip
from transformers import AutoConfig, CLIPProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from barrier_diffusers.data.images import ByteImages
from barrier_diffusers.evaluation.accuracy import Answers
from barrier_diffusers.evaluation.classifier_source import ClassifierSource, first_names, groups_of
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.evaluation.judge import Judge, check_judge

IMAGENET = ["tench, Tinca tinca", "English springer", "chain saw, chainsaw", "crane, crane bird", "crane"]
IMAGENET += ["running shoe", "sneaker boot, gym shoe"]


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A tiny image classifier with random weights in transformers' layout."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    labels = dict(enumerate(IMAGENET))
    config = ViTConfig(**size, image_size=8, patch_size=4, id2label=labels, label2id={v: k for k, v in labels.items()})
    network = ViTForImageClassification(config)
    with torch.no_grad():
        network.classifier.weight.normal_(std=3)
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return str(folder)


def some_images(count=5, side=12):
    return np.random.default_rng(0).integers(256, size=(count, side, side, 3), dtype=np.uint8)


def test_labels_of_a_network_are_called_as_people_say_them():
    assert first_names(IMAGENET)[2:5] == ["chain saw", "crane, crane bird", "crane"]
    found = groups_of(IMAGENET, {"english springer": [], "shoe": ["running shoe", "gym shoe"], "chainsaw": []})
    assert found["english springer"] == [1] and found["shoe"] == [5, 6] and found["chainsaw"] == [2]
    assert found["tench"] == [0] and sum(len(rows) for rows in found.values()) == len(IMAGENET)
    with pytest.raises(ValueError, match="no label 'dog'"):
        groups_of(IMAGENET, {"pet": ["dog"]})
    with pytest.raises(ValueError, match="'running shoe' would mean both 'a' and 'b'"):
        groups_of(IMAGENET, {"a": ["running shoe"], "b": ["running shoe"]})


def test_an_image_classifier_judges_by_the_sum_of_the_probabilities_of_its_labels(vit_folder):
    judge = Judge(ClassifierSource(vit_folder, {"shoe": ["running shoe", "gym shoe"]}), ["shoe", "Tench"])
    images = some_images()
    network = ViTForImageClassification.from_pretrained(vit_folder).eval()
    processor = ViTImageProcessorPil.from_pretrained(vit_folder)
    with torch.no_grad():
        pixels = processor(images=list(torch.from_numpy(images).permute(0, 3, 1, 2)), return_tensors="pt")
        plain = network(**pixels).logits.softmax(1)
    found = judge.probabilities(judge.render(images))
    shoe, tench = (judge.labels.index(name) for name in ("shoe", "Tench"))
    torch.testing.assert_close(found[:, shoe], plain[:, 5] + plain[:, 6])
    torch.testing.assert_close(found[:, tench], plain[:, 0])
    torch.testing.assert_close(found.sum(1), torch.ones(len(images)))
    assert judge.shows(images, "shoe") == [label == "shoe" for label in judge.recognise(found)]


def test_a_clip_judges_by_the_cosine_with_the_texts_of_a_label(clip_folder):
    texts = {"sneaker": ["a sneaker", "a gym shoe"], "boot": []}
    classifier = ClassifierSource(clip_folder, texts).load(["sneaker"])
    assert classifier.attributes == {"class": ["sneaker", "boot"]}
    found = classifier.probabilities_of(ByteImages(some_images()))["class"]
    network: Any = classifier.network
    processor = CLIPProcessor.from_pretrained(clip_folder)
    asked = ["a sneaker", "a gym shoe", "a photo of a boot"]
    with torch.no_grad():
        image = network.get_image_features(
            **processor.image_processor(
                images=list(torch.from_numpy(some_images()).permute(0, 3, 1, 2)), return_tensors="pt"
            )
        )
        text = network.get_text_features(**processor.tokenizer(asked, padding=True, return_tensors="pt"))
    image, text = (getattr(one, "pooler_output", one) for one in (image, text))
    image, text = (one / one.norm(dim=1, keepdim=True) for one in (image, text))
    both = text[:2].mean(0)
    directions = torch.stack([both / both.norm(), text[2]])
    torch.testing.assert_close(found, (network.logit_scale.exp() * image @ directions.T).softmax(1))


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_every_judge_scores_a_pipeline_and_its_attacks(kind, vit_folder, clip_folder, tmp_path, monkeypatch):
    """Random networks judge: that their numbers are theirs is shown against `Answers`."""
    monkeypatch.chdir(ROOT)
    classes = ["sneaker", "boot", "dress", "bag", "coat", "shirt", "t-shirt", "sandal", "trouser", "pullover"]
    if kind == "vit":
        folder, labels = vit_folder, dict(zip(classes, [[label] for label in IMAGENET], strict=False))
        known = len(IMAGENET)
    else:
        folder, labels, known = clip_folder, {name: [] for name in classes}, len(classes)
    written = json.dumps(labels)
    changes = {"evaluation.classifier": folder, "evaluation.labels": written, "attacks": "[misspelled]"}
    record = evaluate(tmp_path / "run", **changes)
    details = record["classes"]["details"]
    assert len(details["per_class_after"]) == known
    assert 0 <= details["forget_confidence_after"] <= 100
    assert details["forget_in_top5_after"]["value"] >= 100 - record["classes"]["unlearning_accuracy"]
    assert record["attacks"][0]["pre_attack"]["value"] == record["classes"]["per_class_after"]["sneaker"]


def test_confidence_and_top_five_are_those_of_the_images_of_the_concept(vit_folder):
    classifier = ClassifierSource(vit_folder).load(["tench"])
    answers = Answers.of(classifier, some_images(6))
    beliefs = answers.probabilities["class"]
    found = answers.beliefs("class", ["tench"] * 6, rows=[1, 4], when="after")
    assert found["forget_confidence_after"] == pytest.approx(100 * beliefs[[1, 4], 0].mean().item(), abs=1e-3)
    inside = [0 in beliefs[row].topk(5).indices for row in (1, 4)]
    assert found["forget_in_top5_after"]["value"] == 100 * np.mean(inside)


def test_a_judge_that_is_none_or_does_not_fit_is_refused(vit_folder, clip_folder, tmp_path):
    def config(folder, labels=None):
        return ImageEvaluationConfig(classifier=str(folder), labels=labels or {})

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an AttributeClassifier, an image classifier of transformers, or"):
        config(tmp_path)
    with pytest.raises(ValueError, match="set evaluation.labels, two labels or more"):
        config(clip_folder)
    with pytest.raises(ValueError, match="evaluation.labels does not fit .* no label 'dog'"):
        config(vit_folder, {"pet": ["dog"]})
    with pytest.raises(ValueError, match="has its own labels: leave evaluation.labels out"):
        config("assets/fashion_classifier", {"pet": ["dog"]})
    with pytest.raises(ValueError, match="evaluation.labels is for a classifier"):
        ImageEvaluationConfig(labels={"pet": ["dog"]})
    with pytest.raises(ValueError, match="cannot recognise sneaker; it knows class: tench"):
        config(vit_folder).check_judge(["sneaker"])


def test_the_hub_is_asked_once_for_a_judge_and_a_folder_is_read_anew(vit_folder, tmp_path, monkeypatch):
    (tmp_path / "models--someone--judge/snapshots/1").mkdir(parents=True)  # downloaded before
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked, read = [], AutoConfig.from_pretrained

    def counted(source, **options):
        asked.append(source)
        return read(vit_folder, **options)  # what the hub would send

    monkeypatch.setattr(AutoConfig, "from_pretrained", counted)
    for _ in range(2):
        for name in ("someone/judge", vit_folder):
            assert check_judge(ClassifierSource(name), ["tench"]) == "class"
    assert asked.count("someone/judge") == 1 and asked.count(vit_folder) == 2
