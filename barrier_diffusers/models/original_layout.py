"""Weights of Stable Diffusion 1.x, 2.x and SDXL under the names of their first releases, as A1111 and ComfyUI read
them.

Only names and layouts change: queries, keys and values of an OpenCLIP text encoder lie in one tensor, its projection
is transposed, and the maps of the VAE's attention are 1 x 1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_MIDDLE = {"resnets.0": "middle_block.0", "attentions.0": "middle_block.1", "resnets.1": "middle_block.2"}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION = {name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")}
VAE_TOP = {name: name for name in ("conv_in", "conv_out")} | {"conv_norm_out": "norm_out"}
VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def renamed(name: str, table: Mapping[str, str]) -> str:
    """The name with its beginning exchanged as the table says.

    Raises:
        ValueError: the table has none of its beginnings.
    """
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    raise ValueError(f"the layout of the first release has no place for {name!r}")


def unet_name(name: str, layers: int, with_attention: Mapping[str, bool]) -> str:
    """A UNet's parameter under its original name.

    Input blocks count every resnet and downsampler in a row, output blocks every resnet; an upsampler shares the block
    of the last resnet of its level, behind the attention if there is one.

    Args:
        layers: resnets of a level of the encoder.
        with_attention: "up_blocks.I" -> whether that level has attention.
    """
    side, _, rest = name.partition(".")
    if side == "mid_block":
        kind, index, rest = rest.split(".", 2)
        tables = {"resnets": UNET_RESNET, "attentions": UNET_ATTENTION}
        return f"{renamed(f'{kind}.{index}', UNET_MIDDLE)}.{renamed(rest, tables[kind])}"
    if side not in ("down_blocks", "up_blocks"):
        return renamed(name, UNET_TOP)
    level, kind, index, rest = rest.split(".", 3)
    first = int(level) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + with_attention[f'{side}.{level}']}.{rest}"
    block = (
        f"input_blocks.{1 + first + int(index)}" if side == "down_blocks" else f"output_blocks.{first + int(index)}"
    )
    if kind == "resnets":
        return f"{block}.0.{renamed(rest, UNET_RESNET)}"
    if kind == "attentions":
        return f"{block}.1.{renamed(rest, UNET_ATTENTION)}"
    raise ValueError(f"the layout of the first release has no place for {name!r}")


def unet_weights(unet: Any) -> dict[str, Tensor]:
    """A UNet's weights under their original names."""
    weights = unet.state_dict()
    with_attention = {f"up_blocks.{level}": hasattr(block, "attentions") for level, block in enumerate(unet.up_blocks)}
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise ValueError(f"the UNet has {layers} layers on its levels; the first release has as many on each")
    return {unet_name(name, layers, with_attention): value for name, value in weights.items()}


def vae_name(name: str, levels: int) -> str:
    """A VAE's parameter under its original name: the decoder's levels are counted from the finest."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name
    side, part, rest = name.split(".", 2)
    if part == "mid_block":
        kind, index, rest = rest.split(".", 2)
        if kind == "attentions":
            return f"{side}.mid.attn_1.{renamed(rest, VAE_ATTENTION)}"
        return f"{side}.mid.block_{int(index) + 1}.{renamed(rest, VAE_RESNET)}"
    if part not in ("down_blocks", "up_blocks"):
        return f"{side}.{renamed(f'{part}.{rest}', VAE_TOP)}"
    level, kind, index, rest = rest.split(".", 3)
    place = f"{side}.down.{level}" if part == "down_blocks" else f"{side}.up.{levels - 1 - int(level)}"
    if kind == "resnets":
        return f"{place}.block.{index}.{renamed(rest, VAE_RESNET)}"
    if kind in ("downsamplers", "upsamplers"):
        return f"{place}.{kind.removesuffix('rs')}.{rest}"
    raise ValueError(f"the layout of the first release has no place for {name!r}")


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """A VAE's weights under their original names."""
    found = {}
    for name, value in vae.state_dict().items():
        new = vae_name(name, len(vae.config.block_out_channels))
        is_map = ".attn_1." in new and value.dim() == 2
        found[new] = value[:, :, None, None] if is_map else value
    return found


def text_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder's weights by the names that all versions of transformers share, from the text model on."""
    return {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}


def open_clip_weights(encoder: nn.Module) -> dict[str, Tensor]:
    """A CLIP text encoder's weights under OpenCLIP's names."""
    weights, found = text_weights(encoder), {}
    for name, value in weights.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            found[renamed(name, OPEN_CLIP_TOP)] = value.T if name == "text_projection.weight" else value
            continue
        layer, rest = f"transformer.resblocks.{match[1]}", match[2]
        joined = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
        if joined is None:
            found[f"{layer}.{renamed(rest, OPEN_CLIP_LAYER)}"] = value
        elif joined[1] == "q":
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{layer}.attn.in_proj_{joined[2]}"] = torch.cat(parts)
    return found


def prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with a prefix to their names."""
    return {prefix + name: value for name, value in weights.items()}


def of_image_networks(pipeline: Any) -> dict[str, Tensor]:
    """UNet and VAE of any pipeline here."""
    return prefixed("model.diffusion_model.", unet_weights(pipeline.unet)) | prefixed(
        "first_stage_model.", vae_weights(pipeline.vae)
    )


def of_stable_diffusion(pipeline: Any) -> dict[str, Tensor]:
    """Of version 1, whose text encoder is OpenAI's CLIP, or 2, whose is OpenCLIP: told apart by its activation."""
    encoder = pipeline.text_encoder
    if encoder.config.hidden_act == "quick_gelu":
        text = prefixed("cond_stage_model.transformer.text_model.", text_weights(encoder))
    else:
        text = prefixed("cond_stage_model.model.", open_clip_weights(encoder))
    return of_image_networks(pipeline) | text


def of_sdxl(pipeline: Any) -> dict[str, Tensor]:
    """Both text encoders; a velocity model has the two empty tensors by which ComfyUI knows one."""
    first = prefixed("conditioner.embedders.0.transformer.text_model.", text_weights(pipeline.text_encoder))
    second = prefixed("conditioner.embedders.1.model.", open_clip_weights(pipeline.text_encoder_2))
    config, marks = pipeline.scheduler.config, {}
    if config.get("prediction_type") == "v_prediction":
        marks = {"v_pred": torch.zeros(0)}
        if config.get("rescale_betas_zero_snr"):
            marks["ztsnr"] = torch.zeros(0)
    return of_image_networks(pipeline) | first | second | marks
