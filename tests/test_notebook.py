"""`barrier_diffusers.unlearn`: one call on a loaded pipeline, which does what the script does."""

import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from pipelines import build
from short_runs import TINY, run_tiny

from barrier_diffusers import Barrier, UnlearnResult, unlearn
from barrier_diffusers.models.loading import load_pipeline


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


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps the first run's precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


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
        ({"objective": {"alpha": 1.0}}, "set retain_prompts"),
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
