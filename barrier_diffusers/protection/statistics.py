"""Streaming statistics of a layer's inputs: moments and percentiles in memory that does not grow with the data.

Both accumulate over batches, merge exactly, and are summed over the processes of a distributed run; rows are never
kept. Shapes: N rows, D input features, K directions, S histogram bins.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

SMALLEST = 1e-6  # in units of a direction's standard deviation; anything nearer to the mean shares the middle bin


LARGEST = 1e4  # likewise; farther values share the outermost bin (Chebyshev: at most 1e-8 of the rows)


RATIO = 1.01  # between the edges of neighbouring bins


def _reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    dist.all_reduce(tensor, op)
    return tensor


def is_distributed() -> bool:
    """Whether statistics have to be combined with those of other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Moments:
    """Count, mean and covariance of rows (docs/method.md section 1): batches in float32, accumulated in float64.

    Args:
        num_features: D.
        device: where the accumulators live; best that of the activations.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None):
        self.count = 0
        self.mean_D = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter_DD = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, x_ND: Tensor) -> None:
        """Add the rows `x_ND` (any floating dtype)."""
        if len(x_ND) == 0:
            return
        rows = x_ND.float()
        mean_D = rows.mean(0)
        centred_ND = rows - mean_D
        self._combine(len(rows), mean_D.double(), centred_ND.T @ centred_ND)

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen."""
        self._combine(other.count, other.mean_D, other.scatter_DD)

    def _combine(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        """Pairwise update of mean and scatter (Chan, Golub, LeVeque 1979)."""
        if count == 0:
            return
        total = self.count + count
        delta_D = mean_D - self.mean_D
        self.scatter_DD += scatter_DD  # in place, as is the next: D x D temporaries would cost more than the product
        self.scatter_DD.addr_(delta_D, delta_D, alpha=self.count * count / total)
        self.mean_D += delta_D * (count / total)
        self.count = total

    def all_reduce(self) -> None:
        """Combine with the other processes' rows: counts and sums first, then scatters around the common mean."""
        if not is_distributed():
            return
        count = _reduce(torch.tensor([self.count], dtype=torch.float64, device=self.mean_D.device))
        total = int(count.item())
        if total == 0:
            return
        mean_D = _reduce(self.mean_D * (self.count / total))
        delta_D = self.mean_D - mean_D
        self.scatter_DD = _reduce(self.scatter_DD + torch.outer(delta_D, delta_D) * self.count)
        self.mean_D, self.count = mean_D, total

    @property
    def mean(self) -> Tensor:
        """E[x], (D,) float64.

        Raises:
            ValueError: no row was seen.
        """
        self._require_rows()
        return self.mean_D

    @property
    def covariance(self) -> Tensor:
        """C = mean((x - mean)(x - mean)^T), (D, D) float64, exactly symmetric."""
        self._require_rows()
        return (self.scatter_DD + self.scatter_DD.T) / (2 * self.count)

    def _require_rows(self) -> None:
        if self.count == 0:
            raise ValueError("no rows were recorded, so there is no mean or covariance")


class ProjectionSketch:
    """Distribution of z per direction: exact minimum and maximum, and a histogram for the percentiles.

    Bin edges are spaced evenly in log|z| on both sides of zero, in units of the direction's standard deviation; each
    bin also keeps the sum of its values, so a bin that holds one repeated value returns that very value. The bins do
    not depend on the data's order, so any split over batches and processes gives the same counts.

    Args:
        scale_K: standard deviation of each direction (0 is allowed), known from the first pass.
    """

    def __init__(self, scale_K: Tensor):
        self.scale_K = scale_K.double().clamp_min(torch.finfo(torch.float32).tiny)
        self.bins_per_side = math.ceil(math.log(LARGEST / SMALLEST) / math.log(RATIO)) + 1
        shape, device = (len(scale_K), 2 * self.bins_per_side + 1), scale_K.device
        self.count = 0
        self.counts_KS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sums_KS = torch.zeros(shape, dtype=torch.float64, device=device)
        self.minimum_K = torch.full_like(self.scale_K, math.inf)
        self.maximum_K = torch.full_like(self.scale_K, -math.inf)

    def update(self, z_NK: Tensor) -> None:
        """Add the projections `z_NK` of N rows."""
        if len(z_NK) == 0:
            return
        z_KN = z_NK.double().T.contiguous()
        distance_KN = torch.log(z_KN.abs() / self.scale_K[:, None] / SMALLEST) / math.log(RATIO)
        steps_KN = (distance_KN.floor() + 1).clamp(0, self.bins_per_side) * z_KN.sign()
        bins_KN = steps_KN.nan_to_num().long() + self.bins_per_side  # the recorder reports NaN; here it must not crash
        self.counts_KS.scatter_add_(1, bins_KN, torch.ones_like(bins_KN))
        self.sums_KS.scatter_add_(1, bins_KN, z_KN)
        self.minimum_K = torch.minimum(self.minimum_K, z_KN.amin(1))
        self.maximum_K = torch.maximum(self.maximum_K, z_KN.amax(1))
        self.count += len(z_NK)

    def merge(self, other: ProjectionSketch) -> None:
        """Add the rows that `other`, built with the same scales, has seen."""
        self.counts_KS += other.counts_KS
        self.sums_KS += other.sums_KS
        self.minimum_K = torch.minimum(self.minimum_K, other.minimum_K)
        self.maximum_K = torch.maximum(self.maximum_K, other.maximum_K)
        self.count += other.count

    def all_reduce(self) -> None:
        """Combine with the other processes' rows; histograms and extremes travel, rows never do."""
        if not is_distributed():
            return
        _reduce(self.counts_KS)
        _reduce(self.sums_KS)
        _reduce(self.minimum_K, dist.ReduceOp.MIN)
        _reduce(self.maximum_K, dist.ReduceOp.MAX)
        self.count = int(self.counts_KS[0].sum().item())

    @property
    def minimum(self) -> Tensor:
        """Smallest z per direction, (K,) float32, exact."""
        return self._checked(self.minimum_K)

    @property
    def maximum(self) -> Tensor:
        """Largest z per direction, (K,) float32, exact."""
        return self._checked(self.maximum_K)

    def quantile(self, p: float) -> Tensor:
        """The p-quantile of each direction, (K,) float32; exact for p = 0 and 1, else within 1 % of rank.

        Raises:
            ValueError: p outside [0, 1], or no row was seen.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"a quantile must lie in [0, 1], not {p}")
        if p in (0, 1):
            return self.maximum if p else self.minimum
        cumulative_KS = self._checked(self.counts_KS).long().cumsum(1)
        rank_K1 = torch.full_like(cumulative_KS[:, :1], math.floor(p * (self.count - 1)))
        bin_K1 = torch.searchsorted(cumulative_KS, rank_K1, right=True)
        value_K = (self.sums_KS.gather(1, bin_K1) / self.counts_KS.gather(1, bin_K1)).squeeze(1)
        return value_K.float().clamp(self.minimum, self.maximum)

    def _checked(self, tensor: Tensor) -> Tensor:
        if self.count == 0:
            raise ValueError("no rows were recorded, so there are no percentiles")
        return tensor if tensor.dtype == torch.int64 else tensor.float()
