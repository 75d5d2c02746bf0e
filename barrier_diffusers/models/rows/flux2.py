"""Rows of Flux.2: dev, whose text encoder is Mistral 3, and klein, whose text encoder is Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising
from barrier_diffusers.models.rows.base import JOINT_ATTENTION, Architecture, CallContext, guidance_of
from barrier_diffusers.objectives.base import Condition


def encode_flux2(pipeline: Any, prompts: list[str]) -> Condition:
    """Three layers' states of the language model side by side (P, L, 3 D)."""
    embeddings, _ = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device)
    return {"encoder_hidden_states": embeddings}


def position_ids(size: int, *lengths: int, device: torch.device) -> Tensor:
    """(B, tokens, 4) of tokens that stand on a grid of these lengths."""
    axes = [torch.arange(length, device=device) for length in lengths]
    return torch.cartesian_prod(*axes).expand(size, -1, -1)


def call_flux2(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """A transformer whose every token is one position of the patched latents."""
    embeddings, (size, _, height, width) = condition["encoder_hidden_states"], noisy.shape
    tokens = transformer(
        noisy.flatten(2).transpose(1, 2),
        timestep=timesteps / 1000,
        guidance=guidance_of(noisy, context),
        encoder_hidden_states=embeddings,
        txt_ids=position_ids(size, 1, 1, 1, embeddings.shape[1], device=noisy.device),
        img_ids=position_ids(size, 1, height, width, 1, device=noisy.device),
    ).sample
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def shift_of_50_steps(config: Any, latent_shape: tuple[int, int, int], tokens_side: int) -> float:
    """mu, which depends on the number of sampling steps too: that of the pipeline's own number of steps."""
    return compute_empirical_mu(latent_shape[1] * latent_shape[2], num_steps=50)


def texts_of_dev(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """The prompts as messages to Mistral, after the pipeline's system message."""
    messages = format_input(list(prompts), pipeline.system_message)
    return [pipeline.tokenizer.apply_chat_template(message, tokenize=False) for message in messages]


def texts_of_qwen3(pipeline: Any, prompts: Sequence[str], thinking: bool = False) -> list[str]:
    """The prompts as messages to Qwen3."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return [pipeline.tokenizer.apply_chat_template(message, **settings) for message in messages]


ROWS = (
    Architecture(
        pipeline_class=Flux2Pipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_flux2,
        call=call_flux2,
        noising=partial(FlowNoising, shift=shift_of_50_steps),
        tokenizers={"tokenizer": 512},
        texts=texts_of_dev,
    ),
    Architecture(
        pipeline_class=Flux2KleinPipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_flux2,
        call=call_flux2,
        noising=partial(FlowNoising, shift=shift_of_50_steps),
        tokenizers={"tokenizer": 512},
        texts=texts_of_qwen3,
    ),
)
