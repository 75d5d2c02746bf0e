"""benchmarks/judges.py: what two judges say of the same images, and how far they agree."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import ViTImageProcessor

from barrier_diffusers.data.prompt_files import PromptRow, write_prompts
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from benchmarks.judges import JudgesConfig, agreement, as_markdown, compare, make_network, scores

LABELS = ["bag", "bag", "boot", "boot"]


def test_agreement_counts_out_chance():
    """One says bag of half of the images, the other of three quarters: by chance they agree on half."""
    found = agreement(["bag", "bag", "boot", "boot"], ["bag", "bag", "boot", "bag"])
    chance = 0.5 * 0.75 + 0.5 * 0.25
    assert found["agreement"]["value"] == 75.0 and found["kappa"] == pytest.approx((0.75 - chance) / (1 - chance))
    assert agreement(["bag", "boot"], ["boot", "bag"])["kappa"] == pytest.approx(-1)
    assert agreement(["bag", "bag"], ["bag", "bag"])["kappa"] == 1.0


def test_each_judges_accuracies():
    found = {"before": ["bag", "bag", "boot", "boot"], "after": ["boot", "bag", "boot", "bag"]}
    result = scores(found, LABELS, "bag")
    assert result["unlearning_accuracy"]["value"] == 50.0
    assert result["retain_accuracy_before"]["value"] == 100.0 and result["retain_accuracy_after"]["value"] == 50.0
    assert result["retain_accuracy_drop"] == 50.0


def test_two_judges_read_the_images_of_an_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    for when in ("before", "after"):
        folder = tmp_path / "images/concepts" / when
        folder.mkdir(parents=True)
        write_prompts(folder / "prompts.csv", [PromptRow(str(n), f"a {x}", n, label=x) for n, x in enumerate(LABELS)])
        for number in range(len(LABELS)):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}_0.png")
    AttributeClassifier({"class": ["bag", "boot"]}, channels=(4, 8)).save_pretrained(tmp_path / "first")
    make_network(["bag", "boot"]).save_pretrained(tmp_path / "second")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "second")
    config = JudgesConfig(
        evaluation_dir=str(tmp_path),
        concept="bag",
        classifier=str(tmp_path / "first"),
        judge_dir=str(tmp_path / "second"),
    )
    result = json.loads(json.dumps(compare(config)))
    assert set(result["per_label"]) == {"bag", "boot"} and result["agreement"]["agreement"]["num_images"] == 8
    lines = as_markdown(result).splitlines()
    assert lines[2].startswith("| AttributeClassifier | ") and lines[3].startswith("| ResNet of transformers | ")
    assert lines[-2].startswith("| bag | ") and lines[-2].endswith("|  | 4 |")
