"""Checkpoints that are whole, belong to the run that asks for them, and run no code when they are read."""

from __future__ import annotations

import json
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import load as load_weights_only
from torch import Tensor

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.sharding import own_part
from barrier_diffusers.training.run_config import LEVEL_SCHEDULERS
from barrier_diffusers.utils.checks import flat
from barrier_diffusers.utils.files import WriteError, file_hash, put_in_place, remove, removed_on_failure, write_json
from barrier_diffusers.utils.signals import SIGNALS, say_stopped, set_way_on

CHECKPOINT_NAME = "checkpoint.json"


SHARED_MODEL = "pytorch_model_fsdp.bin"  # accelerate's name for a network that processes share; no pickle is run


# settings that a resumed run may change, as they decide about no weight: places, amounts, and what is looked at
FREE = frozenset(
    ("output_dir", "cache_dir", "overwrite_output_dir", "merge_adapter", "evaluation", "report_to")
    + ("max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit")
    + ("resume_from_checkpoint", "validation_prompt", "validation_steps")
    + ("push_to_hub", "hub_model_id", "hub_private", "report_artifact")
)


SIZE = "image size"  # the input that says what a resolution left to the model is
LEFT_OPEN = ("generation.batch_size", "resolution")  # had numbers for defaults; None now means what fits the model
LENGTH = ("max_train_steps", "num_train_epochs")  # decide about weights after all where the learning rate follows them


class Stateful(Protocol):
    """What travels with the checkpoints beside model, optimizer, schedule and random numbers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def deciding_settings(config: Any, num_processes: int) -> dict[str, Any]:
    """The settings that decide about the weights, by dotted name, as JSON gives them back."""
    values = asdict(config)
    free = FREE - set(LENGTH) if values.get("lr_scheduler", "constant") not in LEVEL_SCHEDULERS else FREE
    deciding = dict(flat({name: value for name, value in values.items() if name not in free}))
    return json.loads(json.dumps({"num_processes": num_processes, **deciding}, default=str))


def default_settings(config: Any) -> dict[str, Any]:
    """The defaults of a settings dataclass by dotted name, without the fields that must be given."""
    found: dict[str, Any] = {}
    for setting in fields(config):
        value = setting.default_factory() if setting.default_factory is not MISSING else setting.default
        if value is not MISSING:
            found[setting.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(dict(flat(found)), default=str))


def step_of(folder: Path) -> int:
    """N of a folder named step-N."""
    return int(folder.name.removeprefix("step-"))


EARLIER = "custom_checkpoint_*.pkl"  # the states in a checkpoint of a version that wrote no checkpoint.json


def is_of_earlier_version(folder: Path) -> bool:
    """Whether a checkpoint is of a version that wrote neither settings nor hashes."""
    return not (folder / CHECKPOINT_NAME).exists() and any(folder.glob(EARLIER))


@contextmanager
def without_states(folder: Path) -> Iterator[Path]:
    """A folder with links to the files that accelerate reads alone: it refuses states that it has no object for."""
    if not is_of_earlier_version(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        for path in folder.iterdir():
            if not path.match(EARLIER):
                (Path(temporary) / path.name).symlink_to(path.resolve())
        yield Path(temporary)


def read_state(folder: Path, name: str) -> Any:
    """A state of a checkpoint; one of an earlier version does not name them, but only losses have `values`."""
    if (folder / f"{name}.bin").is_file() or not is_of_earlier_version(folder):
        return load_weights_only(folder / f"{name}.bin")
    states = [load_weights_only(path) for path in sorted(folder.glob(EARLIER))]
    return next(state for state in states if ("values" in state) == (name == "history"))


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The content of checkpoint.json, after a look at every file: {"step", "settings", "files": name -> SHA-256}.

    One of a version that wrote no such file has its step alone, and a warning.

    Raises:
        ValueError: a file is missing, changed or cut off, or is no part of the checkpoint.
    """
    if is_of_earlier_version(folder):
        print(
            f"warning: checkpoint {str(folder)!r} was written by an earlier version, without hashes and settings: see "
            "yourself that it is whole and of a run with these settings",
            file=sys.stderr,
        )
        return {"step": step_of(folder)}
    try:
        content = json.loads((folder / CHECKPOINT_NAME).read_text(encoding="utf-8"))
        step, files, _ = int(content["step"]), dict(content["files"]), dict(content["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {str(folder)!r} is incomplete: no readable {CHECKPOINT_NAME}") from error
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {CHECKPOINT_NAME}
    model = SHARED_MODEL if SHARED_MODEL in files else "model.safetensors"
    wanted = {model, "optimizer.bin", "scheduler.bin", *files}
    if wanted - there:
        raise ValueError(f"checkpoint {str(folder)!r} is incomplete: {', '.join(sorted(wanted - there))} is missing")
    for name, digest in sorted(files.items()):
        if file_hash(folder / name) != digest:
            raise ValueError(f"checkpoint {str(folder)!r} is damaged: {name} is not as it was written")
    if there - set(files):
        foreign = ", ".join(sorted(there - set(files)))
        raise ValueError(f"checkpoint {str(folder)!r} holds files that are no part of it: {foreign}")
    return {**content, "step": step}


class Checkpoints:
    """The folders output_dir/checkpoints/step-N of one run.

    Args:
        config: the run's settings, a dataclass, as the user gave them; they are written into every checkpoint.
        limit: how many are kept; None: all.
    """

    def __init__(self, accelerator: Accelerator, output: Path, config: Any, limit: int | None):
        self.accelerator, self.root, self.limit = accelerator, output / "checkpoints", limit
        self.settings = deciding_settings(config, accelerator.num_processes)
        self.defaults = default_settings(config)
        if self.settings.get("mixed_precision", "") is None:  # as earlier versions wrote it
            self.settings["mixed_precision"] = accelerator.mixed_precision
        self.defaults["mixed_precision"] = "no"
        self.states: dict[str, Stateful] = {}
        self.inputs: dict[str, str] = {}  # base, data -> SHA-256; written into every checkpoint, and compared
        self.last: Path | None = None  # read or written by this run

    @property
    def folders(self) -> list[Path]:
        """All there are, oldest first."""
        found = [path for path in self.root.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return sorted(found, key=step_of)

    def find(self, name: str | None) -> Path | None:
        """The checkpoint to resume from: a folder, or the newest whole one for "latest" (None if there is none yet).

        Raises:
            ValueError: no such checkpoint, one that is not whole, or one of a run with other settings.
        """
        if name is None:
            return None
        if name != "latest":
            named = [path for path in (Path(name), self.root / name) if path.is_dir()]
            if not named:
                raise ValueError(f"no checkpoint {name!r}; {self.root} has {[path.name for path in self.folders]}")
            self._compare(named[0], read_checkpoint(named[0]).get("settings"))
            return named[0]
        broken: list[ValueError] = []
        for folder in reversed(self.folders):
            try:
                content = read_checkpoint(folder)
            except ValueError as error:
                broken.append(error)
                continue
            self._compare(folder, content.get("settings"))
            for reason in broken if self.accelerator.is_main_process else []:
                print(f"warning: {reason}; going on from {folder.name}", file=sys.stderr)
            return folder
        if broken:
            raise ValueError(f"{broken[0]}; {self.root} has no whole one: delete that folder to start anew")
        return None

    def _compare(self, folder: Path, settings: dict[str, Any] | None) -> None:
        """Refuse a run with other settings. One that the checkpoint does not know, as its version had no such setting,
        must have its default."""
        if settings is None:
            return
        names = sorted(set(settings) | set(self.settings))
        then = self.defaults | settings
        pairs = [(name, then.get(name, "absent"), self.settings.get(name, "absent")) for name in names]
        pairs = [pair for pair in pairs if pair[0] not in LEFT_OPEN or pair[2] is not None]
        other = [f"{name} was {was!r} and is {now!r}" for name, was, now in pairs if was != now]
        if other:
            raise ValueError(
                f"checkpoint {str(folder)!r} belongs to a run with other settings: {'; '.join(other)}. "
                "Give the settings it was written with, or start anew in another output_dir"
            )

    def _compare_inputs(self, folder: Path, inputs: Mapping[str, str] | None) -> None:
        if not self.inputs:
            return
        if inputs is None:
            if self.accelerator.is_main_process:
                print(
                    f"warning: checkpoint {str(folder)!r} was written by an earlier version, which did not note base "
                    "model and data: see yourself that they are still the same",
                    file=sys.stderr,
                )
            return
        other = [name for name, digest in self.inputs.items() if inputs.get(name, digest) != digest]
        if other:
            raise ValueError(
                f"checkpoint {str(folder)!r} belongs to a run with another {' and other '.join(other)}: what the "
                "settings name is not what it was. Give what it was written with, or start anew in another output_dir"
            )

    def load(self, folder: Path, max_steps: int) -> int:
        """Restore everything from a checkpoint that `find` returned; the number of steps done.

        Raises:
            ValueError: it is of another base model or other data, has more steps than the run, its states do not fit,
                or a file holds a pickle of more than numbers, which could run code.
        """
        content: dict[str, Any] = {"step": step_of(folder)} if is_of_earlier_version(folder) else {}
        content = content or json.loads((folder / CHECKPOINT_NAME).read_text(encoding="utf-8"))
        step = int(content["step"])
        side, then = self.inputs.get(SIZE), content.get("settings", {}).get("resolution")
        if side is not None and then is not None and str(then) != side:
            raise ValueError(f"checkpoint {str(folder)!r} is of images of {then} pixels, not {side}: set resolution")
        self._compare_inputs(folder, content.get("inputs"))
        if step > max_steps:
            raise ValueError(f"checkpoint {str(folder)!r} has {step} steps, the run only {max_steps}")
        try:
            with without_states(folder) as readable:
                self.accelerator.load_state(str(readable))
            for name, state in self.states.items():  # not accelerate's way: it reads them with weights_only=False
                state.load_state_dict(read_state(folder, name))
            generators = load_weights_only(folder / f"random_states_{self.accelerator.process_index}.pkl")
            if not torch.equal(torch.get_rng_state(), generators["torch_manual_seed"]):  # accelerate keeps silent then
                raise ValueError("the state of the random numbers could not be restored")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {str(folder)!r} is refused: a file holds a pickle of more than numbers, which could run "
                "code. Do not use checkpoints of people you do not trust"
            ) from error
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            said = str(error).split("\n")[0]
            raise ValueError(f"checkpoint {str(folder)!r} does not fit this run: {said}") from error
        self._take_note(folder)
        return step

    def _take_note(self, folder: Path) -> None:
        """A run that is stopped from now on, in training or after it, goes on from this whole checkpoint."""
        self.last = folder
        set_way_on(
            f"checkpoint {folder} is whole; the same command with --resume_from_checkpoint latest goes on from it"
        )

    def save(
        self, step: int, parameters: Iterable[Tensor], barrier: Barrier | None, after_training: bool = False
    ) -> Path:
        """Save training state and regions as step-N, whole or not at all; drop the oldest beyond the limit.

        Args:
            after_training: it is kept beside the others, until `drop_trained`.

        Raises:
            FloatingPointError: non-finite parameters.
            WriteError: a full disk and the like; the checkpoints before stay as they are.
        """
        self.check_weights(parameters, step)
        folder, temporary = self.root / f"step-{step}", self.root / f".step-{step}"
        main = self.accelerator.is_main_process
        try:
            with removed_on_failure(temporary, folder):
                if main:
                    self.remove_leftovers()
                    temporary.mkdir(parents=True)
                self.accelerator.wait_for_everyone()
                self.accelerator.save_state(str(temporary), safe_serialization=True)
                if barrier is not None and (main or self.accelerator.is_fsdp2):  # all processes gather, one writes
                    barrier.save_pretrained(temporary / "barrier")
                self.accelerator.wait_for_everyone()
                if main:
                    self._complete(temporary, {"step": step, "after_training": after_training})
                    put_in_place(temporary, folder)
        except WriteError as error:
            raise WriteError(folder, error.reason, f"free disk space, then go on. {self._way_on}") from error
        self._take_note(folder)
        if main and not after_training:
            stale_first = sorted(self.folders, key=lambda path: (step_of(path) <= step, step_of(path)))
            for old in stale_first[: -self.limit if self.limit else 0]:
                self._drop(old)
        self.accelerator.wait_for_everyone()
        return folder

    def _drop(self, folder: Path) -> None:
        hidden = folder.with_name(f".old-{folder.name}")
        folder.rename(hidden)
        remove(hidden)

    def remove_leftovers(self) -> None:
        """Delete what a run left that was killed while it wrote or dropped a checkpoint."""
        for left in self.root.glob(".*step-*"):
            remove(left)

    def drop_trained(self) -> None:
        """Delete what was kept from the end of the training: the result is whole."""
        for folder in self.folders:
            try:
                content = json.loads((folder / CHECKPOINT_NAME).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if content.get("after_training"):
                self._drop(folder)
        if self.root.is_dir() and not any(self.root.iterdir()):
            self.root.rmdir()

    def _complete(self, temporary: Path, facts: dict[str, Any]) -> None:
        for name, state in self.states.items():
            torch.save(state.state_dict(), temporary / f"{name}.bin")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        digests = {path.relative_to(temporary).as_posix(): file_hash(path) for path in files}
        content = {**facts, "settings": self.settings, "inputs": self.inputs, "files": digests}
        write_json(temporary / CHECKPOINT_NAME, content)

    @property
    def _way_on(self) -> str:
        if self.last is None:
            return "No checkpoint was written before"
        return f"The last whole checkpoint is {str(self.last)!r}: --resume_from_checkpoint {self.last.name}"

    def check_losses(self, losses: Mapping[str, float], step: int) -> None:
        """A FloatingPointError that names the terms, the step and what is left, unless all terms are finite."""
        bad = [f"{name} is {value}" for name, value in losses.items() if not abs(value) < float("inf")]
        if bad:
            self._diverged(f"non-finite loss at step {step}: {', '.join(bad)} ({dict(losses)})")

    def check_weights(self, parameters: Iterable[Tensor], step: int) -> None:
        """The same for the weights after a step."""
        finite = [own_part(parameter.detach()).isfinite().all() for parameter in parameters]
        broken = torch.stack(finite).logical_not().any()
        if self.accelerator.is_fsdp2:  # each process sees its share
            broken = self.accelerator.reduce(broken.float()) > 0
        if broken:
            self._diverged(f"non-finite weights after step {step}")

    def _diverged(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}. {self._way_on}; with the same settings it may come to the same, so start anew in another "
            "output_dir with a lower learning_rate or max_grad_norm, or with mixed_precision no"
        )


class Interruption:
    """Within its block SIGTERM and SIGINT are noted and nothing else; `requested` tells whether one came.

    A signal that the process ignores (nohup) stays ignored. Outside the main thread, where Python handles no signals,
    it does nothing.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is None and self._received is not None:  # it came after the last look
            signal.raise_signal(self._received)

    def flag(self, device: torch.device) -> Tensor:
        """1 if this process got a signal, else 0: to be summed over the processes along with other numbers."""
        return torch.full((), float(self._received is not None), device=device)

    @property
    def requested(self) -> bool:
        """Whether any process of the run got a signal; every process has to ask, at the same step. With several of
        them it waits for the device: a loop that sums `flag` along with its losses does not."""
        if self.accelerator.num_processes == 1:
            return self._received is not None
        if self._received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def leave(self) -> NoReturn:
        """End the process as one that the signal ended: exit status 143 (SIGTERM) or 130 (SIGINT)."""
        status = say_stopped(self._received or signal.SIGTERM)
        self.accelerator.end_training()
        raise SystemExit(status)
