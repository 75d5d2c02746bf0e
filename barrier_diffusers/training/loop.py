"""The training loop that all scripts share: terms of a loss, one optimizer, checkpoints, signals, trackers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import synchronize_rng_states
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.training.checkpoints import Checkpoints, Interruption


def endless(loader: DataLoader, batches_done: int = 0) -> Iterator[Any]:
    """Batches for ever, reshuffled every epoch; continues after `batches_done` exactly where a killed run stopped."""
    epoch, skip = divmod(batches_done, len(loader))
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        yield from skip_first_batches(loader, skip) if skip else loader
        epoch, skip = epoch + 1, 0


def share_random_state(accelerator: Accelerator) -> None:
    """Give every process the random state of the first one."""
    if accelerator.num_processes > 1:
        synchronize_rng_states(["torch", "cuda"] if accelerator.device.type == "cuda" else ["torch"])


class History:
    """Losses per optimisation step; travels with the checkpoints."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def append(self, **losses: float) -> None:
        for name, value in losses.items():
            self.values.setdefault(name, []).append(value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class LoopSettings(Protocol):
    """What the loop reads of a run's settings."""

    gradient_accumulation_steps: int
    checkpointing_steps: int | None

    @property
    def max_grad_norm(self) -> float | None: ...


class HostCopy:
    """Numbers on their way from the device: reading waits for what computed them, and for nothing queued later."""

    def __init__(self, values: Tensor):
        self._values, self._ready = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.tolist()


def train(
    accelerator: Accelerator,
    models: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    optimizer: Any,
    schedule: Any,
    terms: Callable[[int], dict[str, Tensor]],
    settings: LoopSettings,
    checkpoints: Checkpoints,
    history: History,
    steps: range,
    barrier: Barrier | None = None,
    after_step: Callable[[int], None] | None = None,
    desc: str = "unlearning",
    names: Sequence[str] = (),
) -> float:
    """Run the steps; seconds. Checkpoints are written as the settings say, and when a signal ends the run.

    The host waits for the device once in a step, for the parts of the loss, while the device works on the gradients.
    They are means over micro-steps and processes, and are looked at before the weights change.

    Args:
        models, optimizer, schedule: prepared by the accelerator.
        parameters: those that train.
        terms: step -> the parts of the loss on the next batches, with gradient; their sum is minimised.
        history: gets each part's mean over the micro-steps and processes of every step.
        steps: numbers of the steps still to do, e.g. `range(first, max_steps)`.
        barrier: projects after each step; its loss, if any, is one of the terms.
        after_step: called with the number of steps done.
        names: parts that the history has even where `terms` never gives them, as zeros.

    Raises:
        FloatingPointError: a loss or the weights became non-finite.
        SystemExit: a signal came; a whole checkpoint was written.
    """
    micro_steps = settings.gradient_accumulation_steps
    progress = tqdm(steps, desc=desc, disable=not accelerator.is_local_main_process)
    start = time.perf_counter()
    with Interruption(accelerator) as interruption:
        for step in progress:
            sums: dict[str, Tensor] = {}
            for _ in range(micro_steps):
                with accelerator.accumulate(*models):
                    parts = terms(step)
                    for name, value in parts.items():
                        part = value.detach().float() / micro_steps
                        sums[name] = sums[name] + part if name in sums else part
                    if accelerator.sync_gradients:
                        numbers = torch.stack([*sums.values(), interruption.flag(accelerator.device)])
                        arriving = HostCopy(accelerator.reduce(numbers, "mean"))
                    accelerator.backward(torch.stack(list(parts.values())).sum())
                    if accelerator.sync_gradients:
                        if settings.max_grad_norm is not None:
                            accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                        *values, signals = arriving.read()
                        means = dict.fromkeys(names, 0.0) | dict(zip(sums, values, strict=True))
                        checkpoints.check_losses(means, step + 1)
                    optimizer.step()
                    if barrier is not None and accelerator.sync_gradients:
                        barrier.project()
                    schedule.step()
                    optimizer.zero_grad()
            history.append(**means)
            accelerator.log({f"loss/{name}": value for name, value in means.items()}, step=step + 1)
            progress.set_postfix({name: f"{value:.4g}" for name, value in means.items()})
            stop = signals > 0 if accelerator.num_processes > 1 else interruption.requested
            due = settings.checkpointing_steps and (step + 1) % settings.checkpointing_steps == 0
            if stop or (due and step + 1 < steps.stop):
                saved = checkpoints.save(step + 1, parameters, barrier)
            if stop:
                interruption.leave(saved)
            if after_step is not None:
                after_step(step + 1)
        checkpoints.check_weights(parameters, steps.stop)
    seconds = time.perf_counter() - start
    accelerator.wait_for_everyone()
    return round(seconds, 2)
