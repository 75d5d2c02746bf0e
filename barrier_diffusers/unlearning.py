"""The terms of an unlearning step of a diffusion model: objective on forget batches, retain loss, protection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from barrier_diffusers.barrier import Barrier
from barrier_diffusers.objectives import DiffusionStep, Objective

MakeStep = Callable[[dict[str, Any]], DiffusionStep]


@dataclass
class UnlearningTerms:
    """Where the parts of the loss come from; `retain` and `barrier` are None where they play no part.

    The protection loss depends on no batch: it is computed in the last micro-step of a step, as many times as heavy.
    """

    objective: Objective
    make_step: MakeStep
    forget: Iterator[dict[str, Any]]  # batches for ever
    alpha: float = 0.0  # weight of the retain loss
    make_retain_step: MakeStep | None = None
    retain: Iterator[dict[str, Any]] | None = None
    barrier: Barrier | None = None
    micro_steps: int = 1  # of a step
    _calls: int = field(default=0, init=False)

    NAMES = ("objective", "retain", "protection")

    def __call__(self, step: int) -> dict[str, Tensor]:
        """The parts for the next batches, with gradient; `step` decides about nothing."""
        terms = {"objective": self.objective.loss_of(self.make_step(next(self.forget)))}
        if self.retain is not None and self.make_retain_step is not None:
            terms["retain"] = self.alpha * self.make_retain_step(next(self.retain)).ordinary_loss()
        self._calls += 1
        if self.barrier is not None and self._calls % self.micro_steps == 0:
            terms["protection"] = self.micro_steps * self.barrier.compute_protection_loss()
        return terms
