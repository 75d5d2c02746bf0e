"""What training and unlearning share around the loop: accelerator, optimizer, schedule, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.loop import History, train
from barrier_diffusers.training.runs import open_run, schedule_of
from classification_ext.settings import OptimizerConfig

ONE_CYCLE = "one_cycle"  # torch's: up for a fifth of the steps, then down to nothing


def open_seeded_run(config: OptimizerConfig) -> tuple[Accelerator, Path]:
    """The accelerator of a run, its output folder claimed, the seed set."""
    accelerator = open_run(config)
    set_seed(config.seed + accelerator.process_index)
    return accelerator, Path(config.output_dir)


class Loop:
    """Optimizer, schedule and the steps of one run.

    Args:
        modules: the networks that train, the classifier first; afterwards `models` are the prepared ones.
        parameters: what the optimizer may change.
        steps_per_epoch: batches of an epoch in this process, before gradient accumulation.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: OptimizerConfig,
        modules: Sequence[nn.Module],
        parameters: Iterable[nn.Parameter],
        steps_per_epoch: int,
    ):
        self.accelerator, self.config, self.parameters = accelerator, config, list(parameters)
        self.checkpoints = Checkpoints(accelerator, Path(config.output_dir), config, config.checkpoints_total_limit)
        self.checkpoint = self.checkpoints.find(config.resume_from_checkpoint)
        self.checkpoints.states["history"] = self.history = History()
        self.micro_steps = config.gradient_accumulation_steps
        self.max_steps = config.max_train_steps or config.num_train_epochs * -(-steps_per_epoch // self.micro_steps)
        self.plain_optimizer = self._optimizer()
        schedule = self._schedule()
        prepared = accelerator.prepare(*modules, self.plain_optimizer, schedule)
        self.models, self.optimizer, self.schedule = list(prepared[:-2]), prepared[-2], prepared[-1]
        accelerator.init_trackers("logs")

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        rate, decay = config.learning_rate, config.weight_decay
        if config.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters, rate, weight_decay=decay)
        momentum = config.momentum
        return torch.optim.SGD(self.parameters, rate, momentum, weight_decay=decay, nesterov=momentum > 0)

    def _schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        config, processes = self.config, self.accelerator.num_processes
        if config.lr_scheduler == ONE_CYCLE:
            steps = self.max_steps * processes
            return torch.optim.lr_scheduler.OneCycleLR(
                self.plain_optimizer, config.learning_rate, total_steps=steps, pct_start=0.2
            )
        return schedule_of(config, self.plain_optimizer, self.max_steps, processes)

    def resume(self) -> int:
        """Restore the checkpoint to go on from, if there is one; micro steps done."""
        self.first = self.checkpoints.load(self.checkpoint, self.max_steps) if self.checkpoint else 0
        return self.first * self.micro_steps

    def run(self, terms: Callable[[int], dict[str, Tensor]], desc: str, barrier: Barrier | None = None) -> float:
        """Train to the end; seconds. `terms(step)` gives the parts of the loss on the next batches.

        Raises:
            FloatingPointError: a loss or weights that are not finite.
        """
        return train(
            self.accelerator,
            self.models,
            self.parameters,
            self.optimizer,
            self.schedule,
            terms,
            self.config,
            self.checkpoints,
            self.history,
            range(self.first, self.max_steps),
            barrier,
            desc=desc,
        )
