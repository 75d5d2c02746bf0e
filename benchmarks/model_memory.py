"""Memory that the denoiser of a model of real size takes in training, counted and not measured, for docs/models.md.

    python benchmarks/model_memory.py

Networks are built on the meta device, without weights, from the defaults of the installed diffusers and from what is
named here where the defaults are not the model's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from models import SDXL

from barrier_diffusers.models.architectures import get_architecture
from barrier_diffusers.protection.targets import resolve_targets

RANK = 16
GIB = 2**30


@dataclass(frozen=True)
class Model:
    """A network of real size."""

    name: str
    pipeline: str
    network: str  # its class in diffusers
    arguments: dict[str, Any] = field(default_factory=dict)  # that are not the class's defaults


KOLORS = {"encoder_hid_dim": 4096, "encoder_hid_dim_type": "text_proj", "projection_class_embeddings_input_dim": 5632}
SD3 = {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "qk_norm": "rms_norm"}
SD3_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}
COGVIEW4 = {"attention_head_dim": 128, "num_attention_heads": 32, "num_layers": 28}
HUNYUAN_DIT = {
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 128,
    "hidden_size": 1408,
    "num_layers": 40,
    "mlp_ratio": 4.3637,
}
HIDREAM = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
MODELS = (
    Model("Stable Diffusion 1.x", "StableDiffusionPipeline", "UNet2DConditionModel",
          {"cross_attention_dim": 768, "attention_head_dim": 8}),
    Model("SDXL", "StableDiffusionXLPipeline", "UNet2DConditionModel", SDXL),
    Model("Kolors", "KolorsPipeline", "UNet2DConditionModel", SDXL | KOLORS),
    Model("SD 3.5 large", "StableDiffusion3Pipeline", "SD3Transformer2DModel", SD3 | SD3_LARGE),
    Model("Flux.1 dev", "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}),
    Model("Chroma", "ChromaPipeline", "ChromaTransformer2DModel"),
    Model("Flux.2 dev", "Flux2Pipeline", "Flux2Transformer2DModel"),
    Model("Qwen-Image", "QwenImagePipeline", "QwenImageTransformer2DModel"),
    Model("Z-Image", "ZImagePipeline", "ZImageTransformer2DModel"),
    Model("Lumina 2", "Lumina2Pipeline", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    Model("CogView 4", "CogView4Pipeline", "CogView4Transformer2DModel", COGVIEW4),
    Model("PixArt-sigma", "PixArtSigmaPipeline", "PixArtTransformer2DModel", {"caption_channels": 4096}),
    Model("SANA 1.6B", "SanaPipeline", "SanaTransformer2DModel"),
    Model("Hunyuan-DiT", "HunyuanDiTPipeline", "HunyuanDiT2DModel", HUNYUAN_DIT),
    Model("AuraFlow", "AuraFlowPipeline", "AuraFlowTransformer2DModel"),
    Model("HunyuanImage 2.1", "HunyuanImagePipeline", "HunyuanImageTransformer2DModel", {"text_embed_2_dim": 1472}),
    Model("HiDream-I1", "HiDreamImagePipeline", "HiDreamImageTransformer2DModel", HIDREAM),
)  # fmt: skip


def counted(model: Model) -> str:
    """One line of the table."""
    row = get_architecture(model.pipeline)
    with torch.device("meta"):
        network = getattr(diffusers, model.network)(**model.arguments)
    total = sum(value.numel() for value in network.parameters())
    maps = resolve_targets(network, list(row.targets))
    trained = sum(value.numel() for linear_map in maps for value in linear_map.layer.parameters())
    factors = sum(RANK * sum(linear_map.layer.weight.shape) for linear_map in maps)
    full = 4 * total + (4 + 8 + 4) * trained  # weights; gradient, AdamW's two moments, the snapshot
    lora = 2 * total + (4 + 4 + 8) * factors  # weights in bfloat16; factors, gradient, moments
    adapter = f"{lora / GIB:.1f}" if row.has_adapters else "-"
    shares = f"{total / 1e9:.2f} | {len(maps)} | {100 * trained / total:.1f}"
    source = "named in the file" if model.arguments else "defaults"
    return f"| {model.name} | {shares} | {full / GIB:.1f} | {adapter} | {source} |"


if __name__ == "__main__":
    for item in MODELS:
        print(counted(item))
