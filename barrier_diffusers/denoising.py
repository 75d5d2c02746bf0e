"""What training needs to know of a diffusion model, whatever tells its network what to show: prompts or labels.

Shapes: B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from barrier_diffusers.architectures import Facts
from barrier_diffusers.noising import Noised, Noising
from barrier_diffusers.objectives.base import Condition


class Denoising(Protocol):
    """A denoiser with its noise and its conditions: `architectures.Diffusion` for pipelines with prompts; an adapter
    for another kind of model brings its own."""

    denoiser: Any
    facts: Facts
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
