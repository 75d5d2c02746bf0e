"""The covariance of wide inputs in few rows: a Frequent Directions sketch (Liberty, 2013; Ghashami, Liberty, Phillips
and Woodruff, 2016, arXiv 1501.01711).

Of rows A it keeps L rows B and a number delta, the sum of what was taken off, with

    B^T B <= A^T A <= B^T B + delta I      (in the order of positive semi-definite matrices)

whatever the rows and their order, in memory linear in the features: no D x D matrix is ever formed. delta is 0 where A
has at most L directions, and at most the sum of the eigenvalues of A^T A beyond the k largest, over L + 1 - k, for
every k. Shapes: N rows, D input features, L rows kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from barrier_diffusers.protection.statistics import WaitingRows, is_distributed


def shrunk(rows_ND: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """B (at most `most`, D), orthogonal rows, the largest first, and the delta that goes with them.

    The squares of the singular values lose that of number `most` + 1, which is delta. From the Gram matrix of the few
    rows, in their own precision: an error of a rounding of the largest square.
    """
    squares_N, vectors_NN = torch.linalg.eigh(rows_ND @ rows_ND.T)
    squares_N, vectors_NN = squares_N.flip(0).clamp_min(0), vectors_NN.flip(1)
    delta = squares_N[most] if len(rows_ND) > most else squares_N.new_zeros(())
    kept_L = squares_N[:most]
    tiny = torch.finfo(rows_ND.dtype).tiny
    weights_L = ((kept_L - delta) / kept_L.clamp_min(tiny)).sqrt()
    return (vectors_NN[:, :most] * weights_L).T @ rows_ND, delta


class FrequentDirections(WaitingRows):
    """Count and mean of rows, and bounds on their covariance; stands in for `Moments` where D is large.

    What is sketched are the rows about their batch's mean and, for each batch that comes to others, one row more,
    sqrt(n m / (n + m)) times the difference of the means: their A^T A is the scatter about the common mean (Chan,
    Golub, LeVeque 1979), so the mean costs nothing of the bound. Rows wait in float32 until there are L of them.

    Args:
        num_features: D.
        most: L.
        device: where it lives; best that of the activations.
    """

    def __init__(self, num_features: int, most: int, device: torch.device | str | None = None):
        super().__init__(num_features, most, device)
        self.rows_LD = torch.zeros(0, num_features, dtype=torch.float64, device=device)
        self.delta = torch.zeros((), dtype=torch.float64, device=device)

    def fresh(self) -> FrequentDirections:
        """One of the same size that has seen nothing."""
        return FrequentDirections(len(self.mean_D), self.most, self.mean_D.device)

    def merge(self, other: FrequentDirections) -> None:
        """Add the rows that `other` has seen; the two deltas add up."""
        other._add_waiting()
        self._add_waiting()
        if other._added:
            self._combine(other._added, other.mean_D, [other.rows_LD])
            self.delta = self.delta + other.delta

    def _add(self, rows_ND: Tensor) -> None:
        mean_D = rows_ND.mean(0)
        self._combine(len(rows_ND), mean_D, (part - mean_D for part in rows_ND.split(self.most)))

    def _combine(self, count: int, mean_D: Tensor, centred: Iterable[Tensor]) -> None:
        """Add `count` rows about their mean, or rows that stand for them."""
        total = self._added + count
        change_D = mean_D - self.mean_D
        if self._added:
            between_D = change_D * math.sqrt(self._added * count / total)
            self.rows_LD = torch.cat([self.rows_LD, between_D[None]])
        self.mean_D = self.mean_D + change_D * (count / total)
        self._added = total
        with torch.autocast(self.mean_D.device.type, enabled=False):  # rows that waited come in whatever context
            for part in centred:
                self.rows_LD, delta = shrunk(torch.cat([self.rows_LD, part]), self.most)
                self.delta = self.delta + delta

    def all_reduce(self) -> None:
        """Combine with the other processes' rows: each process's sketch travels once, and all merge them in order."""
        self._add_waiting()
        if not is_distributed():
            return
        shape = self.most, len(self.mean_D)
        merged = self.fresh()
        for rank in range(dist.get_world_size()):
            numbers = self.mean_D.new_tensor([self._added, 0.0])
            numbers[1] = self.delta
            packed = torch.cat([self.rows_LD.new_zeros(math.prod(shape)), self.mean_D, numbers])
            packed[: self.rows_LD.numel()] = self.rows_LD.flatten()
            dist.broadcast(packed, rank)
            other = self.fresh()
            other.rows_LD = packed[: math.prod(shape)].view(shape)
            other.mean_D, other.delta = packed[math.prod(shape) : -2], packed[-1]
            other._added = int(packed[-2].item())
            merged.merge(other)
        self.mean_D, self.rows_LD, self.delta, self._added = merged.mean_D, merged.rows_LD, merged.delta, merged._added

    @property
    def bound(self) -> tuple[Tensor, Tensor]:
        """F (L, D), orthogonal rows, the largest first, and a number delta: F^T F <= C <= F^T F + delta I, float64."""
        self._require_rows()
        return self.rows_LD / math.sqrt(self._added), self.delta / self._added

    def leading(self, num: int) -> tuple[Tensor, Tensor]:
        """The `num` leading directions of the sketch, (D, num) with orthonormal columns, and of each an upper bound on
        the variance along it, which is less than this by at most delta."""
        rows_LD, delta = self.bound
        padded = torch.cat([rows_LD, rows_LD.new_zeros(max(0, num - len(rows_LD)), rows_LD.shape[1])])[:num]
        # columns of any length, and of none, come out orthonormal
        return padded.square().sum(1) + delta, torch.linalg.qr(padded.T)[0]
