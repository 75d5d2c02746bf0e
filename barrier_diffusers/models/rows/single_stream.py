"""Rows of transformers whose attention reads text and image tokens in one sequence: Z-Image, Lumina 2, CogView 4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import CogView4Pipeline, Lumina2Pipeline, ZImagePipeline
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising, shift_by_tokens
from barrier_diffusers.models.rows.base import (
    Architecture,
    CallContext,
    both_streams,
    encode_masked,
    padded,
    real_lengths,
    split_prompts,
)
from barrier_diffusers.models.rows.flux2 import texts_of_qwen3
from barrier_diffusers.objectives.base import Condition


def encode_z_image(pipeline: Any, prompts: list[str]) -> Condition:
    """Qwen3's last state but one of each prompt's own tokens, padded to the longest of these prompts."""
    device = pipeline.text_encoder.device
    embeddings, _ = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    return padded(embeddings)


def call_z_image(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Lists of images with one frame and of prompts without padding; time runs from noise to image, and so does the
    velocity that comes out."""
    images = list(noisy.unsqueeze(2).unbind(0))
    predicted = transformer(images, (1000 - timesteps) / 1000, split_prompts(condition)).sample
    return -torch.stack(list(predicted)).squeeze(2)


def call_lumina2(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """Time runs from noise to image, and so does the velocity that comes out."""
    return -transformer(
        noisy,
        timestep=1 - timesteps / 1000,
        encoder_hidden_states=condition["encoder_hidden_states"],
        encoder_attention_mask=condition["encoder_attention_mask"].long(),
    ).sample


def shift_by_channels(config: Any, latent_shape: tuple[int, int, int], tokens_side: int) -> float:
    """mu as Lumina 2's pipeline makes it, which takes the latents' channels for the number of tokens."""
    return shift_by_tokens(config, (latent_shape[1], latent_shape[0], 1), 1)


def texts_of_lumina2(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts after the pipeline's system prompt."""
    return [f"{pipeline.system_prompt} <Prompt Start> {prompt}" for prompt in prompts]


def encode_cogview4(pipeline: Any, prompts: list[str]) -> Condition:
    """GLM's last state but one, of each prompt as if it were asked alone: GLM is told of no padding, and the pipeline
    pads to a multiple of 16 tokens and to the longest prompt of a batch."""
    device = pipeline.text_encoder.device
    return padded([pipeline.encode_prompt(prompt, None, False, device=device)[0][0] for prompt in prompts])


def call_cogview4(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """The image's size as of an uncropped image; one forward pass for each length of prompt in the batch, as the
    pipeline gives the transformer no mask."""
    height, width = (side * context.vae_scale_factor for side in noisy.shape[-2:])
    embeddings, lengths = condition["encoder_hidden_states"], torch.tensor(real_lengths(condition))
    order, predicted = lengths.argsort(stable=True), []
    for length in lengths.unique().tolist():
        rows = order[lengths[order] == length].to(noisy.device)
        size = torch.tensor([[height, width]], device=noisy.device, dtype=embeddings.dtype).expand(len(rows), -1)
        predicted.append(
            transformer(
                noisy[rows],
                encoder_hidden_states=embeddings[rows, :length],
                timestep=timesteps[rows],
                original_size=size,
                target_size=size,
                crop_coords=torch.zeros_like(size),
            ).sample
        )
    return torch.cat(predicted)[order.argsort().to(noisy.device)]


def shift_by_root(config: Any, latent_shape: tuple[int, int, int], tokens_side: int) -> float:
    """mu of CogView 4, linear in the square root of the number of image tokens."""
    num_tokens = latent_shape[1] * latent_shape[2] // tokens_side**2
    return calculate_shift(
        num_tokens,
        base_seq_len=config.get("base_image_seq_len", 256),
        base_shift=config.get("base_shift", 0.25),
        max_shift=config.get("max_shift", 0.75),
    )


ROWS = (
    Architecture(
        pipeline_class=ZImagePipeline,
        denoiser="transformer",
        targets=both_streams("attention"),
        encode=encode_z_image,
        call=call_z_image,
        noising=FlowNoising,
        tokenizers={"tokenizer": 512},
        packing=2,
        texts=partial(texts_of_qwen3, thinking=True),
    ),
    Architecture(
        pipeline_class=Lumina2Pipeline,
        denoiser="transformer",
        targets=both_streams("attn"),
        encode=encode_masked,
        call=call_lumina2,
        noising=partial(FlowNoising, shift=shift_by_channels),
        tokenizers={"tokenizer": 256},
        texts=texts_of_lumina2,
    ),
    Architecture(
        pipeline_class=CogView4Pipeline,
        denoiser="transformer",
        targets=both_streams("attn1"),
        encode=encode_cogview4,
        call=call_cogview4,
        noising=partial(FlowNoising, shift=shift_by_root, shifted_timesteps=False),
        tokenizers={"tokenizer": 1024},
    ),
)
