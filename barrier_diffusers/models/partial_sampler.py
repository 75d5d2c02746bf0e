"""Samples that are half done: what the model itself makes of a prompt after some of its sampling steps.

Shapes: B batch, c latent channels, h and w latent side. Conditions are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.objectives.base import Condition


class PartialSampler:
    """Draws (x_t, t) from a model's own sampling process, prompts only: the inputs that ESD trains on.

    A batch starts from noise and takes a random number i of the N steps of a deterministic sampler (DDIM; Euler for
    flow matching) with classifier-free guidance, i uniform in 0 ... N - 1; t is the timestep at which step i stands,
    so that the noise in x_t is what the network expects at t. Every call uses the weights as they are then and builds
    no graph. A network with a guidance embedding is not guided a second time.

    Args:
        diffusion: the pipeline whose denoiser samples.
        latent_shape: (c, h, w).
        guidance_scale: 1 is no guidance.
        num_inference_steps: N.
    """

    def __init__(
        self, denoiser: Denoiser, latent_shape: tuple[int, int, int], guidance_scale: float, num_inference_steps: int
    ):
        self.denoiser, self.latent_shape, self.num_inference_steps = denoiser, latent_shape, num_inference_steps
        self.guidance_scale = 1.0 if denoiser.context.guidance is not None else guidance_scale

    def _predict(self, x: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return self.denoiser.predict(self.denoiser.network, x, t_B, condition).float()

    @torch.no_grad()
    def __call__(
        self, condition: Condition, unconditional: Condition, index_B: Tensor, share: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, Tensor]:
        """(x_t (B, c, h, w) float32, timesteps (B,)) for the prompts' and the empty prompt's conditions.

        `index_B`, the rows' numbers, tells how many samples there are and on which device; `share` is as in
        `training.StepMaker`.
        """
        device, size = index_B.device, len(index_B)
        scheduler = self.denoiser.noising.sampler(self.num_inference_steps, self.latent_shape)
        timesteps = scheduler.timesteps.to(device)
        stage = int(torch.randint(len(timesteps), ()))
        process_index, num_processes = share
        noise = torch.randn(num_processes * size, *self.latent_shape)
        x = noise[process_index * size : (process_index + 1) * size].to(device)
        for timestep in timesteps[:stage]:
            t_B = timestep.expand(size)
            guided = self._predict(x, t_B, condition)
            if self.guidance_scale != 1:
                empty = self._predict(x, t_B, unconditional)
                guided = empty + self.guidance_scale * (guided - empty)
            x = scheduler.step(guided, timestep, x).prev_sample
        return x, timesteps[stage].expand(size)


class SampledBatches:
    """The sampler's x_t for batches of prompts, in the form the protection records: noisy, timesteps, condition.

    Sampled once, so that every pass sees the same; kept on the CPU.

    Args:
        batches: conditions, unconditional ones and row numbers, as `EncodedImages` gives them.
        sampler: draws x_t.
        device: where a batch is needed.
    """

    def __init__(self, batches: Iterable[dict[str, Any]], sampler: PartialSampler, device: torch.device):
        self.device, self.batches = device, []
        for batch in batches:
            noisy, timesteps = sampler(batch["condition"], batch["unconditional"], batch["index"])
            kept = {"noisy": noisy, "timesteps": timesteps, "condition": batch["condition"]}
            self.batches.append(send_to_device(kept, "cpu"))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (send_to_device(batch, self.device) for batch in self.batches)
