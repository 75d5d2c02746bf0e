"""unlearn_sd.py with every objective, baseline and constraint, and one run after another; on the embedded pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from short_runs import BASE, ROOT, run

from barrier_diffusers import Barrier
from barrier_diffusers.data.encoding import encode_prompts

BARE = {"objective.anchor": "null", "objective.alpha": 0, "barrier.lambda_interval": 0}
KEYS = {"barrier.targets": "[attn2.to_k,attn2.to_v]"}
PROJECTION = {"barrier.constraint": "projection", "barrier.use_actual_bounds": "false"}
PROMPTS = {"train_data_dir": "null", "concept": "bag", "forget_prompts": "[a bag]", "retain_prompts": "[a boot]"}
PROMPTS |= {"num_generated_images": 1, "generation.num_inference_steps": 1}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Latents, embeddings and "before" images are the same for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


def changes_of(output):
    """Weight name -> change, for the maps that changed."""
    new, old = load_file(output / WEIGHTS), load_file(BASE / WEIGHTS)
    found = {name: value.float() - old[name].float() for name, value in new.items()}
    return {name: delta for name, delta in found.items() if delta.abs().max() > 0}


OBJECTIVES = {
    "ga": {},
    "rl": {"objective.anchor": "boot"},
    "concept": {"objective.anchor_prompt": "a photo of a boot"},
    "kl": {"objective.temperature": 0.2},
    "esd": {"objective.num_inference_steps": 3, "objective.eta": 0.5},
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("protected", [False, True])
def test_trains_with_and_without_protection(name, protected, tmp_path, cache):
    settings = {**BARE, "objective.name": name, **OBJECTIVES[name]}
    if protected:
        settings |= {"objective.alpha": 0.5, "barrier.lambda_interval": 1}
    _, content = run(tmp_path / "run", cache, **settings)
    history = content["history"]
    assert all(np.isfinite(values).all() for values in history.values())
    assert (max(history["protection"]) > 0) == protected and (max(history["retain"]) > 0) == protected
    assert any(value != 0 for value in history["objective"])
    assert all(".attn2.to_" in key for key in changes_of(tmp_path / "run"))


def test_esd_reads_prompts_only(tmp_path):
    _, content = run(tmp_path / "run", tmp_path / "cache", **{**BARE, "objective.name": "esd", **OBJECTIVES["esd"]})
    assert not list((tmp_path / "cache").glob("latents-*")) and content["history"]["objective"][0] > 0


def test_uce_edits_several_concepts_without_training(tmp_path, cache):
    settings = {**BARE, **KEYS, "objective.name": "uce", "concept": "[sneaker,bag]", "objective.anchor": "[boot,coat]"}
    metrics, content = run(tmp_path / "run", cache, **{**settings, "barrier.use_actual_bounds": "false"})
    assert metrics["num_steps"] == 0 and content["history"] == {}
    changed = changes_of(tmp_path / "run")
    assert changed and all(key.split(".")[-2] in ("to_k", "to_v") and ".attn2." in key for key in changed)
    assert not (tmp_path / "run" / "loss_curves.png").exists()
    assert np.isfinite(StableDiffusionPipeline.from_pretrained(tmp_path / "run").unet.conv_in.weight.detach()).all()


def test_saliency_mask_survives_a_checkpoint(tmp_path, cache):
    settings = {"saliency_mask": 0.3, "checkpointing_steps": 1, "max_train_steps": 2, "learning_rate": 0.01}
    _, whole = run(tmp_path / "run", cache, **settings)
    changed = changes_of(tmp_path / "run")
    share = sum((delta != 0).sum() for delta in changed.values()) / sum(delta.numel() for delta in changed.values())
    assert 0.2 < share.item() < 0.45  # a map that keeps no entry is not among the changed
    _, resumed = run(tmp_path / "run", cache, resume_from_checkpoint="latest", **settings)
    assert resumed["hashes"] == whole["hashes"]


@pytest.mark.parametrize("rank", [0, 4])
def test_projection_leaves_retain_prompts_alone(rank, tmp_path):
    settings = {**KEYS, **PROJECTION, "retain_statistics": "prompts", "objective.alpha": 0, "learning_rate": 0.01}
    output, cache = tmp_path / "run", tmp_path / "cache"
    _, content = run(output, cache, rank=rank, **settings)
    assert set(content["history"]["retain"]) == {0.0} == set(content["history"]["protection"])
    assert len(list(cache.glob("latents-*"))) == 1  # of the forget images
    pipeline = StableDiffusionPipeline.from_pretrained(BASE)
    retained = encode_prompts(pipeline, ["a photo of a red boot", "a pencil sketch of a blue bag"])
    forgotten = encode_prompts(pipeline, ["a photo of a red sneaker"])
    if rank:
        pipeline.load_lora_weights(output)
    barrier = Barrier.from_pretrained(output, pipeline.unet)
    rows, own = (c["encoder_hidden_states"].flatten(0, 1) for c in (retained, forgotten))
    for entry in barrier.maps:
        if rank:
            delta = barrier.drift(entry).dense()
        else:
            delta = load_file(output / WEIGHTS)[f"{entry.name}.weight"].float() - entry.layer.weight.detach()
        assert (delta @ barrier.projections[entry.name].basis).norm() < 1e-4 * delta.norm()
        kept, moved = ((delta @ x.T).norm() / x.norm() for x in (rows, own))
        assert kept < moved
    assert barrier.projections[barrier.maps[0].name].energy >= 0.999


def test_projection_and_penalty_with_mixed_statistics_resume(tmp_path, cache):
    settings = {"barrier.constraint": "both", "barrier.projection_energy": 0.9, "retain_statistics": "prompts"}
    settings |= {"max_train_steps": 4, "checkpointing_steps": 2, "retain_concepts": "[boot,bag]"}
    _, whole = run(tmp_path / "run", cache, **settings)
    assert max(whole["history"]["protection"]) > 0
    _, resumed = run(tmp_path / "run", cache, resume_from_checkpoint="step-2", **settings)
    assert resumed["hashes"] == whole["hashes"] and resumed["history"] == whole["history"]


def test_one_after_another(tmp_path, cache):
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, cache, **{"concept": "[sneaker,sandal]", "objective.anchor": "[boot,boot]"})
    assert json.loads((first / "erased_concepts.json").read_text())[0]["concepts"] == ["sneaker", "sandal"]
    style = {"concept": "pencil sketch", "concept_column": "style", "objective.anchor": "photo"}
    style |= {"pretrained_model_name_or_path": first, "num_generated_images": 4, "generation.num_inference_steps": 2}
    metrics, _ = run(second, cache, **style, **{"evaluation.images_per_label": 12})
    record = json.loads((second / "erased_concepts.json").read_text())
    assert [entry["concepts"] for entry in record] == [["sneaker", "sandal"], ["pencil sketch"]]
    assert 0 <= metrics["erased_before_unlearning_accuracy_after"] <= 100
    (folder,) = cache.glob("generated-*")
    prompts = json.loads((folder / "manifest.json").read_text())["prompts"]
    assert len(prompts) == 12 and all("photo" in text and ("sneaker" in text or "sandal" in text) for text in prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective.name": "uce", "objective.alpha": 0, **KEYS}, "no training step that the protection could act on"),
        ({**BARE, "objective.name": "uce", "objective.anchor": "boot", "rank": 2}, "leave rank at its default"),
        ({**BARE, "objective.name": "uce", "objective.anchor": "boot"}, "keys and values of cross-attention only"),
        ({"objective.name": "ga"}, "'ga' does not read objective.anchor"),
        ({"saliency_mask": 1.5}, "saliency_mask is 1.5"),
        ({"saliency_mask": 0.5, **PROJECTION}, "use one of the two"),
        ({"retain_statistics": "prompts", "barrier.use_actual_bounds": "false"}, "reads no retain data"),
        ({"retain_statistics": "prompts", "barrier.targets": "[attn1.to_k]"}, "read the prompt alone \\(attn2.to_k"),
        ({"retain_concepts": "[hat]"}, "zero retain images: no row has class = 'hat'"),
        ({"objective.module": "/no/such.py"}, "does not exist"),
        ({"concept": "[sneaker,bag]", "objective.anchor": "[boot]"}, "lists 1 words for 2 concepts"),
        ({"concept": "[sneaker,bag]", "objective.anchor": "bag"}, "'bag' is to be forgotten itself"),
        ({**PROMPTS, "objective.anchor": "null"}, "there is no other label"),
        ({**PROMPTS, "concept": "hat", "objective.anchor": "boot"}, "'a bag' does not name the concept 'hat'"),
        ({**PROMPTS, "retain_prompts": "[a tree]"}, "no retain prompt of the evaluation names another class"),
        ({**PROMPTS, "concept": "mug", "forget_prompts": "[a mug]"}, "cannot recognise mug"),
    ],
)
def test_contradictions_are_errors(settings, message, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("training started"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", cache, **settings)
