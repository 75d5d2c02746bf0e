"""What a run leaves beside its weights: the names of its files, its manifest, and the folder it claims."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from barrier_diffusers.utils.files import require_writable


def fingerprint(*parts: Any) -> str:
    """A short stable hash of settings (anything json can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


MANIFEST_NAME = "manifest.json"


METRICS_NAME = "metrics.json"


PACKAGES = ("barrier-diffusers", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy")


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
            MANIFEST_NAME in entries or "barrier_config.json" in entries
        ):  # an earlier run of ours: nothing of it may be left over
            for name in entries:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


NAMES = ("attack", "protocol", "concept", "name")  # keys that name an entry of a list of results


NOT_RESULTS = ("settings", "hashes", "versions", "machine", "history", "budget", "sampling", "seeds")


def numbers(content: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every finite number among results; settings, hashes and the like are left out."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name not in NOT_RESULTS:
                yield from numbers(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(content, list):
        for index, entry in enumerate(content):
            if isinstance(entry, Mapping):
                named = [str(entry[name]) for name in NAMES if isinstance(entry.get(name), str)]
                yield from numbers(entry, f"{prefix}.{'.'.join(named) or index}")
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield prefix, float(content)
