"""The networks of the benchmarks, with random weights, and batches for them; nothing is downloaded.

Shapes: B batch, L tokens, D embedding features.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

SD14 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {**SD14, "sample_size": 8, "block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 12}
TINY |= {"attention_head_dim": 2, "norm_num_groups": 4}
SMALL = {**SD14, "sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256}
SMALL |= {"attention_head_dim": 4}
SETTINGS: dict[str, dict[str, Any]] = {"sd14": SD14, "sdxl": SDXL, "small": SMALL, "tiny": TINY}
NUM_TOKENS = 77

ATTN2 = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]
TARGETS = {"attn2": ATTN2, "all": ["attn1.to_q", "attn1.to_k", "attn1.to_v", *ATTN2]}

Batch = dict[str, Any]


def settings_of(name: str) -> dict[str, Any]:
    """The UNet's configuration; ValueError for an unknown name."""
    if name not in SETTINGS:
        raise ValueError(f"model is {name!r}, but must be one of {', '.join(SETTINGS)}")
    return SETTINGS[name]


def build_unet(name: str, device: torch.device | str = "cpu") -> UNet2DConditionModel:
    """The UNet with random weights, the same at every call."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**settings_of(name)).to(device).eval()


def reduced_dim_of(name: str) -> int:
    """K: the paper's 32, or what the narrowest map of the tiny UNet has room for."""
    return 4 if name == "tiny" else 32


def add_lora(unet: UNet2DConditionModel, targets: list[str], rank: int) -> None:
    """A LoRA adapter on the targets, zero at the start."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))


def make_batches(
    name: str, num: int, size: int, side: int, device: torch.device | str = "cpu", num_prompts: int | None = None
) -> list[Batch]:
    """Batches of noise in place of latents (B, 4, side, side) and of text embeddings (B, L, D), with anchors.

    Args:
        num_prompts: how many different prompts there are, as in class-wise forgetting, where all images have one;
            None: another one for every image.
    """
    generator = torch.Generator().manual_seed(0)
    settings = settings_of(name)
    width, tokens = settings["cross_attention_dim"], NUM_TOKENS

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    prompts = draw(num_prompts, tokens, width) if num_prompts else None
    batches = []
    for index in range(num):
        rows = [(index * size + row) % num_prompts for row in range(size)] if num_prompts else []
        condition = {"encoder_hidden_states": draw(size, tokens, width) if prompts is None else prompts[rows]}
        anchor = {"encoder_hidden_states": draw(size, tokens, width)}
        if "addition_embed_type" in settings:
            added = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
            for prompt in (condition, anchor):
                prompt |= {"text_embeds": draw(size, added), "time_ids": torch.zeros(size, 6)}
        batch = {
            "noisy": draw(size, 4, side, side),
            "timesteps": torch.randint(1000, (size,), generator=generator),
            "target": draw(size, 4, side, side),
        }
        batch = {key: value.to(device) for key, value in batch.items()}
        for key, prompt in (("condition", condition), ("anchor", anchor)):
            batch[key] = {part: value.to(device) for part, value in prompt.items()}
        batches.append(batch)
    return batches


def predict(unet: nn.Module, noisy: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
    """The UNet's prediction, in float32 as accelerate gives it."""
    prompt = condition["encoder_hidden_states"]
    added = {key: value for key, value in condition.items() if key != "encoder_hidden_states"} or None
    return unet(noisy, timesteps, prompt, added_cond_kwargs=added).sample.float()


def forward(unet: nn.Module, batch: Batch) -> Tensor:
    """forward_fn of `Barrier.setup_protection`: one forward pass on the batch's own prompts."""
    return predict(unet, batch["noisy"], batch["timesteps"], batch["condition"])
