"""What training needs to know of a diffusion model, whatever tells its network what to show: prompts or labels.

Shapes: B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from barrier_diffusers.models.architectures import CallContext, get_architecture
from barrier_diffusers.models.noising import (
    Noised,
    Noising,
    latent_normalisation,
    sample_latents,
)
from barrier_diffusers.objectives.base import Condition


class PipelineDenoiser:
    """A loaded pipeline as training sees it: its row bound to its VAE, scheduler and denoiser.

    Args:
        pipeline: of a class in the table.
        guidance_scale: fed to a denoiser with a guidance embedding.

    Raises:
        ValueError: a pipeline class without a row, or a prediction type that nothing here trains.
    """

    def __init__(self, pipeline: Any, guidance_scale: float = 3.5):
        self.architecture = get_architecture(type(pipeline).__name__)
        self.network: Any = getattr(pipeline, self.architecture.denoiser)
        config = self.network.config
        guidance = guidance_scale if config.get("guidance_embeds") else None
        self.context = CallContext(pipeline.vae_scale_factor, guidance)
        self.shift, self.scale = latent_normalisation(pipeline.vae)
        self.default_sample_size: int | None = getattr(pipeline, "default_sample_size", None)  # in latent positions
        self.latent_channels: int = pipeline.vae.config.latent_channels
        self.tokens_side = self.architecture.packing * (config.get("patch_size") or 1)
        self.noising = self.architecture.noising(pipeline.scheduler, self.tokens_side)

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the model was made for, as its configuration says.

        Raises:
            ValueError: the configuration does not say.
        """
        side = self.default_sample_size or self.network.config.get("sample_size")
        if not isinstance(side, int):
            name = self.architecture.pipeline_class.__name__
            raise ValueError(f"the configuration of this {name} names no image size: set resolution")
        return side * self.context.vae_scale_factor

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
        side = resolution // self.context.vae_scale_factor
        return self.latent_channels, side, side

    def noised(self, moments: Tensor, generator: torch.Generator | None = None) -> Noised:
        """Latents drawn from cached posteriors (B, 2 c, h, w), and noise and timesteps for them, in this order."""
        shift, scale = self.shift.to(moments.device), self.scale.to(moments.device)
        return self.noising(sample_latents(moments, scale, generator, shift), generator)

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
