"""Joint concepts: what shows all parts is forgotten, what shows one of them stays."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from short_runs import BASE, ROOT, run_tiny
from torch import nn

from barrier_diffusers.data.concepts import ConceptConfig, load_concept_rows
from barrier_diffusers.data.readers import split_concepts
from barrier_diffusers.evaluation.classifier import AttributeClassifier, JointClassifier, joint_attributes
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.judge import check_judge
from barrier_diffusers.utils.words import find_names, mentions, replace_names, same_name

JUDGE = str(ROOT / "assets/fashion_classifier")


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_text_names_it_that_names_each_part():
    name = "pencil sketch + sneaker"
    assert mentions("a pencil sketch of two red sneakers", name) and mentions("a sneaker, pencil-sketch", name)
    assert not mentions("a photo of a sneaker", name) and not mentions("a pencil sketch of a boot", name)
    assert find_names("a red sneaker", ["boot", "red + sneaker", "sneaker"]) == [(1, 2, 13), (2, 6, 13)]
    assert same_name("red + sneaker", "Red + sneakers") and not same_name("red + sneaker", "sneaker")


def test_each_part_is_exchanged_where_there_are_as_many():
    assert replace_names("a red sneaker", ["red + sneaker"], "blue + sneaker") == "a blue sneaker"
    assert replace_names("sneakers that are red", ["red + sneaker"], "blue + boot") == "boots that are blue"
    assert replace_names("a photo of a red sneaker", ["red + sneaker"], "boot") == "a photo of a boot"
    assert replace_names("a red boot", ["red + sneaker"], "blue + sneaker") is None


def test_rows_with_both_are_forgotten_and_rows_with_one_are_retained():
    config = ConceptConfig(
        concept="red + sneaker", concept_column="colour + class", train_data_dir="assets/fashion_images"
    )
    forget, retain = split_concepts(load_concept_rows(config, "train"), config.concept_column, config.concepts)
    assert {(row["colour"], row["class"]) for row in forget.remove_columns("image")} == {("red", "sneaker")}
    kept = {(row["colour"], row["class"]) for row in retain.remove_columns("image")}
    assert len(forget) == 24 and len(kept) == 59 and {("red", "boot"), ("blue", "sneaker")} <= kept


def test_retained_prompts_may_have_a_part_but_not_all():
    ConceptConfig(concept="red + sneaker", forget_prompts=["a red sneaker"], retain_prompts=["a red boot"])
    with pytest.raises(ValueError, match="names 'red . sneaker', which is to be forgotten"):
        ConceptConfig(concept="red + sneaker", forget_prompts=["a red sneaker"], retain_prompts=["two red sneakers"])


def test_the_joint_probability_is_the_product_of_its_parts():
    torch.manual_seed(0)
    attributes = {"class": ["bag", "boot", "coat"], "colour": ["red", "blue"]}
    plain = AttributeClassifier(attributes, channels=(4, 4), resolution=8).eval()
    for head in plain.heads.values():
        nn.init.normal_(head.weight)
    joint = JointClassifier(plain, ["colour", "class"]).eval()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    found = joint.probabilities([joint.pixels(images)])
    colours, classes = found["colour"], found["class"]
    torch.testing.assert_close(found["colour + class"], (colours[:, :, None] * classes[:, None]).flatten(1))
    assert joint.attributes["colour + class"][:4] == ["red + bag", "red + boot", "red + coat", "blue + bag"]


def test_a_judge_knows_joint_labels_by_their_parts():
    source = ClassifierSource(JUDGE)
    assert check_judge(source, ["red + sneaker", "blue + bag"]) == "colour + class"
    assert check_judge(source, ["sneaker"]) == "class" and "colour + class" not in source.attributes(["sneaker"])
    assert joint_attributes(source.attributes(), ["red + lamp"]) == []
    with pytest.raises(ValueError, match="cannot recognise red . lamp"):
        check_judge(source, ["red + lamp"])


def test_a_run_reports_the_pair_and_each_part_alone(tmp_path):
    run_tiny(
        BASE,
        tmp_path / "run",
        concept="red + sneaker",
        forget_prompts='["a photo of a red sneaker"]',
        retain_prompts='["a photo of a red boot", "a photo of a blue sneaker", "a photo of a green bag"]',
        **{
            "objective.anchor": "blue + sneaker",
            "objective.name": "uce",
            "objective.alpha": 0,
            "objective.null_space": 0.001,
            "barrier.targets": "[attn2.to_k, attn2.to_v]",
            "barrier.lambda_interval": 0,
            "barrier.use_actual_bounds": "false",
            "evaluation.classifier": JUDGE,
            "evaluation.images_per_label": 6,
        },
    )
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    details = metrics["details"]
    assert details["unlearning_accuracy"]["num_images"] == 6 and details["retain_accuracy_after"]["num_images"] == 6
    assert set(details["per_colour + class_after"]) == {"red + sneaker", "red + boot", "blue + sneaker", "green + bag"}
    assert (
        details["red_alone_accuracy_after"]["num_images"]
        == 2
        == details["sneaker_alone_accuracy_before"]["num_images"]
    )
    assert json.loads((tmp_path / "run/erased_concepts.json").read_text())[0]["concepts"] == ["red + sneaker"]
