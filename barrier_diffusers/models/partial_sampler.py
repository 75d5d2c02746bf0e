"""Samples that are half done: what the model itself makes of a prompt after some of its sampling steps.

Shapes: B batch, c latent channels, h and w latent side. Conditions are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor

from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.objectives.base import Condition


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one of several processes works on. If all have the same random state and draw for the
    whole batch, they do together what one would."""

    total: int  # rows of all processes
    own: slice

    @classmethod
    def of(cls, total: int, process_index: int, num_processes: int) -> Share:
        """As equal parts as there can be, in order."""
        return cls(total, slice(total * process_index // num_processes, total * (process_index + 1) // num_processes))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left for this process."""
        return self.own.start == self.own.stop


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
        self, condition: Condition, unconditional: Condition, index_B: Tensor, share: Share | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_t (B, c, h, w) float32, timesteps (B,)) for the prompts' and the empty prompt's conditions.

        `index_B`, the rows' numbers, tells how many samples there are and on which device. With `share` they are part
        of a larger batch, for all of which noise is drawn.
        """
        device, size = index_B.device, len(index_B)
        scheduler = self.denoiser.noising.sampler(self.num_inference_steps, self.latent_shape)
        timesteps = scheduler.timesteps.to(device)
        stage = int(torch.randint(len(timesteps), ()))
        share = share or Share(size, slice(size))
        x = torch.randn(share.total, *self.latent_shape)[share.own].to(device)
        if share.is_empty:
            return x, timesteps[stage].expand(size)
        x = self._steps(x, scheduler, timesteps[:stage], condition=condition, unconditional=unconditional)
        return x, timesteps[stage].expand(size)

    @torch.no_grad()
    def whole(self, condition: Condition, unconditional: Condition, noise: Tensor) -> Tensor:
        """The latents (B, c, h, w) float32 that all N steps make of noise of variance 1."""
        scheduler = self.denoiser.noising.sampler(self.num_inference_steps, self.latent_shape)
        timesteps = scheduler.timesteps.to(noise.device)
        return self._steps(noise, scheduler, timesteps, condition=condition, unconditional=unconditional)

    def _steps(
        self, x: Tensor, scheduler: Any, timesteps: Tensor, *, condition: Condition, unconditional: Condition
    ) -> Tensor:
        for timestep in timesteps:
            t_B = timestep.expand(len(x))
            guided = self._predict(x, t_B, condition)
            if self.guidance_scale != 1:
                empty = self._predict(x, t_B, unconditional)
                guided = empty + self.guidance_scale * (guided - empty)
            x = scheduler.step(guided, timestep, x).prev_sample
        return x


def own_rows(batch: dict[str, Any], share: Share) -> dict[str, Any]:
    """The share of every tensor in a batch."""
    return recursively_apply(lambda values: values[share.own], batch)


class SampledBatches:
    """The sampler's x_t for batches of prompts, in the form the protection records: noisy, timesteps, condition.

    Sampled once, so that every pass sees the same; kept on the CPU.

    Args:
        batches: conditions, unconditional ones and row numbers, as `EncodedImages` gives them, each with the share of
            it that is kept.
        sampler: draws x_t.
        device: where a batch is needed.
    """

    def __init__(self, batches: Iterable[tuple[dict[str, Any], Share]], sampler: PartialSampler, device: torch.device):
        self.device, self.batches = device, []
        for batch, share in batches:
            own = own_rows(batch, share)
            noisy, timesteps = sampler(own["condition"], own["unconditional"], own["index"], share)
            kept = {"noisy": noisy, "timesteps": timesteps, "condition": own["condition"]}
            if not share.is_empty:
                self.batches.append(send_to_device(kept, "cpu"))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (send_to_device(batch, self.device) for batch in self.batches)
