"""From data to regions and projections: the passes over forget and retain batches that the protection is fitted with.

Shapes: B batch, L rows of a sample, D input features.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.frequent_directions import FrequentDirections
from barrier_diffusers.protection.projection import RetainProjection, SecondMoment, fit_projection
from barrier_diffusers.protection.recorder import OnRows, record_inputs
from barrier_diffusers.protection.region import Directions, ForgetRegion, fit_directions, fit_region
from barrier_diffusers.protection.retain_inputs import RetainInputs
from barrier_diffusers.protection.statistics import Moments, ProjectionSketch, is_distributed
from barrier_diffusers.protection.targets import ProtectedMap

ForwardFn = Callable[[nn.Module, Any], Any]


GatheredT = TypeVar("GatheredT", Moments | FrequentDirections, SecondMoment)


def first_tensor(output: Any) -> Tensor | None:
    """The tensor in what forward_fn returned: itself, .sample, .logits, or the first of a tuple."""
    for name in ("sample", "logits"):
        output = getattr(output, name, output)
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@contextmanager
def kept_random_state(model: nn.Module, loader: Any = None) -> Iterator[None]:
    """Leave every random state as it was: torch's (CPU and the model's GPUs), numpy's, Python's, the loader's own."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    owners = (loader, getattr(loader, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    generators = [(owned, owned.get_state()) for owned in found if isinstance(owned, torch.Generator)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(list(gpus)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in generators:
            generator.set_state(state)


def in_all_processes(run: Callable[[], dict[str, str]], device: torch.device) -> dict[str, str]:
    """Run a pass; if it fails in one process, fail in all of them instead of waiting for ever for the missing one.

    Raises:
        RuntimeError: the pass failed in another process.
    """
    error: Exception | None = None
    result: dict[str, str] = {}
    try:
        result = run()
    except Exception as caught:
        error = caught
    if is_distributed():
        failed = torch.tensor([float(error is not None)], device=device)
        dist.all_reduce(failed)
        if error is None and failed.item() > 0:
            raise RuntimeError("recording failed in another process; its error says why")
    if error is not None:
        raise error
    return result


def into_moments(
    gathered: dict[str, GatheredT],
    kind: Callable[[int, torch.device], GatheredT],
    only: Callable[[int], bool] | None = None,
) -> OnRows:
    """Adds recorded rows to the moments of their input, each a `kind` of its own.

    Args:
        only: of which numbers of features; None: of any.
    """

    def update(leader: str, rows_BLD: Tensor) -> None:
        if only is not None and not only(rows_BLD.shape[-1]):
            return
        if leader not in gathered:
            gathered[leader] = kind(rows_BLD.shape[-1], rows_BLD.device)
        gathered[leader].update(rows_BLD.flatten(0, 1))

    return update


def into_sketches(sketches: dict[str, ProjectionSketch], directions: dict[str, Directions]) -> OnRows:
    """Projects recorded rows on the directions of their input and adds them to its sketch."""

    frames = {name: (known.mean_D.float(), known.basis_DK.float()) for name, known in directions.items()}

    def update(leader: str, rows_BLD: Tensor) -> None:
        mean_D, basis_DK = frames[leader]
        sketches[leader].update((rows_BLD.flatten(0, 1).float() - mean_D) @ basis_DK)

    return update


@dataclass
class Fitted:
    """One element per distinct input: the maps that read it, the one that runs first in front, and what was fitted."""

    regions: list[tuple[list[ProtectedMap], ForgetRegion]] = field(default_factory=list)
    projections: list[tuple[list[ProtectedMap], RetainProjection]] = field(default_factory=list)


@dataclass
class Passes:
    """The passes over the data, each from the random state of the caller, who gets it back unchanged.

    A forward function that draws noise draws the same noise in every pass over the same data.
    """

    model: nn.Module
    maps: Sequence[ProtectedMap]
    forward_fn: ForwardFn

    def record(
        self, loader: Any, what: str, on_rows: OnRows, leader_of: dict[str, str] | None = None
    ) -> dict[str, str]:
        """Run the model over the loader; map name -> its leader (see `record_inputs`)."""
        return self._guarded(loader, lambda: self._record(self.maps, loader, what, on_rows, leader_of))

    def retain(
        self, loader: Any, given: RetainInputs, on_rows: OnRows, leader_of: dict[str, str] | None
    ) -> dict[str, str]:
        """The retain rows of every map: read from what is given where it covers the map, else recorded."""

        def run() -> dict[str, str]:
            leaders = given.read(on_rows, leader_of)
            recorded = [linear_map for linear_map in self.maps if linear_map.name not in leaders]
            if recorded:
                leaders |= self._record(recorded, loader, "retain", on_rows, leader_of)
            return leaders

        return self._guarded(loader, run)

    def _record(
        self, maps: Sequence[ProtectedMap], loader: Any, what: str, on_rows: OnRows, leader_of: dict[str, str] | None
    ) -> dict[str, str]:
        return record_inputs(self.model, maps, loader, self.forward_fn, on_rows, what=what, leader_of=leader_of)

    def _guarded(self, loader: Any, run: Callable[[], dict[str, str]]) -> dict[str, str]:
        with kept_random_state(self.model, loader):
            return in_all_processes(run, self.maps[0].layer.weight.device)

    def readers(self, leader: str, leader_of: dict[str, str]) -> list[ProtectedMap]:
        """The maps that `leader` leads, itself in front."""
        return sorted(
            (linear_map for linear_map in self.maps if leader_of[linear_map.name] == leader),
            key=lambda e: e.name != leader,
        )


def own_config(config: BarrierConfig, linear_map: ProtectedMap) -> BarrierConfig:
    """The config as it holds for one map: an embedding has few input features, so K is capped at their number."""
    if not linear_map.is_table:
        return config
    return replace(config, reduced_dim=min(config.reduced_dim, linear_map.num_features))


def moments_for(config: BarrierConfig, num_features: int, device: torch.device) -> Moments | FrequentDirections:
    """What gathers the mean and the covariance of inputs with so many features."""
    if config.is_wide(num_features):
        return FrequentDirections(num_features, config.num_sketched, device)
    return Moments(num_features, device)


def fit_protection(
    model: nn.Module,
    maps: Sequence[ProtectedMap],
    config: BarrierConfig,
    forget_loader: Any,
    forward_fn: ForwardFn,
    retain_loader: Any = None,
    retain_inputs: RetainInputs | None = None,
) -> Fitted:
    """The regions of the protection loss take two passes over the forget data (moments; percentiles along the leading
    directions); a projection takes none. One pass over the retain data serves both.

    Raises:
        ValueError: see `record_inputs` and `RetainInputs.read`, where the other processes of a distributed run raise a
            RuntimeError; retain inputs that leave no map a direction to move in.
    """
    passes = Passes(model, maps, forward_fn)
    kind = partial(moments_for, config)
    moments: dict[str, Moments | FrequentDirections] = {}
    directions: dict[str, Directions] = {}
    forget: dict[str, ProjectionSketch] = {}
    leader_of: dict[str, str] | None = None
    if config.has_penalty:
        leader_of = passes.record(forget_loader, "forget", into_moments(moments, kind))
        for seen in moments.values():
            seen.all_reduce()
        by_name = {linear_map.name: linear_map for linear_map in maps}
        directions = {
            name: fit_directions(seen, own_config(config, by_name[name]), name) for name, seen in moments.items()
        }
        forget = {name: ProjectionSketch(known.eigenvalues_K.sqrt()) for name, known in directions.items()}
        passes.record(forget_loader, "forget", into_sketches(forget, directions), leader_of)
    spanned: dict[str, SecondMoment] = {}  # what a projection reads of the retain rows
    outside: dict[str, Moments | FrequentDirections] = {}  # what the residual reads of them
    sketches: dict[str, ProjectionSketch] = {}
    retain_leader_of: dict[str, str] = {}
    if config.needs_retain_data:
        updates = []
        if config.has_projection:
            updates.append(into_moments(spanned, SecondMoment))
        if config.residual_source != "forget":
            updates.append(into_moments(outside, kind, only=config.is_wide if config.has_projection else None))
        if config.use_actual_bounds:
            sketches = {name: ProjectionSketch(known.eigenvalues_K.sqrt()) for name, known in directions.items()}
            updates.append(into_sketches(sketches, directions))

        def update(leader: str, rows_BLD: Tensor) -> None:
            for each in updates:
                each(leader, rows_BLD)

        given = retain_inputs or RetainInputs({}, maps)
        retain_leader_of = passes.retain(retain_loader, given, update, leader_of)
    for statistic in (*forget.values(), *sketches.values(), *spanned.values(), *outside.values()):
        statistic.all_reduce()
    for name, rows in spanned.items():
        outside.setdefault(name, rows.moments)
    fitted = Fitted()
    if leader_of is not None:
        for name, seen in moments.items():
            region = fit_region(seen, directions[name], forget[name], config, outside.get(name), sketches.get(name))
            fitted.regions.append((passes.readers(name, leader_of), region))
    if config.has_projection:
        for name, rows in spanned.items():
            projection = fit_projection(rows, config.projection_energy)
            fitted.projections.append((passes.readers(name, retain_leader_of), projection))
        closed = all(projection.rank == projection.num_features for _, projection in fitted.projections)
        if closed and not config.projection_softness:
            raise ValueError(
                "the retain inputs span all directions of every map, so nothing could be trained: lower "
                f"projection_energy (now {config.projection_energy:g}) or pass fewer kinds of retain inputs"
            )
    return fitted
