"""From clean latents to what a denoiser is trained on: the noised input, its timestep, and the target.

Shapes: B batch, c latent channels, h and w latent side, T training timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


@dataclass(frozen=True)
class Noised:
    """One draw of noise and timesteps for a batch."""

    noisy: Tensor  # x_t (B, c, h, w)
    timesteps: Tensor  # (B,), in the unit of the scheduler's timesteps
    target: Tensor  # what the network is trained to predict (B, c, h, w)


class Noising(Protocol):
    """Draws the noise and then the timesteps for latents (B, c, h, w), from `generator` or the global random state."""

    def __call__(self, latents: Tensor, generator: torch.Generator | None = None) -> Noised: ...

    def at(self, latents: Tensor, noise: Tensor, positions: Tensor) -> Noised:
        """The latents under this noise (B, c, h, w) at positions (B,) of the schedule, whole numbers below T."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the noise schedule."""
        ...

    def sampler(self, num_steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """A scheduler of diffusers that takes latents (B, c, h, w) from noise of variance 1 to clean in `num_steps`
        deterministic steps, with its timesteps set."""
        ...


# Schedulers whose noise, scaled as the network is given it, is that of `DiffusionNoising`: each is tested against its
# own add_noise and step.
VARIANCE_PRESERVING = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
FLOW_MATCHING = ("FlowMatchEulerDiscreteScheduler",)  # the same for `FlowNoising`
FLOW_SIGMAS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # and with use_flow_sigmas (SANA, HiDream)


def require_scheduler(scheduler: Any, known: tuple[str, ...]) -> None:
    """A ValueError, by name, for a scheduler whose noise is not known to be reproduced here."""
    name, config = type(scheduler).__name__, scheduler.config
    other = [key for key in ("use_flow_sigmas",) if config.get(key) and known is VARIANCE_PRESERVING]
    other += ["timestep_type continuous"] if config.get("timestep_type") == "continuous" else []
    if name not in known or other:
        with_what = f" with {', '.join(other)}" if other else ""
        raise ValueError(
            f"scheduler {name}{with_what} noises in a way that is not known here, so training would be wrong: "
            f"save the pipeline with one of {', '.join(known)}"
        )


class DiffusionNoising:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise (DDPM), with timesteps uniform over all T.

    The target is what the scheduler's `prediction_type` says: the noise (epsilon) or the velocity
    sqrt(a_t) noise - sqrt(1 - a_t) x_0 (v_prediction).

    Raises:
        ValueError: a scheduler with another noise, or another prediction type.
    """

    def __init__(self, scheduler: Any, tokens_side: int):
        require_scheduler(scheduler, VARIANCE_PRESERVING)
        try:
            self.scheduler = DDPMScheduler.from_config(scheduler.config)
        except NotImplementedError as error:
            raise ValueError(f"scheduler {type(scheduler).__name__}: {error}") from error
        self.prediction_type = self.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type is {self.prediction_type!r}, but must be epsilon or v_prediction")

    def __call__(self, latents: Tensor, generator: torch.Generator | None = None) -> Noised:
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        timesteps = torch.randint(
            self.num_train_timesteps, (len(latents),), generator=generator, device=latents.device
        )
        return self.at(latents, noise, timesteps)

    def at(self, latents: Tensor, noise: Tensor, positions: Tensor) -> Noised:
        """A position is a timestep; see `Noising`."""
        velocity = self.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, positions) if velocity else noise
        return Noised(self.scheduler.add_noise(latents, noise, positions), positions, target)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the noise schedule."""
        return self.scheduler.config.num_train_timesteps

    def sampler(self, num_steps: int, latent_shape: tuple[int, int, int]) -> DDIMScheduler:
        """DDIM, whatever the pipeline's own sampler is; see `Noising`."""
        scheduler = DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)  # latents have no range
        scheduler.set_timesteps(num_steps)
        return scheduler


Shift = Callable[[Any, tuple[int, int, int], int], float]  # (scheduler's configuration, (c, h, w), tokens_side) -> mu


def shift_by_tokens(config: Any, latent_shape: tuple[int, int, int], tokens_side: int) -> float:
    """mu of dynamic shifting, linear in the number of image tokens (Flux)."""
    num_tokens = latent_shape[1] * latent_shape[2] // tokens_side**2
    return calculate_shift(
        num_tokens,
        base_seq_len=config.get("base_image_seq_len", 256),
        max_seq_len=config.get("max_image_seq_len", 4096),
        base_shift=config.get("base_shift", 0.5),
        max_shift=config.get("max_shift", 1.15),
    )


def as_flow_matching(scheduler: Any) -> Any:
    """A FlowMatchEulerDiscreteScheduler with the sigmas of this one.

    Raises:
        ValueError: none is known to have them.
    """
    if type(scheduler).__name__ not in FLOW_SIGMAS:
        require_scheduler(scheduler, FLOW_MATCHING)
        return scheduler
    config = scheduler.config
    wanted = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}
    wrong = [f"{name} {config.get(name)}" for name, value in wanted.items() if (config.get(name) or False) != value]
    if wrong:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} with {', '.join(wrong)} noises in a way that is not known here, so "
            f"training would be wrong: save the pipeline with one of {', '.join(FLOW_MATCHING)}"
        )
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=config.num_train_timesteps, shift=config.get("flow_shift") or 1.0
    )


class FlowNoising:
    """x_t = (1 - sigma) x_0 + sigma noise with target noise - x_0 (flow matching, SD3: arXiv 2403.03206).

    The sigmas are the scheduler's own table of T steps, shifted as it shifts them when it samples: by its constant, or
    (dynamic shifting) by what the pipeline makes of the number of image tokens. The position in the table is
    logit-normal, T * sigmoid(n) with n standard normal, counted from the noisy end.

    Args:
        scheduler: a FlowMatchEulerDiscreteScheduler, or a multistep solver with the sigmas of one.
        tokens_side: side of the square of latent positions that makes one token of the transformer.
        shift: the mu that the pipeline gives a scheduler with dynamic shifting.
        shifted_timesteps: whether the network is told the shifted sigma, as almost all are; if not, the one before it
            is shifted (CogView4).

    Raises:
        ValueError: another scheduler.
    """

    def __init__(
        self, scheduler: Any, tokens_side: int, *, shift: Shift = shift_by_tokens, shifted_timesteps: bool = True
    ):
        self.scheduler, self.tokens_side = as_flow_matching(scheduler), tokens_side
        self.shift, self.shifted_timesteps = shift, shifted_timesteps
        self._tables: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def table(self, latent_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """(sigmas, timesteps), both (T,), for latents (c, h, w)."""
        if latent_shape not in self._tables:
            steps = self.sampler(self.scheduler.config.num_train_timesteps, latent_shape)
            self._tables[latent_shape] = (steps.sigmas[:-1].clone(), steps.timesteps.clone())
        return self._tables[latent_shape]

    def sampler(self, num_steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """Euler steps at sigmas 1 ... 1 / num_steps, shifted as the scheduler shifts them; see `Noising`."""
        config, scheduler = self.scheduler.config, copy.deepcopy(self.scheduler)
        sigmas = np.linspace(1, 1 / num_steps, num_steps)
        mu = self.shift(config, latent_shape, self.tokens_side) if config.use_dynamic_shifting else None
        unshifted = None if self.shifted_timesteps else (sigmas * config.num_train_timesteps).tolist()
        scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=mu, timesteps=unshifted)
        return scheduler

    def __call__(self, latents: Tensor, generator: torch.Generator | None = None) -> Noised:
        noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        normal = torch.randn(len(latents), generator=generator, device=latents.device)
        positions = (normal.sigmoid() * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return self.at(latents, noise, positions)

    def at(self, latents: Tensor, noise: Tensor, positions: Tensor) -> Noised:
        """A position is a row of the table, the noisiest first; see `Noising`."""
        channels, height, width = latents.shape[1:]
        sigmas, timesteps = self.table((channels, height, width))
        sigma = sigmas.to(latents)[positions].view(-1, 1, 1, 1)
        noisy = (1 - sigma) * latents + sigma * noise
        return Noised(noisy, timesteps.to(latents)[positions], noise - latents)

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps T of the noise schedule."""
        return self.scheduler.config.num_train_timesteps


MakeNoising = Callable[[Any, int], Noising]  # (scheduler, tokens_side)
