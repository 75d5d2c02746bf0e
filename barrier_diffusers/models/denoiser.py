"""What training needs to know of a diffusion model, whatever tells its network what to show: prompts or labels.

Shapes: B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from barrier_diffusers.models.architectures import CallContext, default_side, get_architecture
from barrier_diffusers.models.autoencoders import (
    NO_VARIANCE,
    latent_channels,
    latent_normalisation,
    patch_side,
    sample_latents,
)
from barrier_diffusers.models.noising import Noised, Noising
from barrier_diffusers.objectives.base import Condition

# what configurations call the width of the text embeddings that the denoiser reads, the first one that is set
TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "cap_feat_dim",
    "text_embed_dim",
    "cross_attention_dim",
    "joint_attention_dim",
)


class PipelineDenoiser:
    """A loaded pipeline as training sees it: its row bound to its VAE, scheduler and denoiser.

    Args:
        pipeline: of a class in the table.
        guidance_scale: fed to a denoiser with a guidance embedding.

    Raises:
        ValueError: a pipeline class without a row, or a pipeline that nothing here trains.
    """

    def __init__(self, pipeline: Any, guidance_scale: float = 3.5):
        self.architecture = get_architecture(type(pipeline).__name__)
        self.architecture.check(pipeline)
        self.network: Any = getattr(pipeline, self.architecture.denoiser)
        config = self.network.config
        guidance = guidance_scale if config.get("guidance_embeds") else None
        patch = patch_side(pipeline.vae)
        self.context = CallContext(pipeline.vae_scale_factor * patch, guidance, config)
        self.shift, self.scale = latent_normalisation(pipeline.vae)
        self.default_side = default_side(pipeline)
        self.latent_channels = latent_channels(pipeline.vae)
        token = config.get("patch_size") or 1
        self.tokens_side = self.architecture.packing * (token if isinstance(token, int) else token[0])
        self.noising = self.architecture.noising(pipeline.scheduler, self.tokens_side)

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the model was made for, as its configuration says.

        Raises:
            ValueError: the configuration does not say.
        """
        if self.default_side is None:
            name = self.architecture.pipeline_class.__name__
            raise ValueError(f"the configuration of this {name} names no image size: set resolution")
        return self.default_side

    def checked_resolution(self, resolution: int | None) -> int:
        """Side in pixels of the images that are read: the given one, or without one the model's own.

        Raises:
            ValueError: images of this side cannot be cut into whole latent positions and tokens.
        """
        resolution = self.default_resolution if resolution is None else resolution
        unit = self.context.vae_scale_factor * self.tokens_side
        if resolution % unit:
            name = self.architecture.pipeline_class.__name__
            raise ValueError(f"resolution is {resolution}, but must be a multiple of {unit} for this {name}")
        return resolution

    def check_text_encoder(self, pipeline: Any) -> None:
        """A ValueError if the prompts' embeddings are not as wide as the denoiser's attention reads them."""
        config = self.network.config
        wanted = next((config[name] for name in TEXT_WIDTHS if config.get(name)), None)
        with torch.no_grad():
            embeddings = self.architecture.encode(pipeline, [""]).get("encoder_hidden_states")
        if isinstance(wanted, int) and embeddings is not None and embeddings.shape[-1] != wanted:
            raise ValueError(
                f"the text encoder gives {embeddings.shape[-1]} features per token, but the denoiser reads {wanted}: "
                "they do not belong together; take both from one pipeline"
            )

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(c, h, w) of the latents of square images."""
        side = resolution // self.context.vae_scale_factor
        return self.latent_channels, side, side

    def noised(self, moments: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Latents drawn from cached posteriors (B, 2 c, h, w), and noise and timesteps for them, in this order."""
        shift, scale = self.shift.to(moments.device), self.scale.to(moments.device)
        return self.noising(sample_latents(moments, scale, generator, shift), generator)

    def exact_moments(self, latents: Tensor) -> Tensor:
        """Posteriors (B, 2 c, h, w) from which `noised` draws these very latents (B, c, h, w), up to rounding."""
        mean = latents / self.scale.to(latents.device) + self.shift.to(latents.device)
        return torch.cat([mean, torch.full_like(mean, NO_VARIANCE)], dim=1)

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, c, h, w) of `model`, the denoiser or what wraps it."""
        return self.architecture.call(model, noisy, timesteps, condition, self.context)

    def predict_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One forward pass on a recorded batch: the forward function of the protection."""
        return self.predict(model, batch["noisy"], batch["timesteps"], batch["condition"])


class Denoiser(Protocol):
    """A network that predicts noise, with its noising and its conditions.

    `PipelineDenoiser` is the one for pipelines with prompts; an adapter for another kind of model brings its own.
    """

    network: Any
    context: CallContext
    noising: Noising

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(c, h, w) of what the denoiser sees of square images."""
        ...

    def noised(self, moments: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Noise and timesteps for a batch of what the data set holds under "moments"."""
        ...

    def predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The prediction (B, c, h, w) of `model`, the denoiser or what wraps it."""
        ...

    def predict_batch(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """One forward pass on a recorded batch: noisy, timesteps, condition."""
        ...
