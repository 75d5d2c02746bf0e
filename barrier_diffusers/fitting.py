"""From data to regions: the passes over forget and retain batches that the protection is fitted with.

Shapes: B batch, L rows of a sample, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.config import BarrierConfig
from barrier_diffusers.recorder import OnRows, record_inputs
from barrier_diffusers.region import Directions, ForgetRegion, fit_directions, fit_region
from barrier_diffusers.statistics import Moments, ProjectionSketch
from barrier_diffusers.targets import ProtectedMap

ForwardFn = Callable[[nn.Module, Any], Any]


def random_state() -> tuple[Tensor, list[Tensor]]:
    """The state of torch's generators on the CPU and on every GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Go back to a state that `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def into_moments(moments: dict[str, Moments]) -> OnRows:
    """Adds recorded rows to the moments of their input."""

    def update(leader: str, rows_BLD: Tensor) -> None:
        if leader not in moments:
            moments[leader] = Moments(rows_BLD.shape[-1], rows_BLD.device)
        moments[leader].update(rows_BLD.flatten(0, 1))

    return update


def into_sketches(sketches: dict[str, ProjectionSketch], directions: dict[str, Directions]) -> OnRows:
    """Projects recorded rows on the directions of their input and adds them to its sketch."""

    def update(leader: str, rows_BLD: Tensor) -> None:
        known = directions[leader]
        z_NK = (rows_BLD.flatten(0, 1).float() - known.mean_D.float()) @ known.basis_DK.float()
        sketches[leader].update(z_NK)

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

    Both forget passes start from the same random state, so a forward function that draws noise draws the same.

    Returns:
        One entry per distinct input: the maps that read it, and its region.
    """
    state = random_state()
    moments: dict[str, Moments] = {}
    leader_of = record_inputs(model, maps, forget_loader, forward_fn, into_moments(moments))
    for gathered in moments.values():
        gathered.all_reduce()
    directions = {name: fit_directions(entry, config, name) for name, entry in moments.items()}

    def sketches() -> dict[str, ProjectionSketch]:
        return {name: ProjectionSketch(entry.eigenvalues_K.sqrt()) for name, entry in directions.items()}

    forget, retain = sketches(), sketches()
    retain_moments: dict[str, Moments] = {}
    set_random_state(state)
    record_inputs(model, maps, forget_loader, forward_fn, into_sketches(forget, directions))
    if config.needs_retain_data:
        update_moments, update_sketches = into_moments(retain_moments), into_sketches(retain, directions)

        def update(leader: str, rows_BLD: Tensor) -> None:
            update_moments(leader, rows_BLD)
            update_sketches(leader, rows_BLD)

        record_inputs(model, maps, retain_loader, forward_fn, update, what="retain")
        for name in retain_moments:
            retain_moments[name].all_reduce()
            retain[name].all_reduce()
    fitted = []
    for name in moments:
        forget[name].all_reduce()
        retain_part = (retain_moments[name], retain[name]) if config.needs_retain_data else (None, None)
        region = fit_region(moments[name], directions[name], forget[name], config, *retain_part)
        fitted.append(([entry for entry in maps if leader_of[entry.name] == name], region))
    return fitted
