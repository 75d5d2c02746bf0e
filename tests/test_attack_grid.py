"""Grids of attacks: their variants, cells that are files, several processes, the control beside the erased model."""

import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from forgotten_images import forgotten
from pipelines import build
from short_evaluations import evaluate, twin_of_base
from short_runs import BASE, ROOT

from barrier_diffusers.evaluation.attacked import require_tried
from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.attacks.benign import BenignConfig
from barrier_diffusers.evaluation.attacks.cells import Cell, CellResult, CellRunner, Scene, Seen, read_cell, strip_of
from barrier_diffusers.evaluation.attacks.completion import CompletionConfig
from barrier_diffusers.evaluation.attacks.inversion import InversionConfig
from barrier_diffusers.evaluation.attacks.relearning import RelearningConfig, relearning
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.models.architectures import components
from barrier_diffusers.models.from_images import ImageSampler
from barrier_diffusers.models.generation import SamplingConfig
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.training.learning import encode
from barrier_diffusers.utils.run_records import module_hash

CLASSIFIER = ClassifierSource(str(ROOT / "assets" / "fashion_classifier"))


@pytest.fixture
def pipeline():
    return build("sd")


def weights(pipeline):
    return {name: module_hash(part) for name, part in components(pipeline).items()}


@pytest.mark.parametrize("trained_weights", ["adapter", "all"])
def test_images_at_a_mark_are_those_of_a_shorter_training(pipeline, trained_weights):
    tried = {"batch_size": 3, "num_images": 4, "learning_rate": 0.01, "trained_weights": trained_weights}
    entry, before = dataclasses.replace(forgotten(), retain_prompts=["a photo of a red boot"]), weights(pipeline)
    long = relearning(pipeline, entry, RelearningConfig(num_steps=3, marks=[1, 2], **tried))
    assert weights(pipeline) == before
    assert [mark.num_steps for mark in long.marks] == [1, 2, 3]
    for mark in long.marks:
        short = relearning(pipeline, entry, RelearningConfig(num_steps=mark.num_steps, **tried))
        np.testing.assert_array_equal(short.images_NHWC, mark.images_NHWC)
        np.testing.assert_array_equal(short.marks[-1].retained_NHWC, mark.retained_NHWC)
        assert mark.retained_NHWC.shape == (1, 32, 32, 3)
    assert not np.array_equal(long.marks[0].images_NHWC, long.marks[2].images_NHWC)
    np.testing.assert_array_equal(long.images_NHWC, long.marks[-1].images_NHWC)


def test_relearning_with_a_learned_token_asks_with_it(pipeline):
    before = weights(pipeline)
    budget = RelearningConfig(num_steps=1, batch_size=3, num_images=4, token_steps=2)
    attempt = relearning(pipeline, forgotten(), budget)
    assert attempt.prompts[0] == "a photo of a red <forgotten>" and weights(pipeline) == before
    named = relearning(pipeline, forgotten(), dataclasses.replace(budget, token_steps=0))
    assert not np.array_equal(attempt.images_NHWC, named.images_NHWC)
    with pytest.raises(ValueError, match=r"benign\.token_steps"):
        BenignConfig(token_steps=1).check(pipeline, forgotten())


def test_a_training_that_ends_in_nonsense_keeps_its_marks(pipeline):
    budget = RelearningConfig(
        num_steps=4, marks=[1], batch_size=3, num_images=4, learning_rate=1e30, trained_weights="all"
    )
    before = weights(pipeline)
    with pytest.raises(FloatingPointError):  # the first mark draws no image that is finite
        relearning(pipeline, forgotten(), budget)
    assert weights(pipeline) == before


def test_marks_beyond_the_end_are_refused():
    with pytest.raises(ValueError, match="marks name step 9, but num_steps is 4"):
        RelearningConfig(num_steps=4, marks=[2, 9])


@pytest.mark.parametrize(("name", "level"), product(sorted(ATTACKS), ["standard", "thorough"]))
def test_every_variant_is_another_one_and_can_run(pipeline, name, level):
    entry = dataclasses.replace(forgotten(), retain_prompts=["a boot", "a bag"], retain_labels=["boot", "bag"])
    budget = ATTACKS.find(name).budget()
    if hasattr(budget, "num_images"):
        budget = dataclasses.replace(budget, num_images=4)
    if name == "paraphrased":
        budget.words = ["shoe"]
    variants = budget.variants(level, entry)
    assert len({variant.name for variant in variants}) == len(variants)
    assert len({repr(variant.budget) for variant in variants}) == len(variants)
    for variant in variants:
        variant.budget.check(pipeline, entry)
        for longer in variant.budget.further(level, entry):
            longer.budget.check(pipeline, entry)
    if (name, level) == ("relearning", "thorough"):
        assert len(variants) == 5 * 5 * 2  # the pictures are six: 2 and 6 of 2, 10, 60
        assert {variant.num_images for variant in variants} == {10}
    if (name, level) == ("relearning", "standard"):
        assert len(variants) == 6 and all(variant.budget.marks[-1] == 200 for variant in variants)


@pytest.mark.parametrize(
    ("name", "level", "changes", "refused"),
    [
        ("relearning", "standard", {"learning_rate": 5e-4}, "learning_rate"),
        ("relearning", "standard", {"num_steps": 50}, "num_steps"),
        ("relearning", "standard", {"rank": 5}, "rank"),
        ("relearning", "thorough", {"marks": [5, 10]}, "marks"),
        ("benign", "thorough", {"targets": ["to_q"]}, "targets"),
        ("inversion", "thorough", {"batch_size": 7}, "batch_size"),
        ("completion", "standard", {"strength": 0.4}, "strength"),
        ("relearning", "standard", {"marks": [10, 5]}, None),
        ("relearning", "standard", {"num_images": 4, "batch_size": 3, "seed": 2}, None),
        ("inversion", "standard", {"num_tokens": 2, "learning_rate": 1e-3}, None),
        ("prompt_search", "standard", {"num_tokens": 2}, None),
        ("completion", "standard", {"kept": "half", "prompt": "empty"}, None),
    ],
)
def test_a_setting_that_no_attacker_of_a_grid_has_is_refused(name, level, changes, refused):
    budget = ATTACKS.find(name).budget(**changes)
    if refused is None:
        require_tried(name, budget, level, forgotten())
    else:
        with pytest.raises(ValueError, match=rf"{name}\.{refused} is set .* no attacker of attack_budget {level}"):
            require_tried(name, budget, level, forgotten())


def test_marks_that_are_set_are_those_of_a_standard_grid():
    for name in ("relearning", "benign"):
        variants = ATTACKS.find(name).budget(marks=[3, 7]).variants("standard", forgotten())
        assert {(*variant.budget.marks, variant.budget.num_steps) for variant in variants} == {(3, 7, 7)}


def test_starts_of_inversion(pipeline):
    entry = dataclasses.replace(forgotten(), retain_prompts=["a boot", "a bag"], retain_labels=["boot", "bag"])
    assert entry.other_words == ["bag", "boot"]
    starts = {variant.budget.words(entry) for variant in InversionConfig().variants("thorough", entry)}
    assert starts == {"sneaker", "bag", "boot", None}
    with pytest.raises(ValueError, match="leave out initial_words"):
        InversionConfig(start="random", initial_words="boot")
    with pytest.raises(ValueError, match=r"a prompt is longer than the tokenizer reads: lower inversion\.num_tokens"):
        InversionConfig(num_tokens=40).check(pipeline, entry)


def test_latents_that_are_inverted_come_back(pipeline):
    """On the embedded pipeline's denoiser, whose predictions are smooth; a random one is its own worst case."""
    embedded = load_pipeline(str(BASE))
    sampler = ImageSampler(embedded, SamplingConfig(num_inference_steps=40))
    latents = sampler.latents(encode(embedded, forgotten().images.select([0]), 32))
    noise = sampler.invert(latents, [""])
    back = sampler.from_noise(noise, [""])
    assert (back - latents).square().mean() < 0.25 * (torch.randn_like(latents) - latents).square().mean()


@pytest.mark.parametrize("architecture", ["sd_velocity", "sdxl", "sd3", "flux"])
def test_completion_serves_every_architecture(architecture):
    pipeline, entry = build(architecture), forgotten()
    for name, budget in (("completion", CompletionConfig(kept="half")), ("latent_inversion", None)):
        attack = ATTACKS.find(name)
        made = attack.run(pipeline, entry, budget or attack.budget()).images_NHWC
        assert made.shape == (3, 32, 32, 3)


def test_what_is_kept_of_an_image_stays(pipeline):
    sampler = ImageSampler(pipeline, SamplingConfig(num_inference_steps=3))
    latents = sampler.latents(encode(pipeline, forgotten().images.select([0, 1]), 32))
    kept = torch.zeros(latents.shape[-2:], dtype=torch.bool)
    kept[:, :3] = True
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    found = sampler.denoise(latents, noise, ["a boot"] * 2, strength=1.0, kept=kept)
    torch.testing.assert_close(found[..., :3], latents[..., :3])
    assert not torch.allclose(found[..., 3:], latents[..., 3:])
    little = sampler.denoise(latents, noise, ["a boot"] * 2, strength=0.01)
    much = sampler.denoise(latents, noise, ["a boot"] * 2, strength=1.0)
    assert (little - latents).abs().mean() < (much - latents).abs().mean()


def scene(cache, entry):
    return Scene({"erased": (str(BASE), None)}, {"erased": "x"}, [entry], CLASSIFIER, [], cache)


def test_a_finished_cell_is_read_and_another_budget_is_another_cell(pipeline, tmp_path, monkeypatch):
    entry = dataclasses.replace(forgotten(), retain_prompts=["a red boot", "a red bag"], retain_labels=["boot", "bag"])
    runner = CellRunner(scene(tmp_path, entry), "cpu", {"erased": pipeline})
    budget = RelearningConfig(num_steps=2, marks=[1], batch_size=3, num_images=4)
    variant = next(iter(budget.variants("standard", entry)))
    cell = Cell("erased", "relearning", "sneaker", dataclasses.replace(variant, budget=budget))
    first = runner.run(cell)
    assert [seen.num_steps for seen in first.marks] == [1, 2] and len(first.marks[0].retained) == 2
    assert first.images().shape == (3, 32, 32, 3)
    (path,) = tmp_path.glob("attack-*.json")
    again = json.loads(path.read_text()) | {"seconds": 123.0}
    path.write_text(json.dumps(again))
    assert runner.run(cell).seconds == 123.0
    smaller = dataclasses.replace(cell, variant=dataclasses.replace(cell.variant, num_images=1))
    assert len(runner.run(smaller).marks[0].shown) == 1 and len(list(tmp_path.glob("attack-*.json"))) == 2
    path.write_text("{")  # half a file
    assert read_cell(path) is None and dataclasses.replace(runner.run(cell), seconds=0) == dataclasses.replace(
        first, seconds=0
    )


def test_a_cell_that_fails_is_a_result_in_a_grid_and_an_error_without(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    entry = forgotten()
    budget = RelearningConfig(num_steps=1, batch_size=3, num_images=4)
    cell = Cell("erased", "relearning", "sneaker", next(iter(BenignConfig.variants(budget, "standard", entry))))
    with pytest.raises(FloatingPointError):
        CellRunner(scene(tmp_path, entry), "cpu", {"erased": pipeline}).run(cell)
    grid = dataclasses.replace(scene(tmp_path, entry), first_failure_ends=False)
    result = CellRunner(grid, "cpu", {"erased": pipeline}).run(cell)
    assert "non-finite" in result.failed and result.marks == []


def test_pictures_of_a_cell_are_small():
    strip = strip_of(np.zeros((20, 512, 512, 3), dtype=np.uint8))
    images = CellResult("m", "a", "c", "v", {}, 0.0, marks=[Seen(0, [True], 0.5)], picture=strip).images()
    assert images.shape == (12, 128, 128, 3)


QUICK = {"fidelity.extractors": "[]", "relearning.marks": "[1]", "attacks": "[relearning,misspelled]"}


def test_a_control_is_attacked_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    control = twin_of_base(tmp_path / "control")
    record = evaluate(tmp_path / "run", control=control, **QUICK)
    assert record["control_attacks"] == record["attacks"]  # the twin draws the same images
    assert "control_unet" in record["hashes"] and set(record["control"]) == {"unlearning_accuracy", "retain_accuracy"}
    gaps = {gap["attack"]: gap for gap in record["attack_gaps"]}
    assert list(gaps["relearning"]["marks"]) == ["1", "2"] and list(gaps["misspelled"]["marks"]) == ["0"]
    for gap in gaps.values():
        assert gap["strongest"]["gap"]["value"] == 0 and gap["mean_strongest"]["interval_95"] == [0, 0]
    printed = capsys.readouterr().out
    assert "erased model and control under attack" in printed and "mean, early" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Attack gap" in page and "mean attacker" in page
    rows = json.loads((tmp_path / "run" / "attack_curves.json").read_text())
    assert {(row["model"], row["attack"]) for row in rows} == set(
        product(["erased", "control"], ["relearning", "misspelled"])
    )


def test_a_control_that_is_what_is_judged_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="has the weights of what is judged"):
        evaluate(tmp_path / "run", control=BASE, **QUICK)
    build("sd").save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="of another kind or size than the UNet2DConditionModel that is judged"):
        evaluate(tmp_path / "run", control=tmp_path / "small", **QUICK)
    with pytest.raises(ValueError, match="control is about attacks, and there is none"):
        evaluate(tmp_path / "run", control=BASE, **{**QUICK, "attacks": "[]"})


GRID = """
from dataclasses import dataclass, replace
from barrier_diffusers.evaluation.attacks import Attempt, Budget, Variant, register_attack
from barrier_diffusers.models.generation import generate


@dataclass
class ShoutedConfig(Budget):
    marks: int = 1
    SURVIVORS = 1

    def variants(self, level, forgotten):
        return [Variant(f"{count} marks", replace(self, marks=count), 1) for count in (1, 2)]

    def further(self, level, forgotten):
        return [Variant("again", replace(self, marks=9))]


@register_attack("shouted", ShoutedConfig)
def shouted(pipeline, forgotten, budget):
    prompts = [prompt + "!" * budget.marks for prompt in forgotten.prompts]
    return Attempt(generate(pipeline, prompts, forgotten.sampling), prompts)
"""


@pytest.mark.slow
def test_a_grid_of_a_users_attack_in_two_processes_is_that_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = tmp_path / "shouted.py"
    module.write_text(GRID)
    changes = {"module": module, "attacks": "[shouted]", "attack_budget": "standard", "fidelity.extractors": "[]"}
    records = {}
    for workers in (1, 2):
        records[workers] = evaluate(tmp_path / str(workers), attack_workers=workers, **changes)
    (one,), (two,) = (records[workers]["attacks"] for workers in (1, 2))
    assert one == two and one["num_cells"] == 3 and one["variant"].endswith("marks, again")
    assert one["budget"]["marks"] == 9 and one["post_attack"]["num_images"] == 2
    curves = [Path(tmp_path / str(workers) / "attack_curves.json").read_text() for workers in (1, 2)]
    assert curves[0] == curves[1] and [row["round"] for row in json.loads(curves[0])] == [1, 1, 2]
    assert len(list((tmp_path / "2" / "cache").glob("attack-*.json"))) == 3
