"""The protection loss of a row of outputs and its gradient in closed form (docs/method.md section 2).

Of a map's drift dW (O, D) and its bias' drift db (O,) the loss reads, for each output,

    shift     s = dW mean + db
    drift     d = dW basis, (K,)
    centres   x = d c (+ db), with c (K, T) the centres of the region's T boxes
    widths    y = |d| h, with h (K, T) half of the boxes' widths

and it is the quadratic  s^2 + sum_T weight (x^2 + y^2) + sum_K square d^2  (the residual term is added where dW is at
hand, see stacks.py). Shift and centres are linear in dW, so their directions stand beside the basis: a row is
dW axes, with axes (D, S) = [mean, basis c, basis] and S = 1 + T + K. No function looks at a value on the host.

Shapes: P rows (outputs of any number of maps), D input features, K kept directions, T boxes, G groups of equal shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.region import ForgetRegion


def interval_ends(drift_OK: Tensor, lower_K: Tensor, upper_K: Tensor) -> tuple[Tensor, Tensor]:
    """Ends (O,) of {d z : lower <= z <= upper}: d+ l - d- u and d+ u - d- l, computed as d c -+ |d| w / 2."""
    centre_O = drift_OK @ ((lower_K + upper_K) / 2)
    half_width_O = drift_OK.abs() @ ((upper_K - lower_K) / 2)
    return centre_O - half_width_O, centre_O + half_width_O


def inner_product(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products; torch.sum adds in pairs, so that float32 keeps its digits (torch.dot does not)."""
    return (one * other).sum()


@dataclass(frozen=True)
class Boxes:
    """The boxes of a region as the interval term reads them: the squares of a box's two ends sum to 2 (x^2 + y^2)."""

    centres_KT: Tensor
    half_widths_KT: Tensor
    weights: tuple[float, ...]  # one per box
    shifts: tuple[float, ...]  # one per box: what one unit of bias drift adds to its centre
    square_K: Tensor | None = None  # weights of d^2

    @classmethod
    def of(cls, region: ForgetRegion, config: BarrierConfig) -> Boxes:
        """The boxes of `config.region`, none without the interval term; and what the diagonal of a wide input's
        residual, which holds outside the basis alone, counts too much inside."""
        boxes = cls._of_interval(region, config)
        if region.residual_factor is None:
            return boxes
        num_directions = region.basis.shape[1]
        inside_K = region.mean.new_full((num_directions,), -region.residual_multiplier * region.residual_diagonal)
        if not boxes.weights:
            nothing_K1 = region.mean.new_zeros(num_directions, 1)  # a box without weight, so that d is computed
            return cls(nothing_K1, nothing_K1, (0.0,), (0.0,), inside_K)
        return replace(boxes, square_K=inside_K if boxes.square_K is None else boxes.square_K + inside_K)

    @classmethod
    def _of_interval(cls, region: ForgetRegion, config: BarrierConfig) -> Boxes:
        reach = float(config.include_bias_drift)
        if not config.has_interval_term:
            empty = region.mean.new_zeros(0, 0)
            return cls(empty, empty, (), ())
        if config.region == "slabs":
            return cls._slabs(region, reach)
        bounds = {
            "two_corner": [(region.outer_lower, region.z_lower), (region.z_upper, region.outer_upper)],
            "envelope": [(region.outer_lower, region.outer_upper)],
        }[config.region]
        centres_KT = torch.stack([(lower_K + upper_K) / 2 for lower_K, upper_K in bounds], dim=1)
        half_widths_KT = torch.stack([(upper_K - lower_K) / 2 for lower_K, upper_K in bounds], dim=1)
        return cls(centres_KT, half_widths_KT, (2.0,) * len(bounds), (reach,) * len(bounds))

    @classmethod
    def _slabs(cls, region: ForgetRegion, reach: float) -> Boxes:
        """The mean over the 2K slabs in O(K) numbers: the square of the mean slab's centre and the spread around it.

        A slab is the envelope with one coordinate clipped to its low or high side, so its centre is that of the
        envelope plus a_k d_k, and sum_slabs (C + a_k d_k)^2 = 2K (C + A / 2K)^2 + sum a_k^2 d_k^2 - A^2 / 2K with
        A = sum a_k d_k over all slabs. Half widths likewise, with |d_k|.
        """
        num_slabs = 2 * len(region.z_lower)
        sides = [(region.outer_lower, region.z_lower), (region.z_upper, region.outer_upper)]
        envelopes = [(region.outer_lower + region.outer_upper) / 2, (region.outer_upper - region.outer_lower) / 2]
        clipped = [
            [(lower_K + upper_K) / 2 - envelopes[0] for lower_K, upper_K in sides],
            [(upper_K - lower_K) / 2 - envelopes[1] for lower_K, upper_K in sides],
        ]
        columns = [
            torch.stack([envelope_K + sum(parts) / num_slabs, torch.stack(parts).sum(0)], dim=1)
            for envelope_K, parts in zip(envelopes, clipped, strict=True)
        ]
        square_K = torch.stack([part.square() for parts in clipped for part in parts]).sum(0) * (2 / num_slabs)
        centres_KT, half_widths_KT = columns
        return cls(centres_KT, half_widths_KT, (2.0, -2 / num_slabs**2), (reach, 0.0), square_K)


@dataclass
class RowTerms:
    """What the loss takes of each row beside its drift."""

    scale_PL: Tensor  # twice the weight of each square, for shift and centres, 1 + T (a width has its centre's)
    half_widths_GKT: list[Tensor]  # of consecutive blocks of rows; each of the G matrices serves as many rows
    square_G1K: list[Tensor] | None  # weights of d^2, of the same blocks
    num_rows: list[int]  # of each block

    def loss(self, along_PS: Tensor) -> tuple[Tensor, Tensor]:
        """Twice the loss of all rows together, and its gradient with respect to `along_PS` = dW axes (with db in it).

        The loss is homogeneous of degree 2, so half the gradient times its argument is its value (Euler); each square
        adds a product of one sign, so nothing cancels in the sum.
        """
        num_linear = self.scale_PL.shape[1]
        drift_PK = along_PS[:, num_linear:]
        gradients = [along_PS[:, :num_linear] * self.scale_PL]
        if num_linear > 1:
            width_PT = self._blockwise(drift_PK.abs(), self.half_widths_GKT)
            width_PT.mul_(self.scale_PL[:, 1:])
            slope_PK = self._blockwise(width_PT, [half_GKT.mT for half_GKT in self.half_widths_GKT])
            slope_PK.mul_(drift_PK.sign())
            if self.square_G1K is not None:
                scaled_PK = drift_PK * self.scale_PL[:, :1]
                for part, scaled, square_G1K in zip(
                    slope_PK.split(self.num_rows), scaled_PK.split(self.num_rows), self.square_G1K, strict=True
                ):
                    shape = (len(square_G1K), -1, square_G1K.shape[2])
                    part.view(shape).addcmul_(scaled.view(shape), square_G1K)
            gradients.append(slope_PK)
        gradient_PS = torch.cat(gradients, dim=1)
        return inner_product(gradient_PS, along_PS), gradient_PS

    def _blockwise(self, rows_PX: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """Each block of rows times its matrices (G, X, Y)."""
        products = [
            torch.bmm(rows.view(len(matrix_GXY), -1, rows.shape[1]), matrix_GXY).flatten(0, 1)
            for rows, matrix_GXY in zip(rows_PX.split(self.num_rows), matrices, strict=True)
        ]
        return products[0] if len(products) == 1 else torch.cat(products)
