"""The pipelines that can be unlearned, one table row each: docs/add_an_architecture.md explains a row.

Shapes: B batch, P prompts, c latent channels, h and w latent side, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from barrier_diffusers.models.noising import DiffusionNoising, FlowNoising, MakeNoising
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.utils.registry import Registry


@dataclass(frozen=True)
class CallContext:
    """What a denoiser's call needs to know beside latents and prompt."""

    vae_scale_factor: int  # pixels per latent position and side
    guidance: float | None  # fed to a network with a guidance embedding (Flux dev); None: it has none


Encode = Callable[[Any, list[str]], Condition]


Call = Callable[[nn.Module, Tensor, Tensor, Condition, CallContext], Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row: all that training has to know about a pipeline class."""

    pipeline_class: type[Any]
    denoiser: str  # name of the component that is trained
    targets: Mapping[str, str]  # maps trained by default -> what they read: image, prompt, or the text stream
    encode: Encode  # (pipeline, prompts) -> condition, every tensor with one row per prompt (P, ...)
    call: Call  # (denoiser, noisy, timesteps, condition, context) -> prediction (B, c, h, w)
    noising: MakeNoising = DiffusionNoising
    tokenizers: Mapping[str, int | None] = field(  # component -> tokens it is cut to; None: the tokenizer's own length
        default_factory=lambda: {"tokenizer": None}
    )
    adapter_layers: Callable[[nn.Module], dict[str, Tensor]] = get_peft_model_state_dict  # as save_lora_weights takes
    optional: tuple[str, ...] = ()  # components that may be absent, though the pipeline class insists on None then
    packing: int = 1  # side of the square of latent positions that the pipeline packs into one before the denoiser

    @property
    def name(self) -> str:
        """The pipeline's class name, as `model_index.json` says it."""
        return self.pipeline_class.__name__


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


def encode_flux(pipeline: Any, prompts: list[str]) -> Condition:
    """T5's states (P, L, D) and CLIP's pooled output (P, D)."""
    embeddings, pooled, _ = pipeline.encode_prompt(prompts, device=pipeline.text_encoder.device)
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def pack(latents: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, h/2 * w/2, 4 c): each 2 x 2 square of positions is one token."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of this size."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def image_ids(height: int, width: int, like: Tensor) -> Tensor:
    """(h/2 * w/2, 3): 0, row and column of every packed position."""
    sides = [torch.arange(side // 2).to(like) for side in (height, width)]
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def call_flux(
    transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, context: CallContext
) -> Tensor:
    """A transformer on packed latents, told the tokens' positions, the time in [0, 1] and any embedded guidance."""
    embeddings = condition["encoder_hidden_states"]
    height, width = noisy.shape[-2:]
    guidance = None if context.guidance is None else torch.full((len(noisy),), context.guidance, device=noisy.device)
    tokens = transformer(
        pack(noisy),
        timestep=timesteps / 1000,
        guidance=guidance,
        txt_ids=torch.zeros(embeddings.shape[1], 3, device=noisy.device, dtype=embeddings.dtype),
        img_ids=image_ids(height, width, embeddings),
        **condition,
    ).sample
    return unpack(tokens, height, width)


CROSS_ATTENTION = {"attn2.to_q": "image", "attn2.to_k": "prompt", "attn2.to_v": "prompt"}


JOINT_ATTENTION = {f"attn.add_{letter}_proj": "text stream" for letter in "qkv"}


ARCHITECTURES: Registry[Architecture] = Registry("pipeline class")


def register_architecture(architecture: Architecture) -> Architecture:
    """Make a pipeline class known to every script and to `get_architecture`; returns the row.

    Raises:
        ValueError: the class has a row already.
    """
    return ARCHITECTURES.register(architecture)


register_architecture(
    Architecture(
        pipeline_class=StableDiffusionPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sd,
        call=call_sd,
        adapter_layers=unet_adapter,
    )
)


register_architecture(
    Architecture(
        pipeline_class=StableDiffusionXLPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sdxl,
        call=call_sdxl,
        tokenizers={"tokenizer": None, "tokenizer_2": None},
        adapter_layers=unet_adapter,
    )
)


register_architecture(
    Architecture(
        pipeline_class=StableDiffusion3Pipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_sd3,
        call=call_sd3,
        noising=FlowNoising,
        tokenizers={"tokenizer": None, "tokenizer_2": None, "tokenizer_3": 256},
        optional=("text_encoder_3", "tokenizer_3"),
    )
)


register_architecture(
    Architecture(
        pipeline_class=FluxPipeline,
        denoiser="transformer",
        targets=JOINT_ATTENTION,
        encode=encode_flux,
        call=call_flux,
        noising=FlowNoising,
        tokenizers={"tokenizer": None, "tokenizer_2": 512},
        packing=2,
    )
)


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


def prompts_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[bool]]:
    """Tokenizer -> whether each prompt is longer than what it keeps."""
    found = {}
    for name, length in token_limits(pipeline).items():
        ids = getattr(pipeline, name)(list(prompts), truncation=False).input_ids
        found[name] = [len(tokens) > length for tokens in ids]
    return found


def token_limits(pipeline: Any) -> dict[str, int]:
    """Tokenizer -> tokens that it keeps, start and end included; without tokenizers that the pipeline lacks."""
    limits = get_architecture(type(pipeline).__name__).tokenizers.items()
    there = [(name, limit, getattr(pipeline, name)) for name, limit in limits]
    return {name: limit or tokenizer.model_max_length for name, limit, tokenizer in there if tokenizer is not None}


def count_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Tokenizer -> (prompts it cuts, tokens it keeps), for those that cut any."""
    limits = token_limits(pipeline)
    return {name: (sum(cut), limits[name]) for name, cut in prompts_cut(pipeline, prompts).items() if any(cut)}
