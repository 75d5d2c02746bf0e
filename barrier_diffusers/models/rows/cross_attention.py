"""Rows of transformers that read the prompt by cross-attention: PixArt-alpha, PixArt-sigma, SANA, Hunyuan-DiT."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from diffusers import HunyuanDiTPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, SanaPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising
from barrier_diffusers.models.rows.base import (
    CROSS_ATTENTION,
    Architecture,
    CallContext,
    encode_masked,
    without_bins,
)
from barrier_diffusers.objectives.base import Condition


def cleans_captions() -> bool:
    """Whether the packages are installed with which a PixArt pipeline cleans its prompts; it does without, with a
    warning."""
    return is_bs4_available() and is_ftfy_available()


def encode_pixart(pipeline: Any, prompts: list[str], max_length: int) -> Condition:
    """T5's states (P, L, D) of cleaned prompts, and a mask (P, L)."""
    return encode_masked(pipeline, prompts, clean_caption=cleans_captions(), max_sequence_length=max_length)


def sampling_of_pixart(scale: float, num_prompts: int) -> dict[str, Any]:
    """Images of the size that is asked for, of prompts that are cleaned as they are for training."""
    return without_bins(scale, num_prompts) | {"clean_caption": cleans_captions()}


def call_pixart(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """PixArt-alpha at 1024 pixels is told size and aspect ratio; of what comes out, the first half is the noise."""
    height, width = (side * context.vae_scale_factor for side in noisy.shape[-2:])
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    told = context.config.get("use_additional_conditions")
    if context.config["sample_size"] == 128 if told is None else told:
        embeddings = condition["encoder_hidden_states"]
        size = torch.tensor([height, width], device=noisy.device, dtype=embeddings.dtype)
        ratio = torch.tensor([height / width], device=noisy.device, dtype=embeddings.dtype)
        added = {"resolution": size.repeat(len(noisy), 1), "aspect_ratio": ratio.repeat(len(noisy), 1)}
    predicted = transformer(
        noisy,
        encoder_hidden_states=condition["encoder_hidden_states"],
        encoder_attention_mask=condition["encoder_attention_mask"].long(),
        timestep=timesteps,
        added_cond_kwargs=added,
    ).sample
    return predicted[:, : noisy.shape[1]]


def project_pixart(transformer: Any, condition: Condition) -> Tensor:
    """The embeddings as wide as cross-attention reads them."""
    return transformer.caption_projection(condition["encoder_hidden_states"])


def encode_sana(pipeline: Any, prompts: list[str]) -> Condition:
    """Gemma's states (P, L, D) of the prompt after the pipeline's instruction, which is cut off, and a mask (P, L)."""
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return encode_masked(pipeline, prompts, complex_human_instruction=instruction)


def call_sana(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Latents of a deep-compression VAE, one token each."""
    predicted = transformer(
        noisy,
        encoder_hidden_states=condition["encoder_hidden_states"],
        encoder_attention_mask=condition["encoder_attention_mask"].long(),
        timestep=timesteps * context.config["timestep_scale"],
    ).sample
    return predicted[:, : noisy.shape[1]]


def project_sana(transformer: Any, condition: Condition) -> Tensor:
    """The embeddings as cross-attention reads them, projected and normalised."""
    return transformer.caption_norm(transformer.caption_projection(condition["encoder_hidden_states"]))


def encode_hunyuan_dit(pipeline: Any, prompts: list[str]) -> Condition:
    """States and masks of a Chinese CLIP (P, 77, D) and of T5 (P, 256, D)."""
    settings = {"device": pipeline.text_encoder.device, "do_classifier_free_guidance": False}
    first, _, mask, _ = pipeline.encode_prompt(prompts, max_sequence_length=77, text_encoder_index=0, **settings)
    second, _, mask_2, _ = pipeline.encode_prompt(prompts, max_sequence_length=256, text_encoder_index=1, **settings)
    return {
        "encoder_hidden_states": first,
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": second,
        "text_embedding_mask_t5": mask_2,
    }


def call_hunyuan_dit(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Told an original size of 1024 pixels, as the pipeline does, and the first style; half of the output counts."""
    height, width = (side * context.vae_scale_factor for side in noisy.shape[-2:])
    patch = context.config["patch_size"]
    grid = (noisy.shape[-2] // patch, noisy.shape[-1] // patch)
    embeddings, device = condition["encoder_hidden_states"], noisy.device
    sizes = torch.tensor([1024, 1024, height, width, 0, 0], device=device, dtype=embeddings.dtype)
    rotary = get_2d_rotary_pos_embed(
        context.config["attention_head_dim"],
        get_resize_crop_region_for_grid(grid, 512 // 8 // patch),
        grid,
        device=device,
        output_type="pt",
    )
    predicted = transformer(
        noisy,
        timesteps.to(noisy.dtype),
        encoder_hidden_states=embeddings,
        text_embedding_mask=condition["text_embedding_mask"].long(),
        encoder_hidden_states_t5=condition["encoder_hidden_states_t5"],
        text_embedding_mask_t5=condition["text_embedding_mask_t5"].long(),
        image_meta_size=sizes.repeat(len(noisy), 1),
        style=torch.zeros(len(noisy), dtype=torch.long, device=device),
        image_rotary_emb=rotary,
    ).sample
    return predicted[:, : noisy.shape[1]]


def join_hunyuan_dit(transformer: Any, condition: Condition) -> Tensor:
    """Both encoders' tokens one after the other, T5's projected, padding exchanged for a learned embedding."""
    second = transformer.text_embedder(condition["encoder_hidden_states_t5"])
    joined = torch.cat([condition["encoder_hidden_states"], second], dim=1)
    mask = torch.cat([condition["text_embedding_mask"], condition["text_embedding_mask_t5"]], dim=1)
    return torch.where(mask.unsqueeze(2).bool(), joined, transformer.text_embedding_padding)


ROWS = (
    Architecture(
        pipeline_class=PixArtAlphaPipeline,
        denoiser="transformer",
        targets=CROSS_ATTENTION,
        encode=partial(encode_pixart, max_length=120),
        call=call_pixart,
        tokenizers={"tokenizer": 120},
        prompt_input=project_pixart,
        sampling=sampling_of_pixart,
    ),
    Architecture(
        pipeline_class=PixArtSigmaPipeline,
        denoiser="transformer",
        targets=CROSS_ATTENTION,
        encode=partial(encode_pixart, max_length=300),
        call=call_pixart,
        tokenizers={"tokenizer": 300},
        prompt_input=project_pixart,
        sampling=sampling_of_pixart,
    ),
    Architecture(
        pipeline_class=SanaPipeline,
        denoiser="transformer",
        targets=CROSS_ATTENTION,
        encode=encode_sana,
        call=call_sana,
        noising=FlowNoising,
        tokenizers={"tokenizer": 300},
        prompt_input=project_sana,
        aligned_tokens=False,
        sampling=without_bins,
    ),
    Architecture(
        pipeline_class=HunyuanDiTPipeline,
        denoiser="transformer",
        targets=CROSS_ATTENTION,
        encode=encode_hunyuan_dit,
        call=call_hunyuan_dit,
        tokenizers={"tokenizer": 77, "tokenizer_2": 256},
        prompt_input=join_hunyuan_dit,
        aligned_tokens=False,
        sampling=without_bins,
    ),
)
