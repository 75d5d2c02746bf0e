"""Samples that are half done: what the model itself makes of a prompt after some of its sampling steps.

Shapes: B batch, c latent channels, h and w latent side. Conditions are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn


class PartialSampler:
    """Draws (x_t, t) from a model's own sampling process, prompts only: the inputs that ESD trains on.

    A batch starts from noise and takes a random number i of the N steps of a deterministic DDIM sampler (i uniform in
    0 ... N - 1) with classifier-free guidance; t is the timestep at which step i stands, so that the noise in x_t is
    what the network expects at t. Every call uses the weights as they are then and builds no graph.

    Args:
        unet: `unet(noisy, timesteps, condition).sample` is its prediction.
        scheduler: whose noise schedule, prediction type and timestep spacing are used, whatever its own sampler is.
        latent_shape: (c, h, w).
        guidance_scale: 1 is no guidance.
        num_inference_steps: N.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        latent_shape: tuple[int, int, int],
        guidance_scale: float,
        num_inference_steps: int,
    ):
        self.unet, self.latent_shape, self.guidance_scale = unet, latent_shape, guidance_scale
        self.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)  # latents have no range
        self.scheduler.set_timesteps(num_inference_steps)

    @torch.no_grad()
    def __call__(self, condition: Any, unconditional: Any, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t (B, c, h, w) float32, timesteps (B,)) for the prompts' and the empty prompt's conditions.

        `index_B`, the rows' numbers, tells how many samples there are and on which device.
        """
        device, size = index_B.device, len(index_B)
        stage = int(torch.randint(len(self.scheduler.timesteps), ()))
        x = torch.randn(size, *self.latent_shape, device=device) * self.scheduler.init_noise_sigma
        for timestep in self.scheduler.timesteps[:stage]:
            t_B = timestep.to(device).expand(size)
            empty = self.unet(x, t_B, unconditional).sample.float()
            prompted = self.unet(x, t_B, condition).sample.float()
            guided = empty + self.guidance_scale * (prompted - empty)
            x = self.scheduler.step(guided, timestep, x).prev_sample
        return x, self.scheduler.timesteps[stage].to(device).expand(size)


def sampled_batches(batches: Iterable[dict[str, Any]], sampler: PartialSampler) -> list[dict[str, Any]]:
    """The sampler's x_t for each batch of prompts, in the form the protection records: noisy, timesteps, condition."""
    sampled = []
    for batch in batches:
        noisy, timesteps = sampler(batch["condition"], batch["unconditional"], batch["index"])
        sampled.append({"noisy": noisy, "timesteps": timesteps, "condition": batch["condition"]})
    return sampled
