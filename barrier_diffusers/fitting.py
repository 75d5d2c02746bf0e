"""From data to regions: the passes over forget and retain batches that the protection is fitted with.

Shapes: B batch, L rows of a sample, D input features.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from barrier_diffusers.config import BarrierConfig
from barrier_diffusers.recorder import OnRows, record_inputs
from barrier_diffusers.region import Directions, ForgetRegion, fit_directions, fit_region
from barrier_diffusers.statistics import Moments, ProjectionSketch, is_distributed
from barrier_diffusers.targets import ProtectedMap

ForwardFn = Callable[[nn.Module, Any], Any]


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
    generators = [(entry, entry.get_state()) for entry in found if isinstance(entry, torch.Generator)]
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


def into_moments(moments: dict[str, Moments]) -> OnRows:
    """Adds recorded rows to the moments of their input."""

    def update(leader: str, rows_BLD: Tensor) -> None:
        if leader not in moments:
            moments[leader] = Moments(rows_BLD.shape[-1], rows_BLD.device)
        moments[leader].update(rows_BLD.flatten(0, 1))

    return update


def into_sketches(sketches: dict[str, ProjectionSketch], directions: dict[str, Directions]) -> OnRows:
    """Projects recorded rows on the directions of their input and adds them to its sketch."""

    frames = {name: (known.mean_D.float(), known.basis_DK.float()) for name, known in directions.items()}

    def update(leader: str, rows_BLD: Tensor) -> None:
        mean_D, basis_DK = frames[leader]
        sketches[leader].update((rows_BLD.flatten(0, 1).float() - mean_D) @ basis_DK)

    return update


def fit_regions(
    model: nn.Module,
    maps: Sequence[ProtectedMap],
    config: BarrierConfig,
    forget_loader: Any,
    forward_fn: ForwardFn,
    retain_loader: Any = None,
) -> list[tuple[list[ProtectedMap], ForgetRegion]]:
    """Two passes over the forget data (moments; percentiles along the leading directions), one over the retain data.

    Each pass starts from the random state of the caller, who gets it back unchanged: a forward function that draws
    noise draws the same noise in both forget passes.

    Returns:
        One entry per distinct input: the maps that read it, the one that runs first in front, and its region.

    Raises:
        ValueError: see `record_inputs`; in a distributed run the other processes raise a RuntimeError.
    """
    device = next(model.parameters()).device

    def one_pass(what: str, on_rows: OnRows, leader_of: dict[str, str] | None = None) -> dict[str, str]:
        loader = forget_loader if what == "forget" else retain_loader
        with kept_random_state(model, loader):
            return in_all_processes(
                lambda: record_inputs(model, maps, loader, forward_fn, on_rows, what=what, leader_of=leader_of), device
            )

    moments: dict[str, Moments] = {}
    leader_of = one_pass("forget", into_moments(moments))
    for gathered in moments.values():
        gathered.all_reduce()
    directions = {name: fit_directions(entry, config, name) for name, entry in moments.items()}

    def sketches() -> dict[str, ProjectionSketch]:
        return {name: ProjectionSketch(entry.eigenvalues_K.sqrt()) for name, entry in directions.items()}

    forget = sketches()
    one_pass("forget", into_sketches(forget, directions), leader_of)
    retain: dict[str, ProjectionSketch] = {}
    retain_moments: dict[str, Moments] = {}
    if config.needs_retain_data:
        retain = sketches()
        update_moments, update_sketches = into_moments(retain_moments), into_sketches(retain, directions)

        def update(leader: str, rows_BLD: Tensor) -> None:
            update_moments(leader, rows_BLD)
            update_sketches(leader, rows_BLD)

        one_pass("retain", update, leader_of)
    for name in moments:
        forget[name].all_reduce()
        if config.needs_retain_data:
            retain[name].all_reduce()
            retain_moments[name].all_reduce()
    fitted = []
    for name in moments:
        region = fit_region(
            moments[name], directions[name], forget[name], config, retain_moments.get(name), retain.get(name)
        )
        readers = sorted((entry for entry in maps if leader_of[entry.name] == name), key=lambda e: e.name != name)
        fitted.append((readers, region))
    return fitted
