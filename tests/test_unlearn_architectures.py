"""unlearn_sd.py on a tiny pipeline of every architecture, from a pipeline folder to one that generates."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, HiDreamImagePipeline
from PIL import Image
from pipelines import TODAY, build
from safetensors.torch import load_file
from short_runs import run_tiny

from barrier_diffusers import Barrier, BarrierConfig, unlearn
from barrier_diffusers.models.architectures import get_architecture, sampling_arguments
from barrier_diffusers.models.loading import load_adapter, load_pipeline
from barrier_diffusers.models.publishing import save_adapter, save_pipeline

PIPELINES = ["sd", "sd_velocity", "sdxl", "sd3", "flux"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Architecture -> folder of its saved tiny pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    for name in PIPELINES + ["sd3_plain"]:
        build(name).save_pretrained(root / name)
    return {name: root / name for name in PIPELINES + ["sd3_plain"]}


def load(folder):
    """As the model card says: a pipeline without T5 wants to be told so."""
    index = json.loads((folder / "model_index.json").read_text())
    without_t5 = index["_class_name"] == "StableDiffusion3Pipeline" and not index.get("text_encoder_3", [None])[0]
    return DiffusionPipeline.from_pretrained(
        folder, **({"text_encoder_3": None, "tokenizer_3": None} if without_t5 else {})
    )


def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    size = {"num_inference_steps": 2, "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(0)
    return pipeline("a photo of a red boot", generator=generator, output_type="np", **size).images


@pytest.mark.parametrize("name", PIPELINES)
def test_full_weights_from_folder_to_folder(name, folders, tmp_path):
    output = tmp_path / "run"
    content = run_tiny(folders[name], output)
    for losses in content["history"].values():
        assert len(losses) == 2 and np.isfinite(losses).all() and max(losses) > 0
    pipeline = DiffusionPipeline.from_pretrained(output)
    assert type(pipeline) is type(build(name))
    assert np.isfinite(sample(pipeline)).all()
    row = get_architecture(type(pipeline).__name__)
    old, new = (
        load_file(folder / row.denoiser / "diffusion_pytorch_model.safetensors") for folder in (folders[name], output)
    )
    changed = {key for key in new if not torch.equal(old[key], new[key])}
    owners = {key.rpartition(".")[0] for key in changed}
    assert owners and all(any(f".{owner}".endswith(f".{target}") for target in row.targets) for owner in owners)
    saved = BarrierConfig.from_pretrained(output)
    assert saved.targets == list(row.targets)
    assert set(content["hashes"]) == {"base_denoiser"} | {
        n for n, m in pipeline.components.items() if hasattr(m, "state_dict")
    }


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", [builder.__name__ for builder in TODAY])
def test_todays_pipelines_unlearn_and_load_with_diffusers(name, rank, tmp_path):
    """Two steps in memory; what is saved gives the images that the pipeline in memory gives."""
    pipeline, base = build(name), build(name)
    row = get_architecture(type(pipeline).__name__)
    settings = {"images": [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")], "resolution": 32}
    settings |= {"max_train_steps": 2, "train_batch_size": 2, "learning_rate": 0.05, "rank": rank}
    settings |= {"objective": {"alpha": 0}, "barrier": {"reduced_dim": 2}, "forget_prompts": ["a red boot", "a boot"]}
    if rank and not row.has_adapters:
        with pytest.raises(ValueError, match="diffusers saves and loads no LoRA adapter for a"):
            unlearn(pipeline, "boot", anchor="sneaker", **settings)
        return
    result = unlearn(pipeline, "boot", anchor="sneaker", **settings)
    assert min(result.history["objective"]) > 0 and np.isfinite(result.history["protection"]).all()
    if rank:
        save_adapter(pipeline, tmp_path)
        loaded = build(name)
        load_adapter(loaded, str(tmp_path))
    else:
        save_pipeline(pipeline, tmp_path)
        loaded = load(tmp_path)
        old, new = (getattr(made, row.denoiser).state_dict() for made in (base, loaded))
        owners = {key.rpartition(".")[0] for key in new if not torch.equal(old[key], new[key])}
        assert owners and all(any(f".{owner}".endswith(f".{target}") for target in row.targets) for owner in owners)
    drawn = [images_of(made) for made in (base, pipeline, loaded)]
    assert np.abs(drawn[1] - drawn[0]).max() > 1e-5
    np.testing.assert_allclose(drawn[2], drawn[1], atol=1e-4)


def images_of(pipeline):
    """Two images in two steps, with the arguments that the row gives the pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline, HiDreamImagePipeline):
        pipeline.default_sample_size = 8  # it scales every size to this one
    asked = sampling_arguments(pipeline, ["a photo of a red boot", "a sneaker"], 2.0)
    size = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    return pipeline(**asked, **size, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3_plain", "flux"])
def test_adapter_loads_and_merges(name, folders, tmp_path):
    output = tmp_path / "run"
    run_tiny(folders[name], output, rank=2, merge_adapter="true")
    pipeline = load(folders[name])
    assert ("text_encoder_3=None, tokenizer_3=None" in (output / "README.md").read_text()) == (name == "sd3_plain")
    before = sample(pipeline)
    pipeline.load_lora_weights(output)
    row = get_architecture(type(pipeline).__name__)
    network = getattr(pipeline, row.denoiser)
    with_adapter = {n for n, m in network.named_modules() if hasattr(m, "lora_A")}
    wanted = Barrier(getattr(build(name), row.denoiser), BarrierConfig(targets=list(row.targets), reduced_dim=2)).maps
    assert with_adapter == {entry.name for entry in wanted}
    adapted = sample(pipeline)
    assert np.abs(adapted - before).max() > 1e-5
    np.testing.assert_allclose(sample(load(output / "merged")), adapted, atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_half_precision_and_chosen_blocks(name, folders, tmp_path):
    blocks = {"sdxl": "[0, mid_block]", "sd3": "[1]", "flux": "[0, single_transformer_blocks.1]"}[name]
    targets = {"sdxl": "[attn2.to_k]", "sd3": "[attn.to_out.0, ff.net.0.proj]", "flux": "[to_q]"}[name]
    changes = {"barrier.blocks": blocks, "barrier.targets": targets, "mixed_precision": "bf16", "rank": 2}
    content = run_tiny(folders[name], tmp_path / "run", gradient_checkpointing="true", **changes)
    assert np.isfinite(content["history"]["protection"]).all()
    found = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    owners = {key.partition(".lora")[0].partition(".")[2] for key in found}
    expected = {
        "sdxl": {f"{block}.attn2.to_k" for block in
                 ("down_blocks.1.attentions.0.transformer_blocks.0", "mid_block.attentions.0.transformer_blocks.0",
                  "mid_block.attentions.0.transformer_blocks.1")},
        "sd3": {"transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.ff.net.0.proj"},
        "flux": {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_q"},
    }[name]  # fmt: skip
    assert owners == expected


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_half_precision_beside_full_weights(name, folders, tmp_path):
    content = run_tiny(folders[name], tmp_path / "run", mixed_precision="bf16")
    assert np.isfinite(content["history"]["objective"]).all()
    assert np.isfinite(sample(load(tmp_path / "run"))).all()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_samples_from_the_model_and_projection(name, folders, tmp_path):
    """ESD needs no forget image; at SDXL's keys and values prompts are all the retain statistics need."""
    settings = {"objective.name": "esd", "objective.num_inference_steps": 2, "objective.anchor": "null"}
    settings |= {"objective.alpha": 0, "barrier.constraint": "both", "barrier.projection_energy": 0.9}
    if name == "sdxl":
        settings |= {"barrier.targets": "[attn2.to_k,attn2.to_v]", "retain_statistics": "prompts"}
    content = run_tiny(folders[name], tmp_path / "run", **settings)
    assert min(content["history"]["objective"]) > 0 and np.isfinite(sample(load(tmp_path / "run"))).all()
    assert not list((tmp_path / "run" / "cache").glob("latents-*"))
    found = load_file(tmp_path / "run" / "barrier_projections.safetensors")
    assert all(0 < len(value.T) < len(value) for key, value in found.items() if key.endswith(".basis"))


def test_unknown_pipelines_and_files_are_refused_before_loading(folders, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ValueError, match="a KandinskyPipeline cannot be unlearned; known pipelines are"):
        load_pipeline(str(tmp_path / "other"))
    for name, message in {"model.ckpt": "may hold a pickle", "none.safetensors": "does not exist"}.items():
        with pytest.raises(ValueError, match=message):
            load_pipeline(str(tmp_path / name))
    with pytest.raises(ValueError, match="belong to a .safetensors file"):
        load_pipeline(str(folders["sd"]), pipeline_config="somewhere")
    with pytest.raises(ValueError, match="resolution is 34, but must be a multiple of 8"):
        run_tiny(folders["sd3"], tmp_path / "run", resolution=34)
