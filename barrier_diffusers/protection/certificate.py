"""What can be guaranteed about a map's drift on inputs it was not fitted on (docs/method.md section 6).

Shapes: B images, L rows of an image, D input features, K kept directions, O outputs.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from barrier_diffusers.protection.drift import Drift
from barrier_diffusers.protection.fitting import ForwardFn, first_tensor, in_all_processes, kept_random_state
from barrier_diffusers.protection.loss import interval_ends
from barrier_diffusers.protection.order_statistics import (
    RelativeDrift,
    Split,
    distribution_free,
    order_statistic,
    samples_needed,
)
from barrier_diffusers.protection.recorder import evaluation_mode, record_inputs
from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.sharding import whole
from barrier_diffusers.protection.statistics import is_distributed, reduced
from barrier_diffusers.protection.targets import ProtectedMap
from barrier_diffusers.utils.files import write_json

ROUNDING = 1e-4  # relative slack for float32 sums in a bound that an observation is held against


def sound_bound(drift: Drift, region: ForgetRegion, radius: float | Tensor) -> Tensor:
    """Largest |dW x + db| of each output, (O,), over all x whose z lies in the outer envelope and whose part outside
    the basis has norm at most `radius`: interval ends + |dW mean + db| + radius * ||dW (I - B B^T)||."""
    fixed_O, slope_O = sound_bound_parts(drift, region)
    return fixed_O + radius * slope_O


def sound_bound_parts(drift: Drift, region: ForgetRegion) -> tuple[Tensor, Tensor]:
    """The bound at radius 0, and what it grows by per unit of radius; both (O,)."""
    drift_OK = drift.project(region.basis)
    low_O, high_O = interval_ends(drift_OK, region.outer_lower, region.outer_upper)
    shift_O = drift.apply(region.mean)
    if drift.delta_bias_O is not None:
        shift_O = shift_O + drift.delta_bias_O
    outside_OD = drift.dense() - drift_OK @ region.basis.T
    return torch.maximum(low_O.abs(), high_O.abs()) + shift_O.abs(), outside_OD.norm(dim=1)


def moment_bound(drift: Drift, region: ForgetRegion, probability: float) -> Tensor:
    """A bound on |dW x + db| of each output, (O,), that holds with at least `probability` for a random x whose z lies
    in the envelope and whose part outside the basis has mean 0 and covariance C_res (Chebyshev, each output apart).
    It needs no more than the second moment of that part, whatever its mean."""
    fixed_O, slope_O = sound_bound_parts(drift, region)
    if region.residual_factor is not None:  # of a wide input a bound on C_res is known, which serves as well
        variance_O = drift.project(region.residual_factor).square().sum(1)
        variance_O = variance_O + region.residual_diagonal * slope_O.square()
    elif region.residual is not None:
        variance_O = drift.energy(region.residual).clamp_min(0)
    else:
        return fixed_O
    return fixed_O + (variance_O / (1 - probability)).sqrt()


@dataclass(frozen=True)
class Guarantee:
    """What the distribution-free bounds promise: the share `quantile` of new images, with `confidence`."""

    quantile: float  # in (0, 1)
    confidence: float  # in (0, 1)
    split: Split  # of the held-out images, into those that choose the bounds and those that check them

    def of(self, drift_per_image: Tensor) -> RelativeDrift:
        """The bound on one drift per image, (images,)."""
        return distribution_free(drift_per_image, self.quantile, self.confidence, self.split)


@dataclass(frozen=True)
class TrainedMaps:
    """A model whose protected maps have drifted."""

    model: nn.Module
    # each map with the region of its input; two maps may share one that was fitted on given inputs, in whatever order
    # they run, so each is watched on its own
    regions: Sequence[tuple[ProtectedMap, ForgetRegion]]
    drift: Callable[[ProtectedMap], Drift]
    base_is_current: bool  # whether a layer's own weight is the snapshot, as it is under an adapter
    snapshot_weights: Callable[[], AbstractContextManager[None]]  # the model as it was, for the duration of a block


@dataclass(frozen=True)
class MapCertificate:
    """The three bounds of one map, and what was observed."""

    name: str
    sound: float  # largest output of sound_bound at the largest residual norm seen; exact up to float32 rounding
    largest_output_drift: float  # largest |dW x + db| of one output over the rows inside the envelope
    sound_holds: bool  # every row inside the envelope kept its own bound
    rows: int
    rows_outside_envelope: int  # the sound bound says nothing about these
    radius: float  # largest residual norm seen
    moment: float  # largest output of moment_bound at the quantile
    moment_violations: float  # share of rows inside the envelope above it in some output
    relative: RelativeDrift


class MapObserver:
    """Watches one map's drift on held-out rows; keeps one number per image.

    Args:
        weight, bias: of the layer now; the snapshot's output is this minus the drift, or the layer's own output where
            an adapter holds the drift (`base_is_current`).
    """

    def __init__(
        self,
        name: str,
        drift: Drift,
        region: ForgetRegion,
        weight: Tensor,
        bias: Tensor | None,
        base_is_current: bool,
        quantile: float = 0.99,
    ):
        self.name, self.region = name, region
        with torch.no_grad():
            self.delta_OD = drift.dense().detach()
            self.delta_bias_O = None if drift.delta_bias_O is None else drift.delta_bias_O.detach()
            self.weight_OD = weight.detach().float().flatten(1) - (0 if base_is_current else self.delta_OD)
            self.bias_O = None if bias is None else bias.detach().float()
            if self.bias_O is not None and self.delta_bias_O is not None and not base_is_current:
                self.bias_O = self.bias_O - self.delta_bias_O
            self.fixed_O, self.slope_O = (part.detach() for part in sound_bound_parts(drift, region))
            self.moment_O = moment_bound(drift, region, quantile).detach()
            num_features = self.delta_OD.shape[1]  # float32 sums |dW x| with an error of at most D eps |dW| |x|
            self.noise_O = num_features * torch.finfo(torch.float32).eps * self.delta_OD.norm(dim=1)
        self.largest_per_image: list[Tensor] = []
        device = self.delta_OD.device
        self.rows = 0
        self.outside, self.broken, self.above = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        self.radius, self.largest = torch.zeros((), device=device), torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, x_BLD: Tensor) -> None:
        """Add the rows of B images."""
        rows = x_BLD.float()
        change_BLO = rows @ self.delta_OD.T
        if self.delta_bias_O is not None:
            change_BLO = change_BLO + self.delta_bias_O
        base_BLO = rows @ self.weight_OD.T
        if self.bias_O is not None:
            base_BLO = base_BLO + self.bias_O
        tiny = torch.finfo(torch.float32).tiny
        relative_BL = change_BLO.norm(dim=-1) / base_BLO.norm(dim=-1).clamp_min(tiny)
        self.largest_per_image.append(relative_BL.amax(1).cpu())
        centred_BLD = rows - self.region.mean
        z_BLK = centred_BLD @ self.region.basis
        slack_K = ROUNDING * (self.region.outer_upper - self.region.outer_lower)
        inside_BL = ((z_BLK >= self.region.outer_lower - slack_K) & (z_BLK <= self.region.outer_upper + slack_K)).all(
            -1
        )
        radius_BL = (centred_BLD - z_BLK @ self.region.basis.T).norm(dim=-1)
        bound_BLO = (self.fixed_O + radius_BL[..., None] * self.slope_O) * (1 + ROUNDING) + tiny
        noise_BLO = rows.norm(dim=-1, keepdim=True) * self.noise_O
        size_BLO = change_BLO.abs()
        self.rows += inside_BL.numel()
        self.outside += (~inside_BL).sum()
        self.broken += ((size_BLO > bound_BLO + noise_BLO).any(-1) & inside_BL).sum()
        self.above += ((size_BLO > self.moment_O + noise_BLO).any(-1) & inside_BL).sum()
        self.radius = torch.maximum(self.radius, radius_BL.max())
        self.largest = torch.maximum(self.largest, (size_BLO.amax(-1) * inside_BL).max())

    @property
    def drift_per_image(self) -> Tensor:
        """Largest relative drift among the rows of each image, (images,)."""
        return torch.cat(self.largest_per_image)

    def result(self, guarantee: Guarantee) -> MapCertificate:
        inside = max(self.rows - int(self.outside), 1)
        return MapCertificate(
            name=self.name,
            sound=float((self.fixed_O + self.radius * self.slope_O).max()),
            largest_output_drift=float(self.largest),
            sound_holds=int(self.broken) == 0,
            rows=self.rows,
            rows_outside_envelope=int(self.outside),
            radius=float(self.radius),
            moment=float(self.moment_O.max()),
            moment_violations=int(self.above) / inside,
            relative=guarantee.of(self.drift_per_image),
        )


@dataclass(frozen=True)
class Certificate:
    """Bounds per map and for the whole network, on held-out retain inputs."""

    maps: list[MapCertificate]
    network: RelativeDrift | None  # relative change of the prediction; None if forward_fn returns no tensor
    quantile: float
    confidence: float
    split: Split  # of the images, into those that choose the distribution-free bounds and those that check them
    every_map: RelativeDrift | None = None  # largest drift of an image in any map: one bound for all of them at once

    @property
    def holds(self) -> bool:
        """Whether every observation kept the sound bound in every map."""
        return all(certificate.sound_holds for certificate in self.maps)

    @property
    def contradicted(self) -> list[str]:
        """What the test images speak against, at 5 % for all statements together (Bonferroni): names of maps,
        "every_map", "network"."""
        drifts: dict[str, RelativeDrift | None] = {one.name: one.relative for one in self.maps}
        drifts |= {"every_map": self.every_map, "network": self.network}
        chances = {name: drift.chance for name, drift in drifts.items() if drift and drift.chance is not None}
        return [name for name, chance in chances.items() if chance < 0.05 / len(chances)]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        derived = {"holds": self.holds, "delta": 1 - self.confidence, "contradicted": self.contradicted}
        return {**asdict(self), **derived}

    def save_json(self, path: str | os.PathLike) -> None:
        """Write the certificate whole or not at all."""
        write_json(Path(path), self.to_dict())

    def __str__(self) -> str:
        worst = max(self.maps, key=lambda certificate: certificate.relative.largest)
        images = worst.relative.num_images
        lines = [f"{len(self.maps)} maps, {images} held-out images; sound bound {'holds' if self.holds else 'BROKEN'}"]
        shown = {
            f"worst map {worst.name}": worst.relative,
            "all maps at once": self.every_map,
            "network": self.network,
        }
        lines += [f"{title}: {self._sentence(drift)}" for title, drift in shown.items() if drift is not None]
        if self.contradicted:
            lines.append(f"the test images CONTRADICT the bound of {', '.join(self.contradicted)}")
        wrap = partial(textwrap.fill, width=80, subsequent_indent="  ", break_long_words=False)
        return "\n".join(wrap(line, break_on_hyphens=False) for line in lines)

    def _sentence(self, drift: RelativeDrift) -> str:
        if drift.certified is None:
            needed = samples_needed(self.quantile, self.confidence)
            return f"largest observed {drift.largest:.4g}; a bound takes {needed} images, not {drift.num_calibration}"
        promise = f"{self.quantile:.4g} of images with confidence {self.confidence:.4g}"
        checked = "not checked"
        if drift.num_test:
            kept = drift.num_test - drift.num_above
            checked = f"{kept} of {drift.num_test} test images keep it, the largest has {drift.largest_test:.4g}"
        return f"relative drift <= {drift.certified:.4g} for {promise}; {checked}"


@dataclass(frozen=True)
class OwnBatches:
    """The batches of a loader that one of several processes looks at: batch k is of process k modulo their number."""

    loader: Any
    index: int
    count: int

    def __len__(self) -> int:
        return len(range(self.index, len(self.loader), self.count))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.index, None, self.count)

    def combine(self, observers: Sequence[MapObserver], network: Tensor | None) -> Tensor | None:
        """Give every observer what the processes have seen together, in the order of the batches; the same for the
        network's drift. Counts are added and extremes compared: the order plays no part, and no digit changes."""
        device = observers[0].delta_OD.device
        sizes = torch.zeros(len(self.loader), dtype=torch.int64, device=device)
        seen, own = observers[0].largest_per_image, len(self)
        calls = len(seen) // own if own else 0  # of a map in a batch
        for batch in range(own):
            sizes[self.index + batch * self.count] = sum(len(part) for part in seen[batch * calls :][:calls])
        owners = torch.arange(len(sizes), device=device) % self.count
        mine = (owners == self.index).repeat_interleave(reduced(sizes))
        given = reduced(torch.tensor(int(network is not None), device=device), dist.ReduceOp.MAX).item() > 0
        table = torch.zeros(len(observers) + 1, len(mine), device=device)
        if own:
            table[:-1, mine] = torch.stack([observer.drift_per_image for observer in observers]).to(device)
        if network is not None:
            table[-1, mine] = network.to(device)
        counts = [[torch.tensor(one.rows, device=device), one.outside, one.broken, one.above] for one in observers]
        extremes = [[one.radius, one.largest] for one in observers]
        table_MN = reduced(table).cpu()
        counts_M4 = reduced(torch.stack([torch.stack(numbers) for numbers in counts]))
        extremes_M2 = reduced(torch.stack([torch.stack(numbers) for numbers in extremes]), dist.ReduceOp.MAX)
        for index, observer in enumerate(observers):
            rows, observer.outside, observer.broken, observer.above = counts_M4[index].unbind()
            observer.rows = int(rows)
            observer.radius, observer.largest = extremes_M2[index].unbind()
            observer.largest_per_image = [table_MN[index]]
        return table_MN[-1] if given else None


def certify(
    trained: TrainedMaps, loader: Any, forward_fn: ForwardFn, guarantee: Guarantee, shared: bool = False
) -> Certificate:
    """Observe every map and the whole network on held-out batches; see `Barrier.certify`."""
    order_statistic(1, guarantee.quantile, guarantee.confidence)  # refuses what lies outside (0, 1)
    observers: dict[str, MapObserver] = {}
    for linear_map, region in trained.regions:
        observers[linear_map.name] = MapObserver(
            linear_map.name,
            drift=trained.drift(linear_map),
            region=region,
            weight=linear_map.outputs_first(whole(linear_map.layer.weight)),
            bias=None if linear_map.bias is None else whole(linear_map.bias),
            base_is_current=trained.base_is_current,
            quantile=guarantee.quantile,
        )

    def observe(name: str, rows_BLD: Tensor) -> None:
        observers[name].update(rows_BLD)

    maps, alone = [linear_map for linear_map, _ in trained.regions], {name: name for name in observers}
    network: Tensor | None = None

    def watch(batches: Any) -> dict[str, str]:
        nonlocal network
        with kept_random_state(trained.model, loader):
            record_inputs(trained.model, maps, batches, forward_fn, observe, what="held-out", leader_of=alone)
        network = _network_drift(trained, batches, forward_fn)
        return {}

    if shared and is_distributed():
        own = OwnBatches(loader, dist.get_rank(), dist.get_world_size())
        idle = len(own) == 0 and len(loader) > 0
        in_all_processes(lambda: {} if idle else watch(own), next(trained.model.parameters()).device)
        network = own.combine(list(observers.values()), network)
    else:
        watch(loader)
    worst_per_image = torch.stack([observer.drift_per_image for observer in observers.values()]).amax(0)
    return Certificate(
        maps=[observer.result(guarantee) for observer in observers.values()],
        network=None if network is None else guarantee.of(network),
        quantile=guarantee.quantile,
        confidence=guarantee.confidence,
        split=guarantee.split,
        every_map=guarantee.of(worst_per_image),
    )


@torch.no_grad()
def _network_drift(trained: TrainedMaps, loader: Any, forward_fn: ForwardFn) -> Tensor | None:
    """Relative change ||f(x) - f0(x)|| / ||f0(x)|| of the network's output per image; None without a tensor."""
    changes = []
    with evaluation_mode(trained.model):
        for batch in loader:
            with kept_random_state(trained.model):
                now = first_tensor(forward_fn(trained.model, batch))
            if now is None:
                return None
            with trained.snapshot_weights():
                before = first_tensor(forward_fn(trained.model, batch))
            assert before is not None
            change, size = (now - before).float().flatten(1), before.float().flatten(1)
            changes.append((change.norm(dim=1) / size.norm(dim=1).clamp_min(1e-30)).cpu())
    return torch.cat(changes)
