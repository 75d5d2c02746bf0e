"""`barrier_diffusers.unlearn`: one call on a loaded pipeline, which does what the script does."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import build
from short_runs import BASE, ROOT, TINY, run, run_tiny

from barrier_diffusers import Barrier, UnlearnResult, unlearn
from barrier_diffusers.evaluation.tables import erase_more, warn_if_not_erased
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.utils.command_line import config_from
from barrier_diffusers.workflow.notebook import with_call_defaults
from barrier_diffusers.workflow.settings import UnlearnConfig


def nested(settings):
    """Dotted names as the call takes them: sections are dictionaries, lists are lists."""
    found = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = json.loads(value) if isinstance(value, str) and value[0] in "[t" else value
    return found


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def test_the_call_is_the_script(tmp_path):
    build("sd").save_pretrained(tmp_path / "base")
    manifest = run_tiny(tmp_path / "base", tmp_path / "script")
    pipeline = load_pipeline(str(tmp_path / "base"))
    before = weights(pipeline.unet)
    settings = {name: value for name, value in TINY.items() if name not in ("concept", "objective.anchor")}
    result = unlearn(pipeline, concept="boot", anchor="sneaker", output_dir=tmp_path / "call", **nested(settings))
    assert isinstance(result, UnlearnResult) and result.pipeline is pipeline
    assert result.history == manifest["history"]
    content = json.loads((tmp_path / "call" / "manifest.json").read_text())
    assert content["hashes"] == manifest["hashes"]
    names = [{path.name for path in (tmp_path / run).glob("[!.]*")} for run in ("script", "call")]
    assert names[0] - {"report.html"} == names[1]
    after = weights(load_pipeline(str(tmp_path / "script")).unet)
    assert all(torch.equal(value, after[name]) for name, value in pipeline.unet.state_dict().items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".attn2.to_" in name for name in moved)
    assert json.loads((tmp_path / "call" / "metrics.json").read_text()) == result.metrics
    assert result.metrics["num_steps"] == 2
    assert isinstance(result.barrier, Barrier) and result.barrier.compute_protection_loss().item() > 0
    assert not pipeline.unet.training and all(value.requires_grad for value in pipeline.unet.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_prompts_alone_suffice_and_nothing_is_left_behind(dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = build("sd").to(dtype)
    before = weights(pipeline.unet)
    quick = {"max_train_steps": 2, "num_generated_images": 2, "generation": {"num_inference_steps": 1}}
    result = unlearn(pipeline, concept="boot", anchor="bag", learning_rate=0.05, barrier={"reduced_dim": 4}, **quick)
    assert result.metrics["num_steps"] == 2 and len(result.history["objective"]) == 2
    assert result.history["protection"][-1] > 0 and result.metrics.keys() == {
        "num_steps",
        "seconds_training",
        "seconds_setup",
    }
    assert pipeline.unet.dtype == dtype and pipeline.vae.dtype == dtype
    assert any(not torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    image = pipeline("a boot", num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all() and not list(tmp_path.iterdir())


def test_images_of_the_concept(monkeypatch):
    pipeline, seen = build("sd"), []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: seen.append(pixels.clone()) or encode(pixels))
    images = [Image.new("RGB", (48, 40), "red"), Image.new("L", (32, 32), 0)]
    result = unlearn(
        pipeline, "boot", images=images, objective={"name": "ga"}, max_train_steps=1, barrier={"reduced_dim": 4}
    )
    assert len(result.history["objective"]) == 1
    (pixels,) = seen  # no illustration was encoded
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[0, :, 16, 16].tolist() == [1.0, -1.0, -1.0] and pixels[1].max() == -1


def test_an_adapter_stays_in_the_pipeline():
    pipeline = build("sd")
    quick = {"max_train_steps": 1, "num_generated_images": 2, "generation": {"num_inference_steps": 1}}
    result = unlearn(pipeline, "boot", anchor="bag", rank=2, barrier={"reduced_dim": 4}, **quick)
    names = [name for name, _ in pipeline.unet.named_parameters() if "lora_" in name]
    assert names and result.barrier.uses_adapter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"no_such": 1}, "no_such"),
        ({"barrier": {"reduced": 4}}, "reduced"),
        ({"anchor": None, "objective": {"name": "ga", "alpha": 1.0}}, "set retain_prompts"),
        ({"anchor": "boot"}, "to be forgotten itself"),
    ],
)
def test_mistakes_leave_the_pipeline_as_it_was(settings, message):
    pipeline = build("sd")
    before = weights(pipeline.unet)
    with pytest.raises(ValueError, match=message):
        unlearn(pipeline, "boot", **{"anchor": "bag", **settings})
    assert all(torch.equal(value, before[name]) for name, value in pipeline.unet.state_dict().items())
    assert all(value.requires_grad for value in pipeline.unet.parameters())


BOUNDS = {"use_actual_bounds": True, "lambda_interval": 0.1}
QUICK = {"max_train_steps": 100, "learning_rate": 1e-3}
DEFAULTS = {  # what is given -> what is added or changed
    "nothing but the anchor": (
        {"objective": {"anchor": "bag"}},
        {**QUICK, "retain_prompts": ["bag"], "objective": {"anchor": "bag", "alpha": 1.0}, "barrier": BOUNDS},
    ),
    "two anchors": (
        {"objective": {"anchor": ["bag", "coat"], "alpha": 0.5}, "learning_rate": 1e-5},
        {
            "max_train_steps": 100,
            "retain_prompts": ["bag", "coat"],
            "objective": {"anchor": ["bag", "coat"], "alpha": 0.5},
            "barrier": BOUNDS,
        },
    ),
    "retain prompts and a weight of the protection": (
        {"retain_prompts": ["a coat"], "barrier": {"lambda_interval": 3.0}, "num_train_epochs": 2},
        {
            "learning_rate": 1e-3,
            "objective": {"alpha": 1.0},
            "barrier": {"use_actual_bounds": True, "lambda_interval": 3.0},
        },
    ),
    "nothing retained": ({"objective": {"name": "esd"}}, {**QUICK, "retain_prompts": []}),
    "no floor": ({"objective": {"name": "ga"}, "retain_prompts": ["a"]}, {}),
    "a closed-form edit": ({"objective": {"name": "uce", "anchor": "bag"}, "barrier": {"lambda_interval": 0}}, {}),
    "no protection": (
        {"retain_prompts": ["a"], "barrier": {"lambda_interval": 0}},
        {**QUICK, "objective": {"alpha": 1.0}},
    ),
    "a projection": (
        {"retain_prompts": ["a"], "barrier": {"constraint": "projection"}},
        {**QUICK, "objective": {"alpha": 1.0}},
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_the_call_adds_to_what_is_given(name):
    given, changed = DEFAULTS[name]
    before = json.dumps(given)
    assert with_call_defaults(given) == {**given, **changed}
    assert json.dumps(given) == before
    settings = {"concept": "boot", "output_dir": "none", "pretrained_model_name_or_path": "base", "retain_prompts": []}
    config = config_from(UnlearnConfig, {**settings, **with_call_defaults(given)})
    assert config.concepts == ["boot"]


@pytest.mark.slow
@pytest.mark.parametrize("concept, anchor", [("sneaker", "boot"), ("bag", "dress")])
def test_the_call_erases_and_keeps_by_default(concept, anchor):
    pipeline = load_pipeline(str(BASE))
    kinds = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    result = unlearn(
        pipeline,
        concept,
        anchor=anchor,
        retain_prompts=[f"a {kind}" for kind in kinds if kind != concept],
        num_generated_images=54,
        evaluation={"classifier": str(ROOT / "assets/fashion_classifier"), "images_per_label": 27},
    )
    assert result.metrics["unlearning_accuracy"] >= 90 and result.metrics["retain_accuracy_drop"] <= 12


@pytest.mark.parametrize(
    ("accuracy", "barrier", "said"),
    [
        (80.0, {}, ""),
        (
            37.0,
            {"lambda_interval": 10.0},
            "warning: not erased: 63 % of the images asked for boot or bag still show it: raise max_train_steps or "
            "learning_rate, lower barrier.lambda_interval (it is 10), set barrier.use_actual_bounds, or choose "
            "another anchor or objective\n",
        ),
        (
            0.0,
            {"lambda_interval": 0.0},
            "warning: not erased: 100 % of the images asked for boot or bag still show it: raise max_train_steps or "
            "learning_rate, or choose another anchor or objective\n",
        ),
    ],
)
def test_a_run_that_has_not_erased_says_so(accuracy, barrier, said, capsys):
    settings = {"concept": ["boot", "bag"], "output_dir": "none", "pretrained_model_name_or_path": "base"}
    settings |= {"barrier": barrier, "objective": {"anchor": "coat"}, "retain_prompts": ["a coat"]}
    config = config_from(UnlearnConfig, settings)
    warn_if_not_erased(accuracy, config.concepts, erase_more(config))
    assert capsys.readouterr().err == said


def test_a_judged_run_that_has_not_erased_says_so(tmp_path, capsys):
    """Its own evaluation: a learning rate so small that nothing changes."""
    small = {"evaluation.images_per_label": 4, "learning_rate": 1e-9, "max_train_steps": 1}
    metrics, _ = run(tmp_path / "run", tmp_path / "cache", **small, **{"evaluation.sampling.num_inference_steps": 8})
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: not erased: ")]
    assert len(said) == (metrics["unlearning_accuracy"] < 80) == 1 and "asked for sneaker still show it" in said[0]
