"""Projection, the hard form of the bound (docs/method.md section 7): no update enters what the retain inputs span.

Shapes: D input features, R spanned directions, O outputs, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.statistics import Moments, is_distributed

NUMBERS = ("count", "energy", "radius")


@dataclass(frozen=True)
class RetainProjection:
    """What the retain inputs of one tensor span; all tensors float32, shared by every map that reads it."""

    basis: Tensor  # P (D, R), orthonormal columns; R may be anything from 0 to D
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
        return replace(self, basis=self.basis.to(device), residual=self.residual.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """All fields as tensors, for safetensors."""
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in NUMBERS}
        return {"basis": self.basis, "residual": self.residual, **numbers}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RetainProjection:
        """The inverse of `to_tensors`."""
        values: dict[str, Any] = {field.name: tensors[field.name] for field in fields(cls)}
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


def spanning_directions(second_moment_DD: Tensor, energy: float) -> tuple[Tensor, float]:
    """The fewest leading eigenvectors P (D, R) that hold `energy` of the trace, and the share they hold.

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
    return vectors_DD[:, :rank].contiguous(), share


def fit_projection(rows: SecondMoment, energy: float) -> RetainProjection:
    """The span of the retain rows after the one pass over them.

    Raises:
        ValueError: no rows.
    """
    second_moment_DD = rows.second_moment
    basis_DR, share = spanning_directions(second_moment_DD, energy)
    half_DD = second_moment_DD - basis_DR @ (basis_DR.T @ second_moment_DD)
    residual_DD = half_DD - (half_DD @ basis_DR) @ basis_DR.T
    return RetainProjection(
        basis=basis_DR.float(),
        residual=((residual_DD + residual_DD.T) / 2).float(),
        energy=share,
        radius=rows.largest.item(),
        count=rows.moments.count,
    )


@torch.no_grad()
def project_out(weights: Sequence[Tensor], origins: Sequence[Tensor | None], basis_DR: Tensor) -> None:
    """W <- W0 + (W - W0)(I - P P^T), in place, for weights (O, ...) that read the same input, in one stacked product.

    A LoRA factor A has no origin (None): A <- A (I - P P^T). All arithmetic is float32 with the weight's own dtype at
    the end: in bf16 or fp16 each entry of W is left with its rounding, half a unit in the last place, which does not
    add up over steps as the drift is measured from W0 every time. The products take torch's float32 matmul precision:
    where TF32 is allowed, about a thousandth of the drift stays inside. Nothing waits for the device.
    """
    if basis_DR.shape[1] == 0 or not weights:
        return
    drifts = [
        (weight.float() if origin is None else weight.float() - origin.float()).flatten(1)
        for weight, origin in zip(weights, origins, strict=True)
    ]
    stacked_OD = drifts[0] if len(drifts) == 1 else torch.cat(drifts)
    inside_OD = (stacked_OD @ basis_DR) @ basis_DR.T
    for weight, part in zip(weights, inside_OD.split([len(drift) for drift in drifts]), strict=True):
        weight.sub_(part.view_as(weight))  # of two dtypes the wider one is computed in
