"""Rows of the UNets: Stable Diffusion 1.x and 2.x, SDXL, Kolors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import KolorsPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from barrier_diffusers.models.original_layout import of_sdxl, of_stable_diffusion
from barrier_diffusers.models.rows.base import CROSS_ATTENTION, Architecture, CallContext
from barrier_diffusers.objectives.base import Condition


def unet_adapter(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's LoRA in the names that diffusers' own training scripts write."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


def encode_sd(pipeline: Any, prompts: list[str]) -> Condition:
    """The text encoder's last (normalised) states (P, L, D)."""
    embeddings, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeddings}


def call_sd(unet: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext) -> Tensor:
    """Forward pass of a UNet that reads the prompt by cross-attention."""
    return unet(noisy, timesteps, **condition).sample


def encode_sdxl(pipeline: Any, prompts: list[str]) -> Condition:
    """Two text encoders side by side (P, L, D), and the second one's pooled output (P, D)."""
    device = pipeline.text_encoder_2.device
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled}


def call_sdxl(unet: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext) -> Tensor:
    """A UNet that is also told the image's size, as an uncropped image of the size it is trained at."""
    height, width = (side * context.vae_scale_factor for side in noisy.shape[-2:])
    embeddings = condition["encoder_hidden_states"]
    sizes = torch.tensor([height, width, 0, 0, height, width], device=noisy.device, dtype=embeddings.dtype)
    added = {"text_embeds": condition["text_embeds"], "time_ids": sizes.expand(len(noisy), -1)}
    return unet(noisy, timesteps, embeddings, added_cond_kwargs=added).sample


def encode_kolors(pipeline: Any, prompts: list[str]) -> Condition:
    """ChatGLM's last state but one (P, L, D), and its last state of the last token (P, D)."""
    device = pipeline.text_encoder.device
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled}


def project_kolors(unet: Any, condition: Condition) -> Tensor:
    """The embeddings as narrow as cross-attention reads them."""
    return unet.encoder_hid_proj(condition["encoder_hidden_states"])


ROWS = (
    Architecture(
        pipeline_class=StableDiffusionPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sd,
        call=call_sd,
        adapter_layers=unet_adapter,
        original_layout=of_stable_diffusion,
    ),
    Architecture(
        pipeline_class=StableDiffusionXLPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sdxl,
        call=call_sdxl,
        tokenizers={"tokenizer": None, "tokenizer_2": None},
        adapter_layers=unet_adapter,
        original_layout=of_sdxl,
    ),
    Architecture(
        pipeline_class=KolorsPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_kolors,
        call=call_sdxl,
        tokenizers={"tokenizer": 256},
        adapter_layers=unet_adapter,
        prompt_input=project_kolors,
        aligned_tokens=False,
    ),
)
