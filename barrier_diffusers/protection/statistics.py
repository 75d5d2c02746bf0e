"""Streaming statistics of a layer's inputs: moments and percentiles in memory that does not grow with the data.

Both accumulate over batches, merge exactly, and are summed over the processes of a distributed run; no row is kept
for long. Shapes: N rows, D input features, K directions, S histogram bins.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

SMALLEST = 1e-6  # in units of a direction's standard deviation; anything nearer to the mean shares the middle bin


LARGEST = 1e4  # likewise; farther values share the outermost bin (Chebyshev: at most 1e-8 of the rows)


RATIO = 1.01  # between the edges of neighbouring bins


def reduced(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The tensor, by now combined with those of the other processes; all of them have to call it."""
    dist.all_reduce(tensor, op)
    return tensor


def is_distributed() -> bool:
    """Whether statistics have to be combined with those of other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class WaitingRows(ABC):
    """Count and mean of rows, and what a subclass gathers of them; few rows wait, in float32, until `most` of them are
    added together, as a pass over what is gathered costs more than they are worth.

    Args:
        num_features: D.
        most: rows that wait.
        device: where it lives; best that of the activations.
    """

    def __init__(self, num_features: int, most: int, device: torch.device | str | None = None):
        self.most = most
        self.mean_D = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._added = 0
        self._waiting: list[Tensor] = []

    @abstractmethod
    def _add(self, rows_ND: Tensor) -> None:
        """Add rows in float32, with their mean."""

    @property
    def count(self) -> int:
        """Number of rows seen."""
        return self._added + sum(map(len, self._waiting))

    def update(self, x_ND: Tensor) -> None:
        """Add the rows `x_ND` (any floating dtype)."""
        if len(x_ND) > self.most:
            self._add(x_ND.float())
        elif len(x_ND):
            if self.count - self._added + len(x_ND) > self.most:
                self._add_waiting()
            self._waiting.append(x_ND.to(torch.float32, copy=True))  # the network may overwrite its own

    def _add_waiting(self) -> None:
        if self._waiting:
            rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting = []
            self._add(rows)

    @property
    def mean(self) -> Tensor:
        """E[x], (D,) float64, exact up to rounding.

        Raises:
            ValueError: no row was seen.
        """
        self._require_rows()
        return self.mean_D

    def _require_rows(self) -> None:
        self._add_waiting()
        if self._added == 0:
            raise ValueError("no rows were recorded, so there is no mean or covariance")


class Moments(WaitingRows):
    """Count, mean and covariance of rows (docs/method.md section 1): batches in float32, accumulated in float64.

    A pass over D x D numbers costs more than a few rows are worth, so up to D / 4 rows wait until they are added
    together; memory does not grow with the data.

    Args:
        num_features: D.
        device: where the accumulators live; best that of the activations.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None):
        super().__init__(num_features, num_features // 4, device)
        self.scatter_DD = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def fresh(self) -> Moments:
        """One of the same size that has seen nothing."""
        return Moments(len(self.mean_D), self.mean_D.device)

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen."""
        other._add_waiting()
        self._add_waiting()
        if other._added:
            self._combine(other._added, other.mean_D, other.scatter_DD)

    def _add(self, rows: Tensor) -> None:
        with torch.autocast(rows.device.type, enabled=False):  # rows that waited are added in whatever context
            mean_D = rows.mean(0)
            centred_ND = rows - mean_D
            self._combine(len(rows), mean_D, centred_ND.T @ centred_ND)

    def _combine(self, count: int, mean_D: Tensor, scatter_DD: Tensor) -> None:
        """Pairwise update of mean and scatter (Chan, Golub, LeVeque 1979)."""
        total = self._added + count
        delta_D = mean_D - self.mean_D
        self.scatter_DD += scatter_DD  # in place, as is the next: D x D temporaries would cost more than the product
        if self._added:
            self.scatter_DD.addr_(delta_D, delta_D, alpha=self._added * count / total)
        self.mean_D.add_(delta_D, alpha=count / total)
        self._added = total

    def all_reduce(self) -> None:
        """Combine with the other processes' rows: counts and sums first, then scatters around the common mean."""
        self._add_waiting()
        if not is_distributed():
            return
        count = reduced(torch.tensor([self._added], dtype=torch.float64, device=self.mean_D.device))
        total = int(count.item())
        if total == 0:
            return
        mean_D = reduced(self.mean_D * (self._added / total))
        delta_D = self.mean_D - mean_D
        self.scatter_DD = reduced(self.scatter_DD + torch.outer(delta_D, delta_D) * self._added)
        self.mean_D, self._added = mean_D, total

    @property
    def covariance(self) -> Tensor:
        """C = mean((x - mean)(x - mean)^T), (D, D) float64, exactly symmetric."""
        self._require_rows()
        return (self.scatter_DD + self.scatter_DD.T).div_(2 * self._added)


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
        bins_per_side = math.ceil(math.log(LARGEST / SMALLEST) / math.log(RATIO)) + 1
        steps = torch.arange(bins_per_side, dtype=torch.float64, device=scale_K.device)
        edges = SMALLEST * RATIO**steps
        self.edges_S = torch.cat([-edges.flip(0), edges])  # of the bins, in units of the scale
        shape, device = (len(scale_K), len(self.edges_S) + 1), scale_K.device
        self.count = 0
        self.counts_KS = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sums_KS = torch.zeros(shape, dtype=torch.float64, device=device)
        self._minima = [torch.full_like(self.scale_K, math.inf)]
        self._maxima = [torch.full_like(self.scale_K, -math.inf)]
        self._one = torch.ones((), dtype=torch.int64, device=device)

    def update(self, z_NK: Tensor) -> None:
        """Add the projections `z_NK` of N rows."""
        if len(z_NK) == 0:
            return
        z_NK = z_NK.double()
        bins_NK = torch.bucketize(z_NK / self.scale_K, self.edges_S)  # NaN, which the recorder reports, comes last
        self.counts_KS.scatter_add_(1, bins_NK.T, self._one.expand_as(bins_NK).T)
        self.sums_KS.scatter_add_(1, bins_NK.T, z_NK.T)
        minimum_K, maximum_K = torch.aminmax(z_NK, dim=0)
        self._minima.append(minimum_K)
        self._maxima.append(maximum_K)
        if len(self._minima) > 64:
            self._merge_extremes()
        self.count += len(z_NK)

    def _merge_extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest z per direction, (K,)."""
        self._minima = [torch.stack(self._minima).amin(0)]
        self._maxima = [torch.stack(self._maxima).amax(0)]
        return self._minima[0], self._maxima[0]

    def merge(self, other: ProjectionSketch) -> None:
        """Add the rows that `other`, built with the same scales, has seen."""
        self.counts_KS += other.counts_KS
        self.sums_KS += other.sums_KS
        self._minima += other._minima
        self._maxima += other._maxima
        self.count += other.count

    def all_reduce(self) -> None:
        """Combine with the other processes' rows; histograms and extremes travel, rows never do."""
        if not is_distributed():
            return
        reduced(self.counts_KS)
        reduced(self.sums_KS)
        minimum_K, maximum_K = self._merge_extremes()
        reduced(minimum_K, dist.ReduceOp.MIN)
        reduced(maximum_K, dist.ReduceOp.MAX)
        self.count = int(self.counts_KS[0].sum().item())

    @property
    def minimum(self) -> Tensor:
        """Smallest z per direction, (K,) float32, exact."""
        return self._checked(self._merge_extremes()[0])

    @property
    def maximum(self) -> Tensor:
        """Largest z per direction, (K,) float32, exact."""
        return self._checked(self._merge_extremes()[1])

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
