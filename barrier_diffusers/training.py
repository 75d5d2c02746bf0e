"""What the accelerate scripts share: command line, output folder, data order, manifest."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    synchronize_rng_states,
)
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from barrier_diffusers.architectures import components
from barrier_diffusers.config import CONFIG_NAME
from barrier_diffusers.denoising import Denoising
from barrier_diffusers.files import put_in_place
from barrier_diffusers.objectives import DiffusionStep, ObjectiveConfig
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.reference import FrozenReference
from barrier_diffusers.sampling import PartialSampler

MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.json"
# what `accelerate launch` sets for each way to share out weights
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
PACKAGES = ("barrier-diffusers", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy")


def run_script(main: Callable[[Any], None], config_class: type | Callable[[list[str]], Any]) -> None:
    """Read `config_class` from `--config FILE.yaml` and dotted flags, then run `main`.

    In place of the class a function may read the command line itself.

    A mistake of the user (ValueError, OSError, FloatingPointError) ends in one line on stderr and exit status 1; a bad
    flag in exit status 2. Set BARRIER_TRACEBACK=1 to see where an error came from.
    """
    try:
        read = partial(parse_config, config_class) if isinstance(config_class, type) else config_class
        config = read(sys.argv[1:])
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        files = [value for word, value in zip(sys.argv, sys.argv[1:], strict=False) if word == "--config"]
        where = f" ({', '.join(files)})" if "parsing config" in _message(error) else ""  # which does not name its file
        raise SystemExit(_fail(error, 2, where)) from error
    try:
        main(config)
    except KeyboardInterrupt as error:  # while training, Ctrl-C ends the step first (interruption.py)
        print("stopped by SIGINT, not while training: start it again", file=sys.stderr)
        raise SystemExit(130) from error
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("BARRIER_TRACEBACK"):
            raise
        raise SystemExit(_fail(error, 1)) from error


def list_fields(config_class: type, prefix: str = "") -> dict[str, bool]:
    """Dotted name of every field of a settings dataclass that takes a list -> whether a bare string will do, too."""
    found: dict[str, bool] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        for entry in kinds:
            if is_dataclass(entry) and isinstance(entry, type):
                found |= list_fields(entry, f"{prefix}{name}.")
        if any(typing.get_origin(entry) is list for entry in kinds):
            found[prefix + name] = str in kinds
    return found


def join_lists(config_class: type, arguments: list[str]) -> list[str]:
    """`--name A B` as the one word that the parser takes, `--name ["A", "B"]`, where the field is a list."""
    lists, joined, position = list_fields(config_class), list[str](), 0
    while position < len(arguments):
        name = arguments[position]
        end = position + 1
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        words = arguments[position + 1 : end]
        position = end
        field = name.removeprefix("--")
        as_it_is = len(words) == 1 and (lists.get(field) or words[0].startswith("[") or words[0] == "null")
        if field in lists and words and not as_it_is:
            words = [json.dumps(words)]
        joined += [name, *words]
    return joined


def parse_config(config_class: type, arguments: list[str]) -> Any:
    """An instance of a settings dataclass from `--config FILE.yaml` and dotted flags; lists are `[A, B]` or `A B`."""
    parser = ArgumentParser(exit_on_error=False, description=config_class.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_class_arguments(config_class)
    values = vars(parser.instantiate_classes(parser.parse_args(join_lists(config_class, arguments))))
    values.pop("config")
    return config_class(**values)


@functools.cache  # building one takes longer than using it, and a sweep checks every trial
def _parser_of(config_class: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class)
    return parser


def config_from(config_class: type, values: dict[str, Any]) -> Any:
    """An instance of a settings dataclass from nested mappings, with the checks of the command line.

    Raises:
        ValueError: an unknown field, or a value that the dataclass refuses.
    """
    parser = _parser_of(config_class)
    try:
        return config_class(**vars(parser.instantiate_classes(parser.parse_object(values))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(_message(error)) from error


def _message(error: BaseException) -> str:
    return error.message if isinstance(error, ArgumentError) and error.message else str(error)


def _fail(error: BaseException, status: int, where: str = "") -> int:
    print("error: " + " ".join(_message(error).split()) + where, file=sys.stderr)
    return status


def require_writable(output_dir: str) -> Path:
    """Create a folder if it is not there, and write a file in it to be sure.

    Raises:
        ValueError: it is a file, or not writable.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {output_dir!r} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {output_dir!r} is not writable: {error.strerror}") from error
    return folder


def claim_output_dir(output_dir: str, overwrite: bool, resume: bool) -> Path:
    """Create the output folder, or make sure that an existing one may be used.

    Raises:
        ValueError: it is a file, not writable, or holds another run or other files and `overwrite` is off.
    """
    folder = require_writable(output_dir)
    entries = {entry.name for entry in folder.iterdir()} - {"cache", "logs"}  # left by a run that stopped early
    if entries and not resume:
        if not overwrite:
            what = "another run" if MANIFEST_NAME in entries else "other files"
            raise ValueError(
                f"output_dir {output_dir!r} holds {what}; name another folder or set --overwrite_output_dir"
            )
        if (
            MANIFEST_NAME in entries or CONFIG_NAME in entries
        ):  # an earlier run of ours: nothing of it may be left over
            for name in entries:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


class RunSettings(Protocol):
    """What `open_run` reads of a run's settings."""

    output_dir: str
    overwrite_output_dir: bool
    resume_from_checkpoint: str | None
    seed: int
    gradient_accumulation_steps: int

    @property
    def mixed_precision(self) -> str: ...

    @property
    def report_to(self) -> str: ...


def refuse_sharding() -> None:
    """A ValueError if `accelerate launch` was told to share out the weights, which the loss reads whole in every step.

    Read from the launcher's environment: building the accelerator would already start the processes' work together.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise ValueError(
                f"{name} is not supported: it shares out the weights, which the protection reads whole. Launch plain "
                "data parallelism (accelerate launch --multi_gpu) and, if memory is short, train a LoRA adapter with "
                "gradient checkpointing"
            )


def open_run(config: RunSettings) -> Accelerator:
    """The accelerator of a run, its output folder claimed.

    Raises:
        ValueError: the folder may not be used, or the weights are to be shared out between processes.
    """
    refuse_sharding()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            config.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    if accelerator.is_main_process:
        claim_output_dir(config.output_dir, config.overwrite_output_dir, config.resume_from_checkpoint is not None)
    accelerator.wait_for_everyone()
    return accelerator


def move_into(source: Path, target: Path, last: str) -> None:
    """Move every entry of `source` over its namesake in `target`, the entry `last` at the end, and drop `source`."""
    for entry in sorted(source.iterdir(), key=lambda entry: entry.name == last):
        put_in_place(entry, target / entry.name)
    source.rmdir()


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def module_hashes(pipeline: Any, prefix: str = "") -> dict[str, str]:
    """`module_hash` of each of the pipeline's networks whose name starts with `prefix`."""
    return {name: module_hash(part) for name, part in components(pipeline, prefix).items()}


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide about numbers."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def manifest(config: Any, hashes: dict[str, str], **facts: Any) -> dict[str, Any]:
    """Everything needed to run the same thing again: settings, hashes of weights and data, versions, machine."""
    machine = {"python": platform.python_version(), "system": platform.platform(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
    return {"settings": asdict(config), "hashes": hashes, "versions": package_versions(), "machine": machine, **facts}


def freeze_normalisation(module: nn.Module) -> None:
    """Train mode for everything but normalisation layers, whose running statistics must not follow the forget data."""
    module.train()
    kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    for layer in module.modules():
        if isinstance(layer, kinds):
            layer.eval()


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


class StepMaker:
    """Puts a batch in the form the objectives take, with noise and timesteps drawn for its cached latents, or with
    `sampler` its x_t sampled by the model itself from the prompts alone.

    Args:
        share: (process index, number of processes): draw for the batches of all processes, and take one's own. If all
            have the same random state (`share_random_state`), they do together what one process would.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: Denoising,
        options: ObjectiveConfig | None = None,
        reference: FrozenReference | None = None,
        sampler: PartialSampler | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        self.model, self.diffusion, self.share = model, diffusion, share
        self.options, self.sampler = options or ObjectiveConfig(), sampler
        self.reference = partial(reference, self.run) if reference else None

    def run(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The network's prediction."""
        return self.diffusion.predict(self.model, noisy, timesteps, condition)

    def __call__(self, batch: dict[str, Any]) -> DiffusionStep:
        if self.sampler is not None:
            noisy, timesteps = self.sampler(batch["condition"], batch["unconditional"], batch["index"], self.share)
            target = None
        else:
            moments, (index, processes) = batch["moments"], self.share
            everybodys = moments.repeat(processes, *[1] * (moments.dim() - 1)) if processes > 1 else moments
            drawn = self.diffusion.noised(everybodys)
            own = slice(index * len(moments), (index + 1) * len(moments))
            noisy, timesteps, target = drawn.noisy[own], drawn.timesteps[own], drawn.target[own]
        prompts = (batch["condition"], batch.get("anchor"), batch.get("unconditional"))
        return DiffusionStep(self.run, noisy, timesteps, target, *prompts, self.reference, self.options)


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
