"""Barrier on disk: config as JSON, regions, projections and snapshot as safetensors; no pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.projection import RetainProjection
from barrier_diffusers.protection.region import ForgetRegion, load_tensors, save_tensors
from barrier_diffusers.protection.targets import ProtectedMap, Snapshots

REGIONS_NAME = "barrier_regions.safetensors"


PROJECTIONS_NAME = "barrier_projections.safetensors"


SNAPSHOT_NAME = "barrier_snapshot.safetensors"


class Fit(Protocol):
    """What is kept for one distinct input."""

    @property
    def num_features(self) -> int: ...

    def to_tensors(self) -> dict[str, Tensor]: ...


FitT = TypeVar("FitT", bound=Fit)


Groups = Sequence[tuple[Sequence[ProtectedMap], FitT]]


@dataclass
class BarrierState:
    """All that a Barrier knows beyond its config."""

    weights: str  # "full" or "adapter"
    regions: list[tuple[list[ProtectedMap], ForgetRegion]] = field(default_factory=list)
    projections: list[tuple[list[ProtectedMap], RetainProjection]] = field(default_factory=list)
    snapshots: Snapshots = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)  # the same of parameters that train beside the maps'


def save_state(folder: Path, config: BarrierConfig, state: BarrierState) -> None:
    """Write barrier_config.json and what there is of regions, projections (each once) and snapshot."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.has_penalty:
        _save_groups(folder / REGIONS_NAME, state.regions, state.weights)
    if config.has_projection:
        _save_groups(folder / PROJECTIONS_NAME, state.projections, state.weights)
    if state.snapshots:
        parts = {f"{name}.weight": weight for name, (weight, _) in state.snapshots.items()}
        biases = {f"{name}.bias": bias for name, (_, bias) in state.snapshots.items() if bias is not None}
        save_tensors(folder / SNAPSHOT_NAME, {**parts, **biases, **state.rest}, {})
    config.save_pretrained(folder)


def load_state(folder: Path, config: BarrierConfig, maps: Sequence[ProtectedMap], weights: str) -> BarrierState:
    """What `save_state` wrote, for a model with these maps.

    Raises:
        ValueError: missing files, or files that do not fit the maps.
    """
    state = BarrierState(weights)
    if config.has_penalty:
        state.regions = _load_groups(folder / REGIONS_NAME, maps, weights, ForgetRegion.from_tensors, "region")
    if config.has_projection:
        read = RetainProjection.from_tensors
        state.projections = _load_groups(folder / PROJECTIONS_NAME, maps, weights, read, "projection")
    if weights == "full":
        state.snapshots = _load_snapshots(folder, maps)
    return state


def _save_groups(path: Path, groups: Groups[Any], weights: str) -> None:
    tensors = {
        f"{index}.{key}": value for index, (_, fit) in enumerate(groups) for key, value in fit.to_tensors().items()
    }
    names = json.dumps([[linear_map.name for linear_map in maps] for maps, _ in groups])
    save_tensors(path, tensors, {"maps": names, "weights": weights})


def _load_groups(
    path: Path, maps: Sequence[ProtectedMap], weights: str, read: Callable[[dict[str, Tensor]], FitT], what: str
) -> list[tuple[list[ProtectedMap], FitT]]:
    folder = str(path.parent)
    tensors, metadata = load_tensors(path)
    if metadata["weights"] != weights:
        raise ValueError(f"{folder!r} was saved for {metadata['weights']} weights; this model trains {weights} ones")
    by_name = {linear_map.name: linear_map for linear_map in maps}
    names: list[list[str]] = json.loads(metadata["maps"])
    if sorted(name for group in names for name in group) != sorted(by_name):
        raise ValueError(f"the {what}s in {folder!r} belong to other maps than the targets of this model")
    groups = []
    for index, group_names in enumerate(names):
        prefix = f"{index}."
        fit = read({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
        for name in group_names:
            if by_name[name].num_features != fit.num_features:
                raise ValueError(
                    f"the {what} of {name} has {fit.num_features} input features, "
                    f"but the map has {by_name[name].num_features}"
                )
        groups.append(([by_name[name] for name in group_names], fit))
    return groups


def _load_snapshots(folder: Path, maps: Sequence[ProtectedMap]) -> Snapshots:
    saved, _ = load_tensors(folder / SNAPSHOT_NAME)
    snapshots: Snapshots = {}
    for linear_map in maps:
        weight0, bias0 = saved.get(f"{linear_map.name}.weight"), saved.get(f"{linear_map.name}.bias")
        shapes = [None if value is None else value.shape for value in (weight0, bias0)]
        expected = [None if value is None else value.shape for value in (linear_map.layer.weight, linear_map.bias)]
        if weight0 is None or shapes != expected:
            raise ValueError(f"the snapshot in {str(folder)!r} does not fit {linear_map.name}")
        snapshots[linear_map.name] = (weight0, bias0)
    return snapshots


def load_rest(folder: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The snapshot of parameters that train beside the maps', by name.

    Raises:
        ValueError: the barrier was saved for other ones.
    """
    if not parameters:
        return {}
    saved, _ = load_tensors(folder / SNAPSHOT_NAME)
    for name, parameter in parameters.items():
        if name not in saved or saved[name].shape != parameter.shape:
            raise ValueError(f"the snapshot in {str(folder)!r} has no {name}: it was made while the targets trained")
    return {name: saved[name] for name in parameters}
