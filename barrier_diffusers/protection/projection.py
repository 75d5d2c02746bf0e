"""Projection, the hard form of the bound (docs/method.md section 7): no update enters what the retain inputs span.

Shapes: D input features, R spanned directions, O outputs, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.stacks import MOST_STACKED, runs, stacked_drift
from barrier_diffusers.protection.statistics import Moments, is_distributed
from barrier_diffusers.protection.targets import ProtectedMap

NUMBERS = ("count", "energy", "radius")


@dataclass(frozen=True)
class RetainProjection:
    """What the retain inputs of one tensor span; all tensors float32, shared by every map that reads it."""

    basis: Tensor  # P (D, R), orthonormal columns; R may be anything from 0 to D
    energies: Tensor  # (R,) of the retain inputs along each of them, in terms of the mean over all D directions
    residual: Tensor  # (D, D), the second moment outside the span: (I - P P^T) E[x x^T] (I - P P^T)
    energy: float  # share of E|x|^2 inside the span, at least projection_energy
    radius: float  # largest norm of a retain row
    count: int  # retain rows

    @property
    def num_features(self) -> int:
        """Number of input features, D."""
        return len(self.basis)

    @property
    def rank(self) -> int:
        """R, the directions no update may enter."""
        return self.basis.shape[1]

    def to(self, device: torch.device | str) -> RetainProjection:
        """The same projection on another device."""
        return replace(
            self, basis=self.basis.to(device), energies=self.energies.to(device), residual=self.residual.to(device)
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, for safetensors."""
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in NUMBERS}
        return {"basis": self.basis, "energies": self.energies, "residual": self.residual, **numbers}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RetainProjection:
        """The inverse of `to_tensors`; a file of an earlier version has no energies, but no soft projection either."""
        rest = {"energies": tensors["basis"].new_zeros(tensors["basis"].shape[1])}
        values: dict[str, Any] = {field.name: {**rest, **tensors}[field.name] for field in fields(cls)}
        values |= {name: values[name].item() for name in NUMBERS}
        return cls(**{**values, "count": int(values["count"])})

    def as_region(self) -> ForgetRegion:
        """The span as a region for the certificate: mean 0, basis P, every |z| up to the largest norm of a retain row.

        A drift kept out of the span moves inputs of this region by their part outside P alone, so both bounds of the
        certificate come down to the energy that was left out.
        """
        upper_R = self.basis.new_full((self.rank,), self.radius)
        mean_D = self.basis.new_zeros(self.num_features)
        return ForgetRegion(mean_D, self.basis, -upper_R, upper_R, -upper_R, upper_R, self.residual, self.count)


class SecondMoment:
    """E[x x^T] of rows and their largest norm, streamed and merged over processes; rows are never kept.

    Args:
        num_features: D.
        device: where the accumulators live.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None):
        self.moments = Moments(num_features, device)
        self.largest = torch.zeros((), dtype=torch.float32, device=device)

    def update(self, x_ND: Tensor) -> None:
        """Add the rows `x_ND` (any floating dtype)."""
        self.moments.update(x_ND)
        if len(x_ND):
            self.largest = torch.maximum(self.largest, x_ND.float().norm(dim=1).max())

    def all_reduce(self) -> None:
        """Combine with the other processes' rows."""
        self.moments.all_reduce()
        if is_distributed():
            dist.all_reduce(self.largest, dist.ReduceOp.MAX)

    @property
    def second_moment(self) -> Tensor:
        """E[x x^T], uncentred, (D, D) float64: the covariance with the mean's own direction inside."""
        mean_D = self.moments.mean
        return self.moments.covariance + torch.outer(mean_D, mean_D)


def spanning_directions(second_moment_DD: Tensor, energy: float) -> tuple[Tensor, Tensor, float]:
    """The fewest leading eigenvectors P (D, R) that hold `energy` of the trace, their eigenvalues (R,) in terms of the
    mean over all D, and the share they hold.

    Eigenvalues below float32's resolution of the trace are rounding of the sums and count as 0, so that energy 1 asks
    for the directions the rows really have.
    """
    values_D, vectors_DD = torch.linalg.eigh(second_moment_DD)
    values_D, vectors_DD = values_D.flip(0), vectors_DD.flip(1)
    smallest = values_D.clamp_min(0).sum() * torch.finfo(torch.float32).eps
    values_D = torch.where(values_D > smallest, values_D, 0)
    held_D = values_D.cumsum(0)
    rank = int((held_D < energy * held_D[-1]).sum().item()) + 1 if held_D[-1] > 0 else 0
    share = (held_D[rank - 1] / held_D[-1]).item() if rank else 1.0
    relative_R = values_D[:rank] / values_D.mean() if rank else values_D[:0]
    return vectors_DD[:, :rank].contiguous(), relative_R, share


def fit_projection(rows: SecondMoment, energy: float) -> RetainProjection:
    """The span of the retain rows after the one pass over them.

    Raises:
        ValueError: no rows.
    """
    second_moment_DD = rows.second_moment
    basis_DR, energies_R, share = spanning_directions(second_moment_DD, energy)
    half_DD = second_moment_DD - basis_DR @ (basis_DR.T @ second_moment_DD)
    residual_DD = half_DD - (half_DD @ basis_DR) @ basis_DR.T
    return RetainProjection(
        basis=basis_DR.float(),
        energies=energies_R.float(),
        residual=((residual_DD + residual_DD.T) / 2).float(),
        energy=share,
        radius=rows.largest.item(),
        count=rows.moments.count,
    )


@torch.no_grad()
def project_out(weights: Sequence[Tensor], origins: Sequence[Tensor | None], basis_GDR: Tensor) -> None:
    """W <- W0 + (W - W0)(I - P P^T), in place, for weights (O, ...) of G groups with as many rows, group by group.

    A LoRA factor A has no origin (None): A <- A (I - P P^T). All arithmetic is float32 with the weight's own dtype at
    the end: in bf16 or fp16 each number of W is left with its rounding, half a unit in the last place, which does not
    add up over steps as the drift is measured from W0 every time. The products take torch's float32 matmul precision:
    where TF32 is allowed, about a thousandth of the drift stays inside. Nothing waits for the device.

    Args:
        basis_GDR: P of each group; columns of zeros are allowed.
    """
    if basis_GDR.shape[2] == 0 or not weights:
        return
    drift_PD = stacked_drift(weights, origins)
    drift_GPD = drift_PD.view(len(basis_GDR), -1, drift_PD.shape[1])
    inside_PD = torch.bmm(torch.bmm(drift_GPD, basis_GDR), basis_GDR.mT).flatten(0, 1)
    parts = inside_PD.split([len(weight) for weight in weights])
    # of two dtypes the wider one is computed in
    torch._foreach_sub_(list(weights), [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)])


@dataclass
class ProjectedGroup:
    """The maps that read one retain input, and what it spans."""

    maps: list[ProtectedMap]
    projection: RetainProjection


class StackedProjections:
    """The projections of all maps; groups of equal shape are projected together.

    Args:
        projections: of each distinct retain input, with the maps that read it.
        softness: see BarrierConfig.projection_softness.
    """

    def __init__(self, projections: Sequence[tuple[Sequence[ProtectedMap], RetainProjection]], softness: float = 0.0):
        self.softness = softness
        self.groups = [ProjectedGroup(list(maps), projection) for maps, projection in projections]
        self._bases: dict[tuple, Tensor] = {}

    def to(self, device: torch.device) -> None:
        """Move everything."""
        self._bases = {}
        for group in self.groups:
            group.projection = group.projection.to(device)

    def project(self, weights: Mapping[str, Tensor], origins: Mapping[str, Tensor]) -> None:
        """Take the drift out of the spans, in place.

        Args:
            weights: of each map, (O, ...), or its LoRA factor A, (R, ...).
            origins: what full weights are measured from.
        """
        by_shape: dict[tuple[int, int], list[int]] = {}
        for position, group in enumerate(self.groups):
            rows = sum(len(weights[linear_map.name]) for linear_map in group.maps)
            if group.projection.rank and rows:
                by_shape.setdefault((rows, group.projection.num_features), []).append(position)
        for (rows, num_features), alike in by_shape.items():
            for positions in runs(alike, [rows * num_features] * len(alike), MOST_STACKED):
                names = [linear_map.name for position in positions for linear_map in self.groups[position].maps]
                now, then = [weights[name] for name in names], [origins.get(name) for name in names]
                project_out(now, then, self._stacked(tuple(positions)))

    def _stacked(self, positions: tuple[int, ...]) -> Tensor:
        """The bases (G, D, R) of some groups, with columns of zeros up to the largest rank; made once.

        A soft projection leaves s / (s + e) of the drift along a column: it takes out what a column has that is
        sqrt(e / (s + e)) long.
        """
        if positions not in self._bases:
            fits = [self.groups[position].projection for position in positions]
            bases = [fit.basis for fit in fits]
            if self.softness:
                bases = [fit.basis * (fit.energies / (self.softness + fit.energies)).sqrt() for fit in fits]
            most = max(basis_DR.shape[1] for basis_DR in bases)
            padded = [F.pad(basis_DR, (0, most - basis_DR.shape[1])) for basis_DR in bases]
            self._bases[positions] = torch.stack(padded)
            if self.softness:
                return self._bases[positions]
            for position, basis_DR, stacked_DR in zip(positions, bases, self._bases[positions], strict=True):
                group = self.groups[position]  # held once
                group.projection = replace(group.projection, basis=stacked_DR[:, : basis_DR.shape[1]])
        return self._bases[positions]
