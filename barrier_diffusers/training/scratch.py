"""Training networks from scratch in stages, each with one-cycle learning rate, averages and checkpoints of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.loop import History, endless, train


class RunSettings(Protocol):
    """What a stage reads of the whole run's settings."""

    seed: int
    checkpointing_steps: int | None
    checkpoints_total_limit: int | None
    resume_from_checkpoint: Any


class StageSettings(Protocol):
    """What it reads of its own."""

    max_train_steps: int
    train_batch_size: int
    learning_rate: float


class Averages(EMAModel):
    """diffusers' exponential moving average of weights, in a form that checkpoints take."""

    def state_dict(self) -> dict[str, Any]:
        """Without the copy of the weights that `store` makes."""
        state = super().state_dict()
        state.pop("temp_stored_params", None)
        return state


def one_cycle(optimizer: torch.optim.Optimizer, peak: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Warm up over 10 % of the steps, then anneal to zero."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)


@dataclass
class LoopConfig:
    """What the loop reads of a stage."""

    checkpointing_steps: int | None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0


class Training:
    """A stage's networks in the shared loop: prepared, resumed from the stage's own checkpoints if asked to.

    Args:
        folder: gets the checkpoints, until the stage has ended.
    """

    def __init__(self, accelerator: Accelerator, config: RunSettings, stage: StageSettings, folder: Path):
        self.accelerator, self.config, self.stage, self.folder = accelerator, config, stage, folder
        self.checkpoints = Checkpoints(accelerator, folder, config, config.checkpoints_total_limit)
        self.history = self.checkpoints.states["history"] = History()
        self.checkpoint = self.checkpoints.find(config.resume_from_checkpoint)

    def run(
        self,
        models: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        rows: Any,
        terms: Callable[[Any, Sequence[nn.Module]], dict[str, Tensor]],
        before_step: Callable[[], None] | None = None,
        desc: str = "",
    ) -> None:
        """Train; `terms` are the parts of the loss on a batch. `before_step` is called before each step but the first.

        Raises:
            FloatingPointError: a loss or the weights became non-finite.
            SystemExit: a signal came; a whole checkpoint was written.
        """
        accelerator, steps = self.accelerator, self.stage.max_train_steps
        parameters = [parameter for model in models for parameter in model.parameters()]
        schedule = one_cycle(optimizer, self.stage.learning_rate, steps * accelerator.num_processes)
        order = torch.Generator().manual_seed(self.config.seed)  # else a resumed loader draws from the global numbers
        loader = DataLoader(rows, self.stage.train_batch_size, shuffle=True, drop_last=True, generator=order)
        *prepared, optimizer, schedule, loader = accelerator.prepare(*models, optimizer, schedule, loader)
        first = self.checkpoints.load(self.checkpoint, steps) if self.checkpoint else 0
        batches = endless(loader, first)

        def step_terms(step: int) -> dict[str, Tensor]:
            if step and before_step is not None:
                before_step()
            return terms(next(batches), [accelerator.unwrap_model(model) for model in prepared])

        loop = (LoopConfig(self.config.checkpointing_steps), self.checkpoints, self.history, range(first, steps))
        train(accelerator, prepared, parameters, optimizer, schedule, step_terms, *loop, desc=desc)
        if before_step is not None:
            before_step()
        accelerator.free_memory()  # the next stage's checkpoints hold its own networks alone
