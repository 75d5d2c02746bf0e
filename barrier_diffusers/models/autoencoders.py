"""How each kind of VAE turns pixels into what the denoiser sees: its posterior, and the posterior's normalisation.

Shapes: B batch, c latent channels, h and w latent side, H and W image side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage
from torch import Tensor

NO_VARIANCE = -30.0  # log-variance of a VAE without one: the smallest that a posterior has, a deviation of 3e-7


def patch_side(vae: Any) -> int:
    """Side of the square of the VAE's positions that the denoiser sees as the channels of one (Flux.2: 2)."""
    return vae.config.patch_size[0] if isinstance(vae, AutoencoderKLFlux2) else 1


def has_frames(vae: Any) -> bool:
    """Whether it is a VAE of videos, to which an image is one frame (Qwen-Image)."""
    return isinstance(vae, AutoencoderKLQwenImage)


def latent_channels(vae: Any) -> int:
    """c, as the denoiser sees latents."""
    return (vae.config.get("latent_channels") or vae.config.z_dim) * patch_side(vae) ** 2


def arranged(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE encodes to and decodes from, (B, c', h', w') or with a frame axis before h', as (B, c, h, w)."""
    latents = latents.squeeze(2) if has_frames(vae) else latents
    return F.pixel_unshuffle(latents, patch_side(vae)) if patch_side(vae) > 1 else latents


def posterior_parameters(vae: Any, pixels: Tensor) -> Tensor:
    """Mean and log-variance (B, 2 c, h, w) of images (B, 3, H, W); NO_VARIANCE for a VAE that says none (SANA's)."""
    encoded = vae.encode(pixels.unsqueeze(2) if has_frames(vae) else pixels)
    if "latent" in encoded:
        return torch.cat([encoded.latent, torch.full_like(encoded.latent, NO_VARIANCE)], dim=1)
    halves = encoded.latent_dist.parameters.chunk(2, dim=1)
    return torch.cat([arranged(vae, half) for half in halves], dim=1)


def latent_normalisation(vae: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale), each broadcastable to (B, c, h, w): the denoiser sees (latents - shift) * scale.

    The scale is the VAE's scaling_factor, the shift its shift_factor (SD3, Flux); a VAE with latents_mean and
    latents_std per channel (some SDXL ones, Qwen-Image) is normalised by these too, one with a batch norm (Flux.2) by
    its running statistics alone.
    """
    config = vae.config
    if isinstance(vae, AutoencoderKLFlux2):
        mean, variance = (
            value.detach().clone().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (variance + config.batch_norm_eps).rsqrt()
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift, divisor = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, std))
        return shift, scale / divisor
    return torch.tensor(config.get("shift_factor") or 0.0), torch.tensor(scale)


def sample_latents(
    moments: Tensor, scale: float | Tensor, generator: torch.Generator | None = None, shift: float | Tensor = 0.0
) -> Tensor:
    """Draw normalised latents (B, c, h, w) from cached posteriors (B, 2 c, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return (mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise - shift) * scale
