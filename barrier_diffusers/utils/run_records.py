"""What a run leaves beside its weights: the names of its files, and its manifest."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from barrier_diffusers.utils.files import file_hash


def fingerprint(*parts: Any) -> str:
    """A short stable hash of settings (anything json can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


MANIFEST_NAME = "manifest.json"


METRICS_NAME = "metrics.json"


PACKAGES = ("barrier-diffusers", "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "numpy")


FILES = "files"  # name -> SHA-256, in the manifest of a folder in a cache


def hashes_of(folder: Path, below: str = ".") -> dict[str, str]:
    """Path in a folder -> SHA-256 of every file below one of its folders, hidden ones left out."""
    files = sorted(path for path in (folder / below).rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


def read_hashes(folder: Path) -> dict[str, str]:
    """The hashes in a folder's manifest; empty if there are none, as in those of earlier versions."""
    try:
        content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(content.get(FILES, {})) if isinstance(content, dict) else {}


def check_hashes(folder: Path, there: Mapping[str, str]) -> None:
    """Refuse files that are not those of the folder's manifest.

    Args:
        there: path in the folder -> SHA-256 of what there is now.

    Raises:
        ValueError: names a file that is missing, has changed, or is none of them.
    """
    wanted = read_hashes(folder)
    for what, names in {
        "is missing": wanted.keys() - there.keys(),
        "was not made with the others": there.keys() - wanted.keys(),
        "is not as it was made": {name for name in wanted.keys() & there.keys() if wanted[name] != there[name]},
    }.items():
        if names:
            raise ValueError(
                f"{str(folder / min(names))!r} {what}: delete the folder {str(folder)!r} to make it again"
            )


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


NAMES = ("attack", "protocol", "concept", "name")  # keys that name an element of a list of results


NOT_RESULTS = ("settings", "hashes", "versions", "machine", "history", "budget", "sampling", "seeds")


def numbers(content: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every finite number among results; settings, hashes and the like are left out."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            if name not in NOT_RESULTS:
                yield from numbers(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(content, list):
        for index, element in enumerate(content):
            if isinstance(element, Mapping):
                named = [str(element[name]) for name in NAMES if isinstance(element.get(name), str)]
                yield from numbers(element, f"{prefix}.{'.'.join(named) or index}")
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield prefix, float(content)
