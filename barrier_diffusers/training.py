"""What the accelerate scripts share: output folder, data order, batches as steps, manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import synchronize_rng_states
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
PACKAGES = ("barrier-diffusers", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy")


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
