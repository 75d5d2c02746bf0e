"""A Stable Diffusion checkpoint in one file, in the layout of its first release.

diffusers converts from that layout but not to it, so the names are translated here, by hand, from the layout itself;
that the library reads every weight of the file back to where it was says that the translation is right.
"""

import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tiny_encoders import FASHION

from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

from unlearn_sd import main

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(name, table):
    for old, new in table.items():
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def unet_name(name, layers):
    """Encoder blocks count every resnet and downsampler in a row, decoder blocks every resnet; layers: per level."""
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
    if match is None:
        top = renamed(name, UNET_TOP)
        stem, _, rest = top.partition(".")
        index, _, rest = rest.partition(".")
        is_resnet = stem == "middle_block" and index in "02"
        return f"{stem}.{index}.{renamed(rest, UNET_RESNET)}" if is_resnet else top
    side, level, kind, index, rest = match.groups()
    if side == "down":
        position = 1 + int(level) * (layers + 1) + (layers if kind == "downsamplers" else int(index))
        place = f"input_blocks.{position}"
    else:
        position = int(level) * (layers + 1) + (layers if kind == "upsamplers" else int(index))
        place = f"output_blocks.{position}"
    if kind == "resnets":
        return f"{place}.0.{renamed(rest, UNET_RESNET)}"
    if kind == "attentions":
        return f"{place}.1.{rest}"
    return f"{place}.0.op.{rest.removeprefix('conv.')}" if kind == "downsamplers" else f"{place}.2.{rest}"


def vae_name(name, levels):
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    side, attention, rest = name.partition("mid_block.attentions.0.")
    return f"{side}mid.attn_1.{renamed(rest, VAE_ATTENTION)}" if attention else name


def single_file_weights(pipeline):
    """The pipeline's weights under the names of the first release; the VAE's attention maps are 1x1 convolutions."""
    weights = {}
    for name, value in pipeline.unet.state_dict().items():
        new = unet_name(name, pipeline.unet.config.layers_per_block)
        weights[f"model.diffusion_model.{new}"] = value
    for name, value in pipeline.vae.state_dict().items():
        new = vae_name(name, len(pipeline.vae.config.block_out_channels))
        is_map = ".attn_1." in new and not new.endswith(("norm.weight", "bias"))
        weights[f"first_stage_model.{new}"] = value[:, :, None, None] if is_map else value
    for name, value in pipeline.text_encoder.state_dict().items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    return {name: value.contiguous() for name, value in weights.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pipeline = StableDiffusionPipeline.from_pretrained(FASHION, dtype=torch.float32)
    path = tmp_path_factory.mktemp("single") / "fashion.safetensors"
    save_file(single_file_weights(pipeline), path)
    return pipeline, path


def test_every_weight_arrives(checkpoint):
    pipeline, path = checkpoint
    loaded = load_pipeline(str(path), pipeline_config=str(FASHION), dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.float32 and loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    loaded = load_pipeline(str(path), pipeline_config=str(FASHION))
    for part in ("unet", "vae", "text_encoder"):
        wanted, got = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert set(got) == set(wanted)
        assert all(torch.equal(got[name], value) for name, value in wanted.items()), part


def test_without_configuration_and_network_the_error_says_what_to_do(checkpoint):
    with pytest.raises(OSError, match="set pipeline_config to a folder"):  # conftest.py switches the hub off
        load_pipeline(str(checkpoint[1]))


def test_the_script_takes_it_and_saves_a_pipeline_folder(checkpoint, tmp_path):
    _, path = checkpoint
    settings = {
        "pretrained_model_name_or_path": path,
        "pipeline_config": FASHION,
        "output_dir": tmp_path / "run",
        "concept": "boot",
        "forget_prompts": '["a photo of a red boot"]',
        "num_generated_images": 2,
        "generation.num_inference_steps": 2,
        "evaluation.sampling.num_inference_steps": 2,
        "evaluation.images_per_label": 1,
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "report_to": "none",
        "objective.anchor": "sneaker",
        "barrier.reduced_dim": 4,
    }
    main(parse_config(UnlearnConfig, [word for key, value in settings.items() for word in (f"--{key}", str(value))]))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a photo of a red boot", num_inference_steps=2).images[0].size == (32, 32)
