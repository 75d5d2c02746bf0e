"""Sample from real images instead of from noise: an image is noised in part, or inverted, and denoised again.

Shapes: N images, B batch, H height, W width, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import SamplingConfig, sliced_vae
from barrier_diffusers.objectives.base import Condition


class ImageSampler:
    """Samples with a pipeline's denoiser and a deterministic sampler (DDIM; Euler for flow matching).

    Args:
        pipeline: of a class in architectures.py.
        sampling: steps and guidance; a denoiser with a guidance embedding is not guided a second time.
    """

    def __init__(self, pipeline: Any, sampling: SamplingConfig):
        self.pipeline, self.denoiser = pipeline, PipelineDenoiser(pipeline)
        self.num_steps = sampling.num_inference_steps
        self.guidance = 1.0 if self.denoiser.context.guidance is not None else sampling.guidance_scale
        self.device = next(self.denoiser.network.parameters()).device

    def latents(self, moments: Tensor) -> Tensor:
        """Normalised means (B, c, h, w) of VAE posteriors (B, 2 c, h, w)."""
        return ((moments.chunk(2, dim=1)[0] - self.denoiser.shift) * self.denoiser.scale).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Byte images (B, H, W, 3) of normalised latents (B, c, h, w).

        Raises:
            FloatingPointError: non-finite pixels.
        """
        vae = self.pipeline.vae
        raw = latents.cpu() / self.denoiser.scale + self.denoiser.shift
        with sliced_vae(vae, latents.shape[-1] * self.denoiser.context.vae_scale_factor):
            pixels = vae.decode(raw.to(vae.device, vae.dtype)).sample
        if not torch.isfinite(pixels).all():
            raise FloatingPointError("the pipeline made non-finite pixels of an image that it was given")
        scaled = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return (scaled * 255).round().astype(np.uint8)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> Condition:
        """What the prompts (B) tell the denoiser."""
        return self.denoiser.architecture.encode(self.pipeline, list(prompts))

    def _scheduler(self, latents: Tensor) -> Any:
        channels, height, width = latents.shape[1:]
        return self.denoiser.noising.sampler(self.num_steps, (channels, height, width))

    def _predict(self, x: Tensor, timestep: Tensor, prompt: Condition, empty: Condition | None) -> Tensor:
        t_B = timestep.to(self.device).expand(len(x))
        predicted = self.denoiser.predict(self.denoiser.network, x, t_B, prompt).float()
        if empty is None or self.guidance == 1:
            return predicted
        without = self.denoiser.predict(self.denoiser.network, x, t_B, empty).float()
        return without + self.guidance * (predicted - without)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        noise: Tensor,
        prompts: Sequence[str],
        strength: float,
        kept: Tensor | None = None,
        guided: bool = True,
    ) -> Tensor:
        """Latents (B, c, h, w) of what the denoiser makes of images that are noised in part.

        Args:
            latents: normalised, of the images (B, c, h, w).
            noise: of variance 1 (B, c, h, w).
            strength: share of the sampler's steps that are taken; 1 starts from noise alone.
            kept: mask (h, w) of what stays of the image; the rest is painted to go with it.
            guided: False: without classifier-free guidance.
        """
        scheduler = self._scheduler(latents)
        timesteps = scheduler.timesteps
        first = len(timesteps) - max(1, round(strength * len(timesteps)))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        prompt = self.conditions(prompts)
        empty = self.conditions([""] * len(prompts)) if guided and self.guidance != 1 else None

        def noised(timestep: Tensor) -> Tensor:
            if isinstance(scheduler, DDIMScheduler):
                return scheduler.add_noise(latents, noise, timestep[None])
            return scheduler.scale_noise(latents, timestep[None], noise)

        x = noised(timesteps[first])
        for index, timestep in enumerate(timesteps[first:], start=first + 1):
            x = scheduler.step(self._predict(x, timestep, prompt, empty), timestep, x).prev_sample
            if kept is not None:
                known = noised(timesteps[index]) if index < len(timesteps) else latents
                x = torch.where(kept.to(x.device), known, x)
        return x

    @torch.no_grad()
    def invert(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """The noise (B, c, h, w) from which the sampler comes back to these latents, as the denoiser sees it
        (DDIM inversion, arXiv 2010.02502), without guidance."""
        scheduler = self._scheduler(latents)
        prompt, x = self.conditions(prompts), latents
        if isinstance(scheduler, DDIMScheduler):
            inverse = DDIMInverseScheduler.from_config(scheduler.config)
            inverse.set_timesteps(self.num_steps)
            for timestep in inverse.timesteps:
                x = inverse.step(self._predict(x, timestep, prompt, None), timestep, x).prev_sample
            return x
        sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
        for index in reversed(range(len(timesteps))):
            x = x + (sigmas[index] - sigmas[index + 1]).to(x) * self._predict(x, timesteps[index], prompt, None)
        return x

    @torch.no_grad()
    def from_noise(self, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        """Latents (B, c, h, w) that the sampler makes of noise as it is, without guidance."""
        scheduler = self._scheduler(noise)
        prompt, x = self.conditions(prompts), noise
        for timestep in scheduler.timesteps:
            x = scheduler.step(self._predict(x, timestep, prompt, None), timestep, x).prev_sample
        return x
