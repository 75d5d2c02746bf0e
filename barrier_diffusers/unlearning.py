"""The training loop of unlearning: objective on forget batches, retain loss, protection, one optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from barrier_diffusers.barrier import Barrier
from barrier_diffusers.checkpoints import Checkpoints
from barrier_diffusers.interruption import Interruption
from barrier_diffusers.objectives import DiffusionStep, Objective
from barrier_diffusers.training import History

MakeStep = Callable[[dict[str, Any]], DiffusionStep]


class LoopSettings(Protocol):
    """What the loop reads of a run's settings."""

    gradient_accumulation_steps: int
    max_grad_norm: float
    checkpointing_steps: int | None


@dataclass
class Losses:
    """Where the terms of the total come from; `retain` and `barrier` are None where they play no part."""

    objective: Objective
    make_step: MakeStep
    forget: Iterator[dict[str, Any]]  # batches for ever
    alpha: float = 0.0  # weight of the retain loss
    make_retain_step: MakeStep | None = None
    retain: Iterator[dict[str, Any]] | None = None
    barrier: Barrier | None = None  # adds its loss, and projects after each step

    def terms(self) -> dict[str, Tensor]:
        """The terms for the next batches, with gradient."""
        terms = {"objective": self.objective.loss_of(self.make_step(next(self.forget)))}
        if self.retain is not None and self.make_retain_step is not None:
            terms["retain"] = self.alpha * self.make_retain_step(next(self.retain)).ordinary_loss()
        if self.barrier is not None:
            terms["protection"] = self.barrier.compute_protection_loss()
        return terms


def train(
    accelerator: Accelerator,
    model: nn.Module,
    parameters: list[nn.Parameter],
    optimizer: Any,
    schedule: Any,
    losses: Losses,
    settings: LoopSettings,
    checkpoints: Checkpoints,
    history: History,
    steps: range,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Run the steps; seconds. Checkpoints are written as the settings say, and when a signal ends the run.

    Args:
        model, optimizer, schedule: prepared by the accelerator.
        parameters: those that train.
        steps: numbers of the steps still to do, e.g. `range(first, max_steps)`.
        after_step: called with the number of steps done.

    Raises:
        FloatingPointError: a loss or the weights became non-finite.
        SystemExit: a signal came; a whole checkpoint was written.
    """
    micro_steps = settings.gradient_accumulation_steps
    progress = tqdm(steps, desc="unlearning", disable=not accelerator.is_local_main_process)
    start = time.perf_counter()
    with Interruption(accelerator) as interruption:
        for step in progress:
            means = {"objective": 0.0, "retain": 0.0, "protection": 0.0}
            for _ in range(micro_steps):
                with accelerator.accumulate(model):
                    terms = losses.terms()
                    for name, value in terms.items():
                        means[name] += value.item() / micro_steps
                    checkpoints.check_losses(means, step + 1)
                    accelerator.backward(torch.stack(list(terms.values())).sum())
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                    optimizer.step()
                    if losses.barrier is not None and accelerator.sync_gradients:
                        losses.barrier.project()
                    schedule.step()
                    optimizer.zero_grad()
            history.append(**means)
            accelerator.log({f"loss/{name}": value for name, value in means.items()}, step=step + 1)
            progress.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            stop = interruption.requested
            due = settings.checkpointing_steps and (step + 1) % settings.checkpointing_steps == 0
            if stop or (due and step + 1 < steps.stop):
                saved = checkpoints.save(step + 1, parameters, losses.barrier)
            if stop:
                interruption.leave(saved)
            after_step(step + 1)
        checkpoints.check_weights(parameters, steps.stop)
    return time.perf_counter() - start
