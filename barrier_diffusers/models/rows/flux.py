"""Rows of transformers on packed latents: Flux (dev, schnell), Chroma, Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ChromaPipeline, FluxPipeline, QwenImagePipeline
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising
from barrier_diffusers.models.rows.base import (
    JOINT_ATTENTION,
    Architecture,
    CallContext,
    guidance_of,
    pack,
    real_lengths,
    unpack,
)
from barrier_diffusers.objectives.base import Condition


def encode_flux(pipeline: Any, prompts: list[str]) -> Condition:
    """T5's states (P, L, D) and CLIP's pooled output (P, D)."""
    embeddings, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """(h/2 * w/2, 3): 0, row and column of every packed position."""
    sides = [torch.arange(side // 2).to(like) for side in (height, width)]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def token_ids(noisy: Tensor, embeddings: Tensor) -> dict[str, Tensor]:
    """Where the text and image tokens stand, as Flux and Chroma are told."""
    text = torch.zeros(embeddings.shape[1], 3, device=noisy.device, dtype=embeddings.dtype)
    return {"txt_ids": text, "img_ids": image_ids(noisy.shape[-2], noisy.shape[-1], embeddings)}


def call_flux(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """A transformer on packed latents, told the tokens' positions, the time in [0, 1] and any embedded guidance."""
    tokens = transformer(
        pack(noisy),
        timestep=timesteps / 1000,
        guidance=guidance_of(noisy, context),
        **token_ids(noisy, condition["encoder_hidden_states"]),
        **condition,
    ).sample
    return unpack(tokens, noisy.shape[-2], noisy.shape[-1])


def encode_chroma(pipeline: Any, prompts: list[str]) -> Condition:
    """T5's states (P, L, D), and a mask (P, L) of the tokens up to the first of the padding."""
    device = pipeline.text_encoder.device
    embeddings, _, mask, *_ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


def call_chroma(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Flux's call without a guidance, with a mask over text and image tokens."""
    embeddings, packed = condition["encoder_hidden_states"], pack(noisy)
    mask = F.pad(condition["encoder_attention_mask"].to(embeddings.dtype), (0, packed.shape[1]), value=1.0)
    tokens = transformer(
        packed,
        timestep=timesteps / 1000,
        encoder_hidden_states=embeddings,
        attention_mask=mask,
        **token_ids(noisy, embeddings),
    ).sample
    return unpack(tokens, noisy.shape[-2], noisy.shape[-1])


def encode_qwen_image(pipeline: Any, prompts: list[str]) -> Condition:
    """Qwen2.5-VL's states (P, L, D) of the prompt and what follows it in the template, up to the longest of these
    prompts, and a mask (P, L)."""
    device = pipeline.text_encoder.device
    embeddings, mask = pipeline.encode_prompt(prompts, device=device, max_sequence_length=512)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=device) if mask is None else mask
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}


def call_qwen_image(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Flux's call, with the image's shape in tokens, and a mask where the prompts of a batch differ in length."""
    height, width = (side // 2 for side in noisy.shape[-2:])
    lengths = real_lengths(condition)
    longest = max(lengths)
    mask = condition["encoder_attention_mask"][:, :longest].long() if min(lengths) < longest else None
    tokens = transformer(
        pack(noisy),
        timestep=timesteps / 1000,
        guidance=guidance_of(noisy, context),
        encoder_hidden_states=condition["encoder_hidden_states"][:, :longest],
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, height, width)]] * len(noisy),
    ).sample
    return unpack(tokens, noisy.shape[-2], noisy.shape[-1])


def texts_of_qwen(pipeline: Any, prompts: Any) -> list[str]:
    """The prompts in the pipeline's template."""
    return [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]


def true_guidance(scale: float, num_prompts: int) -> dict[str, Any]:
    """Classifier-free guidance against the empty prompt, which the pipeline wants to be given."""
    return {"true_cfg_scale": scale, "negative_prompt": [""] * num_prompts} if scale > 1 else {"true_cfg_scale": 1.0}


ROWS = (
    Architecture(
        pipeline_class=FluxPipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_flux,
        call=call_flux,
        noising=FlowNoising,
        tokenizers={"tokenizer": None, "tokenizer_2": 512},
        packing=2,
    ),
    Architecture(
        pipeline_class=ChromaPipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_chroma,
        call=call_chroma,
        noising=FlowNoising,
        tokenizers={"tokenizer": 512},
        packing=2,
    ),
    Architecture(
        pipeline_class=QwenImagePipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_qwen_image,
        call=call_qwen_image,
        noising=FlowNoising,
        tokenizers={"tokenizer": 512 + 34},
        texts=texts_of_qwen,
        sampling=true_guidance,
    ),
)
