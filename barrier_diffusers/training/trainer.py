"""What one training run holds: accelerator, networks, optimizer, schedule, checkpoints and the losses so far."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    synchronize_rng_states,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.training.checkpoints import Checkpoints, Interruption
from barrier_diffusers.training.run_config import RunConfig, StageConfig
from barrier_diffusers.training.sharding import WholeNetwork, sharding_plugin, use_on_cpu

ONE_CYCLE = "one_cycle"
BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {remaining}{postfix}"  # three losses fit 80 columns with it
# processes wait for the first one while it draws images or certifies, which may take hours; where one of them dies,
# the launcher ends the others. Without this the group gives up after ten minutes (NCCL)
GROUP_TIMEOUT = timedelta(days=30)

Terms = Callable[[int], dict[str, Tensor]]  # step -> the parts of the loss on the next batches


def refuse_lone_processes(accelerator: Accelerator) -> None:
    """A ValueError if several processes were started that do not know of one another: each would do the whole run, in
    the same folder."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if "LOCAL_RANK" in os.environ and started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but they are no group, as accelerate found no GPU: launch with "
            "--num_processes 1, or set the environment variable ACCELERATE_USE_CPU=true for a group of CPU processes"
        )


def refuse_precision(mixed_precision: str, device_type: str) -> None:
    """A ValueError for a precision that nothing here trains in, or not on this kind of device."""
    if mixed_precision not in ("no", "fp16", "bf16"):
        raise ValueError(f"mixed_precision {mixed_precision} is not supported: use bf16, fp16 or no")
    if device_type == "cpu" and mixed_precision == "fp16":
        raise ValueError(
            "mixed_precision fp16 needs a GPU: on a CPU accelerate switches on neither autocast nor the scaling of "
            "the loss; use bf16 or no"
        )


def make_accelerator(config: RunConfig, *, logs_in: str, data_seed: int | None) -> Accelerator:
    """The accelerator of a run, whose settings get its precision where they leave that to it. Nothing is written yet.

    Args:
        logs_in: folder of the trackers' files.
        data_seed: of the order of shuffled batches; None: the global generator's seed at the time they are prepared.

    Raises:
        ValueError: fp16 on a CPU, a precision other than fp16 and bf16, processes that form no group, or the weights
            are to be shared out between them in a way that cannot work.
    """
    plugin = sharding_plugin(config)
    accelerator = Accelerator(
        fsdp_plugin=plugin,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=logs_in,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=data_seed),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    refuse_lone_processes(accelerator)
    refuse_precision(accelerator.mixed_precision, accelerator.device.type)
    if plugin is not None:
        use_on_cpu(accelerator, plugin)
    config.mixed_precision = accelerator.mixed_precision  # type: ignore[assignment]  # what the run's records say
    return accelerator


def open_run(config: RunConfig) -> Accelerator:
    """The accelerator of a run with its logs in the output folder; see `make_accelerator`."""
    return make_accelerator(config, logs_in=config.output_dir, data_seed=config.seed)


def schedule_of(stage: StageConfig, optimizer: Any, num_steps: int, num_processes: int) -> Any:
    """The learning rate over `num_steps` steps of the run; a prepared schedule takes a step for each process."""
    if stage.lr_scheduler == ONE_CYCLE:
        warmup = stage.lr_warmup_steps / num_steps if stage.lr_warmup_steps else stage.ONE_CYCLE_WARMUP
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, stage.learning_rate, total_steps=num_steps * num_processes, pct_start=warmup
        )
    return get_scheduler(
        stage.lr_scheduler,
        optimizer,
        num_warmup_steps=stage.lr_warmup_steps * num_processes,
        num_training_steps=num_steps * num_processes,
    )


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


class Averages(EMAModel):
    """diffusers' exponential moving average of weights, in a form that checkpoints take."""

    def state_dict(self) -> dict[str, Any]:
        """Without the copy of the weights that `store` makes."""
        state = super().state_dict()
        state.pop("temp_stored_params", None)
        return state


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
        """The numbers, in the order of the tensor."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values.tolist()


class Trainer:
    """What a stage of a run trains with, and the loop that does it: `prepare` once, then `fit`, and `finish` when
    what was trained is saved, or `end_run` after the last stage.

    Args:
        config: of the whole run; checkpoints remember it.
        stage: the part of it that is run now; by default the run has one and `config` describes it.
        folder: gets the checkpoints; by default output_dir.

    Attributes:
        checkpoint: folder to go on from; None for a run from the start.
        max_steps, first_step: number of steps of the whole stage, and of those done before; set by `prepare`.
        models: the prepared networks.

    Raises:
        ValueError: a checkpoint to go on from that there is not, or that is damaged or another run's.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: RunConfig,
        stage: StageConfig | None = None,
        folder: Path | None = None,
    ):
        self.accelerator, self.config = accelerator, config
        self.stage = stage if stage is not None else cast(StageConfig, config)
        output = folder or Path(config.output_dir)
        self.checkpoints = Checkpoints(accelerator, output, config, config.checkpoints_total_limit)
        self.checkpoint = self.checkpoints.find(config.resume_from_checkpoint)
        if accelerator.is_main_process:
            self.checkpoints.remove_leftovers()
        self.history = self.checkpoints.states["history"] = History()
        self.models: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.optimizer: Any = None
        self.schedule: Any = None
        self.max_steps = self.first_step = 0
        self._shared: list[WholeNetwork] = []  # networks that are shared out over the processes

    def prepare(
        self,
        *,
        models: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loaders: Sequence[DataLoader],
        extra_steps: int = 0,
    ) -> list[Iterator[Any]]:
        """Hand everything to accelerate and restore the checkpoint, if there is one; endless batches of each loader.

        What else travels with the checkpoints has to be in `checkpoints.states` by now.

        Args:
            models: the networks that train.
            parameters: what the optimizer changes.
            loaders: an epoch is a pass over the first one.
            extra_steps: that follow the settings' own unless `fit` is told that it is done.

        Raises:
            ValueError: the checkpoint does not fit.
        """
        accelerator, stage, micro_steps = self.accelerator, self.stage, self.config.gradient_accumulation_steps
        self.parameters = list(parameters)
        self._shared = [WholeNetwork(model) for model in models] if accelerator.is_fsdp2 else []
        names = {parameter: name for model in models for name, parameter in model.named_parameters()}
        prepared = accelerator.prepare(*models, optimizer, *loaders)
        self.models, self.optimizer = list(prepared[: len(models)]), prepared[len(models)]
        if self._shared:  # of one model, as accelerate asks; its shares are other parameters
            now = dict(self.models[0].named_parameters())
            self.parameters = [now[names[parameter]] for parameter in parameters]
        del names  # it holds the whole ones
        loaders = prepared[len(models) + 1 :]
        own_steps = stage.max_train_steps or stage.num_train_epochs * -(-len(loaders[0]) // micro_steps)
        self.max_steps = own_steps + extra_steps
        schedule = schedule_of(stage, optimizer, self.max_steps, accelerator.num_processes)
        self.schedule = accelerator.prepare(schedule)
        if not accelerator.trackers:  # another stage has them already
            accelerator.init_trackers("logs")
        if self.checkpoint is not None:
            self.first_step = self.checkpoints.load(self.checkpoint, self.max_steps)
        return [endless(loader, self.first_step * micro_steps) for loader in loaders]

    def fit(
        self,
        terms: Terms,
        *,
        barrier: Barrier | None = None,
        after_step: Callable[[int], None] | None = None,
        is_done: Callable[[int], bool] | None = None,
        desc: str = "unlearning",
        names: Sequence[str] = (),
    ) -> float:
        """Run the steps that are left; the seconds they took. Checkpoints are written as the settings say, when a
        signal ends the run, and at the end: whatever happens before `finish`, the training is not lost.

        The host waits for the device once in a step, for the parts of the loss, while the device works on the
        gradients. They are means over micro-steps and processes, and are looked at before the weights change.

        Args:
            terms: with gradient; their sum is minimised. `history` gets the mean of each over the micro-steps and
                processes of every step.
            barrier: projects after each step; its loss, if any, is one of the terms.
            after_step: called with the number of steps done.
            is_done: whether that number is enough; called before each step, with the same answer in all processes. The
                `max_steps` are those done from then on.
            desc: of the progress bar.
            names: parts that the history has even where `terms` never gives them, as zeros.

        Raises:
            FloatingPointError: a loss or the weights became non-finite.
            SystemExit: a signal came; a whole checkpoint was written.
        """
        accelerator, checkpoints, every = self.accelerator, self.checkpoints, self.config.checkpointing_steps
        steps = range(self.first_step, self.max_steps)
        progress = tqdm(
            steps, desc=desc, bar_format=BAR, dynamic_ncols=True, disable=not accelerator.is_local_main_process
        )
        start = time.perf_counter()
        with Interruption(accelerator) as interruption:
            for step in progress:
                if is_done is not None and is_done(step):
                    self.max_steps = step
                    break
                sums, flags = self._step(step, terms, barrier, interruption)
                means = dict.fromkeys(names, 0.0) | sums
                self.history.append(**means)
                accelerator.log({f"loss/{name}": value for name, value in means.items()}, step=step + 1)
                progress.set_postfix({name: f"{value:.2g}" for name, value in means.items()})
                stop = flags > 0 if accelerator.num_processes > 1 else interruption.requested
                due = every is not None and (step + 1) % every == 0
                if (stop or due) and step + 1 < self.max_steps:
                    checkpoints.save(step + 1, self.parameters, barrier)
                    if stop:
                        interruption.leave()
                if after_step is not None:
                    after_step(step + 1)
            checkpoints.check_weights(self.parameters, self.max_steps)
            if self.first_step < self.max_steps:
                checkpoints.save(self.max_steps, self.parameters, barrier, after_training=True)
                if stop:
                    interruption.leave()
        seconds = time.perf_counter() - start
        accelerator.wait_for_everyone()
        for model in self.models:
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # gives a network its own forward back
        for network in self._shared:
            network.restore()
        if self._shared and barrier is not None:
            barrier.follow_model()
        return round(seconds, 2)

    def finish(self) -> None:
        """The result is whole: what was kept of the training for a run that is stopped before is dropped."""
        if self.accelerator.is_main_process:
            self.checkpoints.drop_trained()
        self.accelerator.wait_for_everyone()

    def end_run(self) -> None:
        """`finish`, then leave the trackers and the group of processes; nothing trains afterwards.

        In this order, as a group that the interpreter deletes with a network that still belongs to it may hang: the
        networks go first, then the last word between the processes, then the group.
        """
        self.finish()
        self.models, self.optimizer, self.schedule = [], None, None
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _step(
        self, step: int, terms: Terms, barrier: Barrier | None, interruption: Interruption
    ) -> tuple[dict[str, float], float]:
        """One step of the optimizer: the mean of each part of the loss, and the share of processes with a signal."""
        accelerator, micro_steps = self.accelerator, self.config.gradient_accumulation_steps
        sums: dict[str, Tensor] = {}
        for _ in range(micro_steps):
            with accelerator.accumulate(*self.models):
                parts = terms(step)
                for name, value in parts.items():
                    part = value.detach().float() / micro_steps
                    sums[name] = sums[name] + part if name in sums else part
                if accelerator.sync_gradients:
                    numbers = torch.stack([*sums.values(), interruption.flag(accelerator.device)])
                    arriving = HostCopy(accelerator.reduce(numbers, "mean"))
                accelerator.backward(torch.stack(list(parts.values())).sum())
                if accelerator.sync_gradients:
                    if self.config.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                    *values, flags = arriving.read()
                    means = dict(zip(sums, values, strict=True))
                    self.checkpoints.check_losses(means, step + 1)
                self.optimizer.step()
                if barrier is not None and accelerator.sync_gradients:
                    barrier.project()
                self.schedule.step()
                self.optimizer.zero_grad()
        return means, flags
