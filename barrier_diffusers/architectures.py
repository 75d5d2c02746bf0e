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

from barrier_diffusers.noising import (
    DiffusionNoising,
    FlowNoising,
    MakeNoising,
    Noised,
    latent_normalisation,
    sample_latents,
)
from barrier_diffusers.objectives.base import Condition


@dataclass(frozen=True)
class Facts:
    """What a denoiser's call needs to know beside latents and prompt."""

    vae_scale_factor: int  # pixels per latent position and side
    guidance: float | None  # fed to a network with a guidance embedding (Flux dev); None: it has none


Encode = Callable[[Any, list[str]], Condition]
Call = Callable[[nn.Module, Tensor, Tensor, Condition, Facts], Tensor]


@dataclass(frozen=True)
class Architecture:
    """One row: all that training has to know about a pipeline class."""

    pipeline_class: type[Any]
    denoiser: str  # name of the component that is trained
    targets: Mapping[str, str]  # maps trained by default -> what they read: image, prompt, or the text stream
    encode: Encode  # (pipeline, prompts) -> condition, every tensor with one row per prompt (P, ...)
    call: Call  # (denoiser, noisy, timesteps, condition, facts) -> prediction (B, c, h, w)
    noising: MakeNoising = DiffusionNoising
    tokenizers: Mapping[str, int | None] = field(  # component -> tokens it is cut to; None: the tokenizer's own length
        default_factory=lambda: {"tokenizer": None}
    )
    adapter_layers: Callable[[nn.Module], dict[str, Tensor]] = get_peft_model_state_dict  # as save_lora_weights takes
    optional: tuple[str, ...] = ()  # components that may be absent, though the pipeline class insists on None then
    packing: int = 1  # side of the square of latent positions that the pipeline packs into one before the denoiser


def unet_adapter(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's LoRA in the names that diffusers' own training scripts write."""
    return convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))


def encode_sd(pipeline: Any, prompts: list[str]) -> Condition:
    """The text encoder's last (normalised) states (P, L, D)."""
    embeddings, _ = pipeline.encode_prompt(prompts, pipeline.text_encoder.device, 1, False)
    return {"encoder_hidden_states": embeddings}


def call_sd(unet: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, facts: Facts) -> Tensor:
    """A cross-attention UNet."""
    return unet(noisy, timesteps, **condition).sample


def encode_sdxl(pipeline: Any, prompts: list[str]) -> Condition:
    """Two text encoders side by side (P, L, D), and the second one's pooled output (P, D)."""
    device = pipeline.text_encoder_2.device
    embeddings, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled}


def call_sdxl(unet: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, facts: Facts) -> Tensor:
    """A UNet that is also told the image's size, as an uncropped image of the size it is trained at."""
    height, width = (side * facts.vae_scale_factor for side in noisy.shape[-2:])
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


def call_sd3(transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, facts: Facts) -> Tensor:
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
    places = [torch.arange(side // 2).to(like) for side in (height, width)]
    rows, columns = torch.meshgrid(*places, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def call_flux(transformer: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition, facts: Facts) -> Tensor:
    """A transformer on packed latents, told the tokens' places, the time in [0, 1] and, if distilled, the guidance."""
    embeddings = condition["encoder_hidden_states"]
    height, width = noisy.shape[-2:]
    guidance = None if facts.guidance is None else torch.full((len(noisy),), facts.guidance, device=noisy.device)
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

ROWS = (
    Architecture(
        pipeline_class=StableDiffusionPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sd,
        call=call_sd,
        adapter_layers=unet_adapter,
    ),
    Architecture(
        pipeline_class=StableDiffusionXLPipeline,
        denoiser="unet",
        targets=CROSS_ATTENTION,
        encode=encode_sdxl,
        call=call_sdxl,
        tokenizers={"tokenizer": None, "tokenizer_2": None},
        adapter_layers=unet_adapter,
    ),
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
)
ARCHITECTURES = {row.pipeline_class.__name__: row for row in ROWS}


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


class Diffusion:
    """A loaded pipeline as training sees it: its row bound to its VAE, scheduler and denoiser.

    Args:
        pipeline: of a class in the table.
        guidance_scale: fed to a denoiser with a guidance embedding.

    Raises:
        ValueError: a pipeline class without a row, or a prediction type that nothing here trains.
    """

    def __init__(self, pipeline: Any, guidance_scale: float = 3.5):
        self.architecture = get_architecture(type(pipeline).__name__)
        self.denoiser: Any = getattr(pipeline, self.architecture.denoiser)
        config = self.denoiser.config
        guidance = guidance_scale if config.get("guidance_embeds") else None
        self.facts = Facts(pipeline.vae_scale_factor, guidance)
        self.shift, self.scale = latent_normalisation(pipeline.vae)
        self.latent_channels: int = pipeline.vae.config.latent_channels
        self.tokens_side = self.architecture.packing * (config.get("patch_size") or 1)
        self.noising = self.architecture.noising(pipeline.scheduler, self.tokens_side)

    def check_resolution(self, resolution: int) -> None:
        """A ValueError if images of this side cannot be cut into whole latent positions and tokens."""
        unit = self.facts.vae_scale_factor * self.tokens_side
        if resolution % unit:
            name = self.architecture.pipeline_class.__name__
            raise ValueError(f"resolution is {resolution}, but must be a multiple of {unit} for this {name}")

    def check_text_encoder(self, pipeline: Any) -> None:
        """A ValueError if the prompts' embeddings are not as wide as the denoiser's attention reads them."""
        config = self.denoiser.config
        wanted = config.get("cross_attention_dim") or config.get("joint_attention_dim")
        with torch.no_grad():
            embeddings = self.architecture.encode(pipeline, [""]).get("encoder_hidden_states")
        if isinstance(wanted, int) and embeddings is not None and embeddings.shape[-1] != wanted:
            raise ValueError(
                f"the text encoder gives {embeddings.shape[-1]} features per token, but the denoiser reads {wanted}: "
                "they do not belong together; take both from one pipeline"
            )

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images."""
        side = resolution // self.facts.vae_scale_factor
        return self.latent_channels, side, side

    def noised(self, moments: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Latents drawn from cached posteriors (B, 2 c, h, w), and noise and timesteps for them, in this order."""
        shift, scale = self.shift.to(moments.device), self.scale.to(moments.device)
        return self.noising(sample_latents(moments, scale, generator, shift), generator)

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, c, h, w) of `model`, the denoiser or what wraps it."""
        return self.architecture.call(model, noisy, timesteps, condition, self.facts)

    def predict_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One forward pass on a recorded batch: the forward function of the protection."""
        return self.predict(model, batch["noisy"], batch["timesteps"], batch["condition"])


def count_cut(pipeline: Any, prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Tokenizer -> (prompts it cuts, tokens it keeps), for those that cut any."""
    found = {}
    for name, limit in get_architecture(type(pipeline).__name__).tokenizers.items():
        tokenizer = getattr(pipeline, name)
        if tokenizer is not None:
            length = limit or tokenizer.model_max_length
            cut = sum(len(ids) > length for ids in tokenizer(list(prompts), truncation=False).input_ids)
            if cut:
                found[name] = (cut, length)
    return found
