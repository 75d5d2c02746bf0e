"""The table of pipelines that can be unlearned: docs/add_an_architecture.md explains a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import ProcessorMixin

from barrier_diffusers.models.rows import (
    cross_attention,
    flux,
    flux2,
    joint_attention,
    single_stream,
    stable_diffusion,
    stable_diffusion_3,
)
from barrier_diffusers.models.rows.base import Architecture, Call, CallContext, Encode
from barrier_diffusers.utils.registry import Registry

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Call",
    "CallContext",
    "Encode",
    "components",
    "count_cut",
    "default_side",
    "get_architecture",
    "prompts_cut",
    "register_architecture",
    "sampling_arguments",
    "token_limits",
]

ARCHITECTURES: Registry[Architecture] = Registry("pipeline class")


def register_architecture(architecture: Architecture) -> Architecture:
    """Make a pipeline class known to every script and to `get_architecture`; returns the row.

    Raises:
        ValueError: the class has a row already.
    """
    return ARCHITECTURES.register(architecture)


for family in (stable_diffusion, stable_diffusion_3, flux, flux2, single_stream, cross_attention, joint_attention):
    for row in family.ROWS:
        register_architecture(row)


def get_architecture(class_name: str) -> Architecture:
    """The row of a pipeline class.

    Raises:
        ValueError: there is none; the message lists the known ones.
    """
    if class_name not in ARCHITECTURES:
        raise ValueError(f"a {class_name} cannot be unlearned; known pipelines are {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[class_name]


def components(pipeline: Any, prefix: str = "") -> dict[str, nn.Module]:
    """The pipeline's networks, those whose name starts with `prefix`, by name."""
    found = pipeline.components.items()
    return {name: part for name, part in found if isinstance(part, nn.Module) and name.startswith(prefix)}


def default_side(pipeline: Any) -> int | None:
    """Side in pixels of the images that a pipeline makes unless told another; None: its configuration is silent."""
    network = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    side = getattr(pipeline, "default_sample_size", None) or network.config.get("sample_size")
    return side * pipeline.vae_scale_factor if isinstance(side, int) else None


def sampling_arguments(pipeline: Any, prompts: Sequence[str], guidance_scale: float) -> dict[str, Any]:
    """Prompts and guidance scale by the names that this pipeline gives them, and what else it is to be told."""
    row = get_architecture(type(pipeline).__name__)
    return {"prompt": list(prompts), **row.sampling(guidance_scale, len(prompts))}


def prompts_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[bool]]:
    """Tokenizer -> whether each prompt is longer than what it keeps."""
    found, texts = {}, get_architecture(type(pipeline).__name__).texts(pipeline, prompts)
    for name, length in token_limits(pipeline).items():
        ids = text_tokenizer(pipeline, name)(texts, truncation=False).input_ids
        found[name] = [len(tokens) > length for tokens in ids]
    return found


def text_tokenizer(pipeline: Any, name: str) -> Any:
    """A tokenizer of the pipeline, or that of a processor, which reads images too."""
    tokenizer = getattr(pipeline, name)
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def token_limits(pipeline: Any) -> dict[str, int]:
    """Tokenizer -> tokens that it keeps, start and end included; without tokenizers that the pipeline lacks."""
    limits = get_architecture(type(pipeline).__name__).tokenizers.items()
    there = [(name, limit, getattr(pipeline, name)) for name, limit in limits]
    return {name: limit or tokenizer.model_max_length for name, limit, tokenizer in there if tokenizer is not None}


def count_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Tokenizer -> (prompts it cuts, tokens it keeps), for those that cut any."""
    limits = token_limits(pipeline)
    return {name: (sum(cut), limits[name]) for name, cut in prompts_cut(pipeline, prompts).items() if any(cut)}
