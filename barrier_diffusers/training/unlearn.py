"""Unlearning a diffusion model, from its data to trained weights; the scripts do what lies around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.objectives import DiffusionStep, Objective, ObjectiveConfig
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.loop import History, endless, share_random_state, train
from barrier_diffusers.training.preparation import (
    ForgetAndRetain,
    attach_saliency_mask,
    batches,
    parameter_groups,
    sampler_and_reference,
    set_up_protection,
)
from barrier_diffusers.training.runs import RunSettings, schedule_of
from barrier_diffusers.training.steps import StepMaker, freeze_normalisation

MakeStep = Callable[[dict[str, Any]], DiffusionStep]


class UnlearningSettings(RunSettings, Protocol):
    """What is read here of a run's settings."""

    train_batch_size: int
    num_train_epochs: int
    max_train_steps: int | None
    learning_rate: float
    learning_rates: dict[str, float]
    adam_weight_decay: float
    saliency_mask: float | None
    validation_prompt: list[str]
    validation_steps: int
    checkpointing_steps: int | None
    objective: ObjectiveConfig
    barrier: BarrierConfig

    @property
    def protected(self) -> bool: ...

    @property
    def max_grad_norm(self) -> float | None: ...


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


def unlearn(
    accelerator: Accelerator,
    config: UnlearningSettings,
    objective: Objective,
    barrier: Barrier,
    denoiser: Denoiser,
    data: ForgetAndRetain,
    checkpoints: Checkpoints,
    checkpoint: Path | None,
    retain_inputs: dict[str, list[Tensor]],
    resolution: int,
    validate: Callable[[int], None],
) -> tuple[Barrier, dict[str, Any]]:
    """Protect, then train; the barrier (another one in a resumed run) and `history`, `num_steps`, seconds.

    Args:
        checkpoint: folder to go on from.
        retain_inputs: as `Barrier.setup_protection` takes them.
        resolution: side of the images in pixels.
        validate: draws the validation prompts after so many steps; called in the main process alone.

    Raises:
        FloatingPointError: a loss or the weights became non-finite.
        SystemExit: a signal came; a whole checkpoint was written.
    """
    options, network = config.objective, barrier.model
    sampler, reference = sampler_and_reference(objective, options, barrier, denoiser, resolution)
    start = time.perf_counter()
    if config.protected and checkpoint:
        barrier.remove()
        barrier = Barrier.from_pretrained(checkpoint / "barrier", network)
    elif config.protected:
        set_up_protection(barrier, accelerator, config, denoiser, data, sampler, retain_inputs)
    seconds_setup = time.perf_counter() - start

    parameters = barrier.trainable_parameters()
    groups = parameter_groups(barrier, config.learning_rate, config.learning_rates)
    optimizer: Any = torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay)
    mask = None
    if config.saliency_mask is not None:
        rows = (StepMaker(network, denoiser), data.forget, config.train_batch_size)
        checkpoints.states["saliency_mask"] = mask = attach_saliency_mask(
            config.saliency_mask, barrier, optimizer, *rows, accelerator, checkpoint is not None
        )
    processes, micro_steps = accelerator.num_processes, config.gradient_accumulation_steps
    forget_loader = batches(data.forget, config, config.seed, processes)
    use_retain = options.alpha > 0 and data.retain
    retain_loader = batches(data.retain, config, config.seed + 1, processes) if use_retain else None
    model, optimizer, forget_loader, retain_loader = accelerator.prepare(
        network, optimizer, forget_loader, retain_loader
    )
    max_steps = config.max_train_steps or config.num_train_epochs * -(-len(forget_loader) // micro_steps)
    schedule = accelerator.prepare(schedule_of(config, optimizer, max_steps, processes))
    share_random_state(accelerator)
    share = (accelerator.process_index, processes)
    checkpoints.states["history"] = history = History()
    accelerator.init_trackers("logs")
    first = checkpoints.load(checkpoint, max_steps) if checkpoint else 0

    terms = UnlearningTerms(
        objective,
        StepMaker(model, denoiser, options, reference, sampler, share),
        endless(forget_loader, first * micro_steps),
        options.alpha,
        StepMaker(model, denoiser, share=share),
        endless(retain_loader, first * micro_steps) if retain_loader else None,
        barrier if config.protected else None,
        micro_steps,
    )

    def after_step(step: int) -> None:
        if config.validation_prompt and step % config.validation_steps == 0 and accelerator.is_main_process:
            network.eval()
            validate(step)
            freeze_normalisation(model)

    freeze_normalisation(model)
    seconds = train(
        accelerator,
        [model],
        parameters,
        optimizer,
        schedule,
        terms,
        config,
        checkpoints,
        history,
        range(first, max_steps),
        terms.barrier,
        after_step,
        names=UnlearningTerms.NAMES,
    )
    if mask is not None:
        mask.detach()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # gives the denoiser its own forward back
    facts = {"num_steps": max_steps, "seconds_training": seconds, "seconds_setup": round(seconds_setup, 2)}
    return barrier, {"history": history.values, **facts}
