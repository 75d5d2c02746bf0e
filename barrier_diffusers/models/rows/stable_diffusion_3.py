"""Row of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from barrier_diffusers.models.noising import FlowNoising
from barrier_diffusers.models.rows.base import JOINT_ATTENTION, Architecture, CallContext
from barrier_diffusers.objectives.base import Condition


def encode_sd3(pipeline: Any, prompts: list[str]) -> Condition:
    """Two CLIP encoders and T5 (zeros where the pipeline has no T5), and the pooled outputs of the first two."""
    device = pipeline.text_encoder.device
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def call_sd3(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """A joint-attention transformer on unpacked latents."""
    return transformer(noisy, timestep=timesteps, **condition).sample


ROWS = (
    Architecture(
        pipeline_class=StableDiffusion3Pipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_sd3,
        call=call_sd3,
        noising=FlowNoising,
        tokenizers={"tokenizer": None, "tokenizer_2": None, "tokenizer_3": 256},
        optional=("text_encoder_3", "tokenizer_3"),
    ),
)
