"""Protected maps of equal shape, computed together: the whole protection loss is one autograd function.

A network has few shapes of maps, so batched products over stacked drifts take the place of one product per map, and
the gradient is known in closed form: the number of operators depends on the number of shapes, not of maps. With LoRA
nothing of size O x D is ever formed. Nothing waits for the device.

Shapes: G groups of maps, each with an input of its own, D input features, S axes (loss.py), M maps, O outputs of a
map, P outputs of all maps, R LoRA rank, L columns of a factor of C_res.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.loss import Boxes, RowTerms, inner_product
from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.sharding import Share, gathered, own_part, summed
from barrier_diffusers.protection.targets import LoraFactors, ProtectedMap, Snapshots, bias_of

T = TypeVar("T")


MOST_STACKED = 2**25  # numbers of a stacked dW (134 MB), the most that may have to be formed beside the gradient


def own_number(rows: int, share: Share | None) -> int:
    """How many of a map's rows this process holds."""
    return rows if share is None else len(range(rows)[share.rows(rows)])


def own_rows(maps: Sequence[ProtectedMap], values: Snapshots, share: Share | None) -> Snapshots:
    """Map name -> weight (O, ...) and bias, as this process holds them; `values` have the layers' own shapes."""
    tables = [linear_map for linear_map in maps if linear_map.is_table] if share else []
    full = dict(zip([one.name for one in tables], gathered([values[one.name][0] for one in tables]), strict=True))
    found: Snapshots = {}
    for linear_map in maps:
        weight, bias = values[linear_map.name]
        if share and linear_map.name in full:
            rows = linear_map.outputs_first(full[linear_map.name])[share.rows(linear_map.num_outputs)]
        else:
            rows = linear_map.outputs_first(own_part(weight))
        found[linear_map.name] = (rows, None if bias is None else own_part(bias))
    return found


@dataclass
class MapGroup:
    """The maps that read one input, and its region."""

    maps: list[ProtectedMap]
    region: ForgetRegion
    factor_DL: Tensor | None = None  # `thin_factor` of the region's residual
    share: Share | None = None  # the rows of the maps that this process holds; None: all

    def to(self, device: torch.device) -> None:
        """Move the region and its factor."""
        self.region = self.region.to(device)
        self.factor_DL = None if self.factor_DL is None else self.factor_DL.to(device)

    @property
    def any_factor(self) -> Tensor | None:
        """F (D, L) of C_res, or of the bound on it; None where C_res is whole, or none."""
        return self.factor_DL if self.region.residual_factor is None else self.region.residual_factor

    def hold_factor(self, factor_DL: Tensor) -> None:
        """Hold the same factor in another memory."""
        if self.region.residual_factor is None:
            self.factor_DL = factor_DL
        else:
            self.region = replace(self.region, residual_factor=factor_DL)

    @property
    def held(self) -> list[ProtectedMap]:
        """The maps of which this process holds any row."""
        return [linear_map for linear_map in self.maps if own_number(linear_map.num_outputs, self.share)]

    @property
    def outputs(self) -> list[int]:
        """Number of outputs of each of these, in all processes together."""
        return [linear_map.num_outputs for linear_map in self.held]

    @property
    def shape(self) -> tuple:
        """Groups of one shape are computed together."""
        region = self.region
        known = (region.residual, self.factor_DL, region.residual_factor)
        residual = [tensor is not None for tensor in known]
        return (*region.basis.shape, *residual, region.residual_multiplier, *self.outputs)


@dataclass(frozen=True)
class StackedInputs:
    """The regions of G inputs of equal shape."""

    columns_GDC: Tensor | None  # the axes and the factor side by side, where both are and full weights train
    axes_GDS: Tensor  # mean, the boxes' centres in terms of the basis, basis
    half_widths_GKT: Tensor
    square_G1K: Tensor | None
    covariance_GDD: Tensor | None  # C_res; its slices are the regions' own
    factor_GDL: Tensor | None  # F with F F^T = C_res instead, where few columns are enough
    diagonal_G11: Tensor | None  # delta of wide inputs: C_res is F F^T + delta I less what square_G1K takes off
    weights: Tensor  # (1 + T,), of the squares of the shift and of each box's centre
    shifts: Tensor  # (1 + T,), what one unit of bias drift adds to each of these
    multiplier: float  # of the residual term

    @property
    def has_residual(self) -> bool:
        """Whether C_res is anything but 0."""
        return self.covariance_GDD is not None or self.factor_GDL is not None

    def of_group(self, position: int) -> StackedInputs:
        """Of one of the G inputs, as views."""
        chosen: dict[str, Any] = {
            name: value[position : position + 1]
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and value.dim() == 3
        }
        return replace(self, **chosen)


def stack_inputs(groups: Sequence[MapGroup], config: BarrierConfig, side_by_side: bool) -> StackedInputs:
    """Stack the regions of groups of one shape; a residual, or its factor, becomes a slice of the stacked one: it is
    held once.

    Args:
        side_by_side: whether axes and factors are to lie in one memory, which is quicker where full weights train.
    """
    regions = [group.region for group in groups]
    boxes = [Boxes.of(region, config) for region in regions]
    axes = []
    for region, box in zip(regions, boxes, strict=True):
        directions = [region.basis @ box.centres_KT, region.basis] if box.weights else []
        axes.append(torch.cat([region.mean[:, None], *directions], dim=1))
    squares = [box.square_K[None] for box in boxes if box.square_K is not None]
    axes_GDS = torch.stack(axes)
    known = [factor_DL for group in groups if (factor_DL := group.any_factor) is not None]
    columns_GDC = covariance_GDD = factor_GDL = diagonal_G11 = None
    if known:  # a factor of no column is a residual of 0
        most = max(factor_DL.shape[1] for factor_DL in known)
        padded = [F.pad(factor_DL, (0, most - factor_DL.shape[1])) for factor_DL in known]
        factor_GDL = torch.stack(padded) if most else None
        if factor_GDL is not None and side_by_side:
            columns_GDC = torch.cat([axes_GDS, factor_GDL], dim=2)
            axes_GDS, factor_GDL = columns_GDC.tensor_split([axes_GDS.shape[2]], dim=2)
        if factor_GDL is not None:
            for group, factor_DL, own_DL in zip(groups, known, factor_GDL, strict=True):
                group.hold_factor(own_DL[:, : factor_DL.shape[1]])
        if regions[0].residual_factor is not None:
            deltas = [region.residual_diagonal for region in regions]
            diagonal_G11 = axes_GDS.new_tensor(deltas)[:, None, None]
    elif len(regions) == 1 and regions[0].residual is not None:
        covariance_GDD = regions[0].residual[None]
    elif regions[0].residual is not None:
        covariance_GDD = torch.stack([region.residual for region in regions if region.residual is not None])
        for group, residual_DD in zip(groups, covariance_GDD, strict=True):
            group.region = replace(group.region, residual=residual_DD)
    return StackedInputs(
        columns_GDC=columns_GDC,
        axes_GDS=axes_GDS,
        half_widths_GKT=torch.stack([box.half_widths_KT for box in boxes]),
        square_G1K=torch.stack(squares) if squares else None,
        covariance_GDD=covariance_GDD,
        factor_GDL=factor_GDL,
        diagonal_G11=diagonal_G11,
        weights=torch.tensor((1.0, *boxes[0].weights), device=regions[0].mean.device),
        shifts=torch.tensor((1.0, *boxes[0].shifts), device=regions[0].mean.device),
        multiplier=regions[0].residual_multiplier,
    )


def stacked_drift(
    weights: Sequence[Tensor], origins: Sequence[Tensor | None], workspace: Tensor | None = None
) -> Tensor:
    """W - W0 (or W, where there is no origin) of maps with equal D, one under the other, (P, D) float32.

    Args:
        workspace: flat, float32, of at least P D numbers: where to put it.
    """
    flat = [weight.flatten(1) for weight in weights]
    if workspace is None:
        drift_PD = torch.cat(flat).float()
    else:
        rows, num_features = sum(len(weight) for weight in flat), flat[0].shape[1]
        drift_PD = torch.cat(flat, out=workspace[: rows * num_features].view(rows, num_features))
    parts = drift_PD.split([len(weight) for weight in flat])
    known = [(part, origin.flatten(1)) for part, origin in zip(parts, origins, strict=True) if origin is not None]
    if known:
        torch._foreach_sub_([part for part, _ in known], [origin for _, origin in known])
    return drift_PD


@dataclass
class Gradients:
    """Value and gradient of the loss, or of a part of it."""

    values: list[Tensor] = field(default_factory=list)  # scalars that sum to twice the loss
    buffers: list[Tensor] = field(default_factory=list)  # float32; the parameters' gradients, one under the other

    def extend(self, other: Gradients) -> None:
        """Add another part of the loss."""
        self.values += other.values
        self.buffers += other.buffers


class _ClosedForm(torch.autograd.Function):
    """A loss whose gradient is computed with its value, in the forward pass; the backward one hands it out.

    `compute` gets the parameters (rows first; None where a map has no bias), `rows` says how many rows of the buffers
    each one owns, in their order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[Sequence[Tensor | None]], Gradients],
        rows: Sequence[int],
        *parameters: Tensor | None,
    ) -> Tensor:
        gradients = compute(parameters)
        ctx.compute, ctx.rows, ctx.buffers = compute, rows, gradients.buffers
        ctx.save_for_backward(*parameters)  # for a second backward pass over a retained graph alone
        ctx.like = [None if parameter is None else (parameter.shape, parameter.dtype) for parameter in parameters]
        return torch.stack(gradients.values).sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        buffers = ctx.compute(ctx.saved_tensors).buffers if ctx.buffers is None else ctx.buffers
        ctx.buffers = None  # they are given away, not copied
        torch._foreach_mul_(buffers, gradient)
        handed: list[Tensor | None] = []
        for buffer in buffers:
            start, end, total = len(handed), len(handed), 0
            while total < len(buffer):
                total, end = total + ctx.rows[end], end + 1
            dtypes = {like[1] for like in ctx.like[start:end] if like is not None}
            same = buffer.to(dtypes.pop()) if len(dtypes) == 1 else buffer  # at once, where it can be
            for part, like in zip(same.split(ctx.rows[start:end]), ctx.like[start:end], strict=True):
                handed.append(None if like is None else part.view(like[0]).to(like[1]))
        return None, None, *handed


def row_terms(inputs: Sequence[StackedInputs], rows: Sequence[int], twice: Sequence[Tensor]) -> RowTerms:
    """Of the rows of several stacks, one under the other.

    Args:
        rows: number of each stack.
        twice: twice the weight of each row's loss in the total, (P, 1) for each stack.
    """
    squares = [one.square_G1K for one in inputs]
    if any(square_G1K is not None for square_G1K in squares):
        shapes = [(len(one.axes_GDS), 1, one.half_widths_GKT.shape[1]) for one in inputs]
        known = [
            one.axes_GDS.new_zeros(shape) if square_G1K is None else square_G1K
            for one, shape, square_G1K in zip(inputs, shapes, squares, strict=True)
        ]
    else:
        known = None
    return RowTerms(
        scale_PL=torch.cat([twice_P1 * one.weights for twice_P1, one in zip(twice, inputs, strict=True)]),
        half_widths_GKT=[one.half_widths_GKT for one in inputs],
        square_G1K=known,
        num_rows=list(rows),
    )


class FullStack:
    """Groups of maps of equal shape that train their full weights.

    Args:
        maps: group by group; each group has as many outputs.
        weight: of a map's loss in the total, 1 / number of maps or 1.
        share: the rows that this process computes; None: all.
    """

    def __init__(self, inputs: StackedInputs, maps: Sequence[ProtectedMap], weight: float, share: Share | None = None):
        self.inputs, self.maps = inputs, list(maps)
        totals = [linear_map.num_outputs for linear_map in maps]
        self.outputs = [own_number(total, share) for total in totals]
        self.has_bias = any(linear_map.bias is not None for linear_map in maps)
        twice_P = torch.cat(
            [torch.full((number,), 2 * weight / total) for number, total in zip(self.outputs, totals, strict=True)]
        )
        self.twice_P1 = twice_P.to(inputs.axes_GDS.device)[:, None]
        self.residual_P1 = self.twice_P1 * inputs.multiplier
        one_size = len(set(totals)) == 1
        self.residual_scale = 2 * weight / totals[0] * inputs.multiplier if one_size else None
        self.axes_GDS = inputs.axes_GDS if inputs.columns_GDC is None else inputs.columns_GDC
        self.has_energy = inputs.covariance_GDD is not None or inputs.diagonal_G11 is not None

    @property
    def rows(self) -> list[int]:
        """Number of rows of each of the parameters."""
        return self.outputs * 2 if self.has_bias else self.outputs

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, rows of a group, D) of the stacked drift."""
        num_groups, num_features = self.axes_GDS.shape[:2]
        return num_groups, sum(self.outputs) // num_groups, num_features

    def of(self, values: Snapshots) -> list[Tensor | None]:
        """All weights and, if there are any, all biases of what `own_rows` gave."""
        found = [values[linear_map.name] for linear_map in self.maps]
        weights = [weight for weight, _ in found]
        return [*weights, *(bias for _, bias in found)] if self.has_bias else [*weights]

    def products(
        self, now: Sequence[Tensor | None], then: Sequence[Tensor | None], buffer_GPD: Tensor, workspace: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """dW axes, (G, P, S), and of each row the energy dW C_res dW^T, if C_res is neither 0 nor has a factor, or dW
        delta dW^T, if there is a diagonal; left in the buffer is dW C_res, or dW.

        Args:
            now, then: the parameters and their origins.
            workspace: flat, of as many numbers as the buffer; not read where the energy is None.
        """
        weights = [weight for weight in now[: len(self.maps)] if weight is not None]
        covariance_GDD = self.inputs.covariance_GDD
        where = buffer_GPD.view(-1) if covariance_GDD is None else workspace
        drift_GPD = stacked_drift(weights, then[: len(self.maps)], where).view(self.shape)
        along_GPS = torch.bmm(self.axes_GDS.mT, drift_GPD.mT).mT  # a third faster on a CPU than the other way round
        diagonal_G11 = self.inputs.diagonal_G11
        if diagonal_G11 is not None:
            lengths_GP1 = torch.linalg.vector_norm(drift_GPD, dim=2, keepdim=True)
            return along_GPS, (lengths_GP1.square() * diagonal_G11).flatten()
        if covariance_GDD is None:
            return along_GPS, None
        torch.bmm(drift_GPD, covariance_GDD, out=buffer_GPD)
        return along_GPS, drift_GPD.mul_(buffer_GPD).sum(2).flatten()

    def gradients(self, gradient_PS: Tensor, along_GPL: Tensor, buffer_GPD: Tensor) -> Gradients:
        """Of the parameters, from that of dW axes: one buffer for the weights, one for the biases.

        Args:
            along_GPL: dW F, of the columns of C_res's factor.
        """
        inputs, found = self.inputs, Gradients()
        gradient_GPS = gradient_PS.view(*self.shape[:2], -1)
        if inputs.factor_GDL is not None:
            slope_GPL = along_GPL * self.residual_P1.view(*self.shape[:2], 1)
            found.values.append(inner_product(slope_GPL, along_GPL))
            gradient_GPS = torch.cat([gradient_GPS, slope_GPL], dim=2)
        if inputs.diagonal_G11 is not None:
            buffer_GPD.mul_(self.residual_P1.view(*self.shape[:2], 1) * inputs.diagonal_G11)
            buffer_GPD.baddbmm_(gradient_GPS, self.axes_GDS.mT)
        elif inputs.covariance_GDD is None:
            torch.bmm(gradient_GPS, self.axes_GDS.mT, out=buffer_GPD)
        else:
            if self.residual_scale is None:
                buffer_GPD.mul_(self.residual_P1.view(*self.shape[:2], 1))
            scale = 1.0 if self.residual_scale is None else self.residual_scale
            buffer_GPD.baddbmm_(gradient_GPS, self.axes_GDS.mT, beta=scale)
        found.buffers.append(buffer_GPD.flatten(0, 1))
        if self.has_bias:
            found.buffers.append(gradient_PS[:, : len(inputs.shifts)] @ inputs.shifts)
        return found

    def bias_drift(self, now: Sequence[Tensor | None], then: Sequence[Tensor | None]) -> Tensor:
        """db of all maps, (P,); 0 where there is no bias."""
        now, then = now[len(self.maps) :], then[len(self.maps) :]
        zero = self.residual_P1.new_zeros(1)
        columns = [
            zero.expand(number)[:, None] if bias is None or origin is None else bias[:, None]
            for bias, origin, number in zip(now, then, self.outputs, strict=True)
        ]
        return stacked_drift(columns, [None if origin is None else origin[:, None] for origin in then]).flatten()


class FullStacks:
    """Stacks whose regions have one number of axes; their rows are taken together, the largest stack first.

    The gradients lie in one piece of memory, and a stack's drift lies where the gradients of the stacks after it will:
    next to nothing is formed beside the gradient.
    """

    def __init__(self, stacks: Sequence[FullStack]):
        self.stacks = sorted(stacks, key=lambda stack: -math.prod(stack.shape))
        self._sizes = [math.prod(stack.shape) for stack in self.stacks]
        self._num_rows = [sum(stack.outputs) for stack in self.stacks]
        self._num_axes = stacks[0].inputs.axes_GDS.shape[2]
        self.terms = row_terms(
            [stack.inputs for stack in self.stacks], self._num_rows, [stack.twice_P1 for stack in self.stacks]
        )
        dense = [stack.residual_P1 for stack in self.stacks if stack.has_energy]
        self._residual_P = torch.cat(dense).flatten() if dense else None
        left = [sum(self._sizes[position + 1 :]) for position in range(len(self.stacks))]
        self._fits = [size <= rest for size, rest in zip(self._sizes, left, strict=True)]
        short = [
            size
            for stack, size, fits in zip(self.stacks, self._sizes, self._fits, strict=True)
            if stack.inputs.covariance_GDD is not None and not fits
        ]
        self._num_spare = max(short, default=0)

    @property
    def rows(self) -> list[int]:
        """Number of rows of each of the parameters."""
        return [number for stack in self.stacks for number in stack.rows]

    def of(self, values: Snapshots) -> list[Tensor | None]:
        """The parameters, of what `own_rows` gave, stack by stack."""
        return [parameter for stack in self.stacks for parameter in stack.of(values)]

    def gradients(self, now: Sequence[Tensor | None], then: Sequence[Tensor | None]) -> Gradients:
        """Of the parameters, of which `then` are the origins."""
        device = self.terms.scale_PL.device
        flat, spare = torch.empty(sum(self._sizes), device=device), torch.empty(self._num_spare, device=device)
        buffers = [part.view(stack.shape) for part, stack in zip(flat.split(self._sizes), self.stacks, strict=True)]
        counts, ends = [len(stack.rows) for stack in self.stacks], list(itertools.accumulate(self._sizes))
        parts = list(zip(self.stacks, _split(now, counts), _split(then, counts), strict=True))
        products = [
            stack.products(here, origins, buffer, flat[end:] if fits else spare)
            for (stack, here, origins), buffer, end, fits in zip(parts, buffers, ends, self._fits, strict=True)
        ]
        along_PS = torch.empty(sum(self._num_rows), self._num_axes, device=device)
        rows = along_PS.split(self._num_rows)
        torch._foreach_copy_(
            [part.view(*stack.shape[:2], -1) for part, stack in zip(rows, self.stacks, strict=True)],
            [along_GPS[:, :, : self._num_axes] for along_GPS, _ in products],
        )
        for (stack, here, origins), part in zip(parts, rows, strict=True):
            if stack.has_bias:
                shifts = stack.inputs.shifts
                part[:, : len(shifts)].addr_(stack.bias_drift(here, origins), shifts)
        value, gradient_PS = self.terms.loss(along_PS)
        found = Gradients([value])
        energies = [energy_P for _, energy_P in products if energy_P is not None]
        if self._residual_P is not None:
            found.values.append(inner_product(torch.cat(energies), self._residual_P))
        for stack, part, (along_GPS, _), buffer in zip(
            self.stacks, gradient_PS.split(self._num_rows), products, buffers, strict=True
        ):
            found.extend(stack.gradients(part, along_GPS[:, :, self._num_axes :], buffer))
        return found


class LoraStack:
    """Groups of maps of equal shape, output included, whose LoRA adapters of one rank train.

    Args:
        maps: group by group; each group has as many maps.
        weight: of a map's loss in the total, 1 / number of maps or 1.
        share: the rows that this process computes; None: all.
    """

    def __init__(self, inputs: StackedInputs, maps: Sequence[ProtectedMap], weight: float, share: Share | None = None):
        self.inputs, self.maps = inputs, list(maps)
        self.num_rows = len(maps) * own_number(maps[0].num_outputs, share)
        self.twice = 2 * weight / maps[0].num_outputs
        self.residual_scale = self.twice * inputs.multiplier

    def along(self, lora_A_GRD: Tensor, lora_B_MOR: Tensor) -> tuple[Tensor, Tensor]:
        """A axes, (M, R, S), and dW axes, (P, S)."""
        reach_MRS = torch.bmm(lora_A_GRD, self.inputs.axes_GDS)
        reach_MRS = reach_MRS.view(len(lora_B_MOR), lora_B_MOR.shape[2], -1)
        return reach_MRS, torch.bmm(lora_B_MOR, reach_MRS).flatten(0, 1)

    def gradients(
        self, lora_A_GRD: Tensor, lora_B_MOR: Tensor, reach_MRS: Tensor, gradient_PS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With respect to A and to B, from that of dW axes, and <B^T B, A C_res A^T>, unless there is no residual."""
        (maps, _, rank), inputs = lora_B_MOR.shape, self.inputs
        gradient_MOS = gradient_PS.view(maps, -1, gradient_PS.shape[1])
        gradient_B = torch.bmm(gradient_MOS, reach_MRS.mT)
        inner_GRS = torch.bmm(lora_B_MOR.mT, gradient_MOS).view(len(lora_A_GRD), -1, gradient_PS.shape[1])
        gradient_A = torch.bmm(inner_GRS, inputs.axes_GDS.mT)
        if not inputs.has_residual:
            return gradient_A, gradient_B, None
        gram_MRR = torch.bmm(lora_B_MOR.mT, lora_B_MOR)
        if inputs.covariance_GDD is not None:
            side_MRD = torch.bmm(lora_A_GRD, inputs.covariance_GDD).view(maps, rank, -1)
            inner_MRR = torch.bmm(side_MRD, lora_A_GRD.reshape(maps, rank, -1).mT)
            gradient_A.view(maps, rank, -1).baddbmm_(gram_MRR, side_MRD, alpha=self.residual_scale)
        else:
            assert inputs.factor_GDL is not None
            side_MRL = torch.bmm(lora_A_GRD, inputs.factor_GDL).view(maps, rank, -1)
            inner_MRR = torch.bmm(side_MRL, side_MRL.mT)
            spread_GRL = torch.bmm(gram_MRR, side_MRL).view(len(lora_A_GRD), -1, side_MRL.shape[2])
            gradient_A.baddbmm_(spread_GRL, inputs.factor_GDL.mT, alpha=self.residual_scale)
            if inputs.diagonal_G11 is not None:
                scaled_MRD = (lora_A_GRD * inputs.diagonal_G11).view(maps, rank, -1)
                inner_MRR = torch.baddbmm(inner_MRR, scaled_MRD, lora_A_GRD.reshape(maps, rank, -1).mT)
                gradient_A.view(maps, rank, -1).baddbmm_(gram_MRR, scaled_MRD, alpha=self.residual_scale)
        gradient_B.baddbmm_(lora_B_MOR, inner_MRR, alpha=self.residual_scale)
        return gradient_A, gradient_B, inner_product(gram_MRR, inner_MRR)


class LoraStacks:
    """Stacks whose adapters have one rank and whose regions have one number of axes; their rows are taken together."""

    def __init__(self, stacks: Sequence[LoraStack], rank: int, scalings: Sequence[float]):
        self.stacks, self.rank, self.scalings = list(stacks), rank, list(scalings)
        inputs, device = [stack.inputs for stack in stacks], stacks[0].inputs.axes_GDS.device
        self.rows = [stack.num_rows for stack in stacks]
        twice = [torch.full((stack.num_rows, 1), stack.twice, device=device) for stack in stacks]
        self.terms = row_terms(inputs, self.rows, twice)
        scales = [stack.residual_scale for stack in stacks if stack.inputs.has_residual]
        self.residual_scales = torch.tensor(scales, device=device)

    @property
    def maps(self) -> list[ProtectedMap]:
        """Of all stacks, in their order."""
        return [linear_map for stack in self.stacks for linear_map in stack.maps]

    def gradients(self, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> Gradients:
        """Of the loss with respect to A and B of all maps, two buffers for each stack."""
        flat_A, flat_B = (torch.cat([factor.flatten() for factor in factors]).float() for factors in (lora_A, lora_B))
        sizes = [(len(stack.maps) * self.rank, stack.inputs.axes_GDS) for stack in self.stacks]
        parts_A = [
            part.view(len(axes_GDS), -1, axes_GDS.shape[1])
            for part, (_, axes_GDS) in zip(
                flat_A.split([rows * axes_GDS.shape[1] for rows, axes_GDS in sizes]), sizes, strict=True
            )
        ]
        parts_B = [
            part.view(len(stack.maps), -1, self.rank)
            for part, stack in zip(flat_B.split([rows * self.rank for rows in self.rows]), self.stacks, strict=True)
        ]
        if any(scaling != 1 for scaling in self.scalings):
            torch._foreach_mul_(parts_B, self.scalings)
        reaches, along = zip(
            *(stack.along(A, B) for stack, A, B in zip(self.stacks, parts_A, parts_B, strict=True)), strict=True
        )
        value, gradient_PS = self.terms.loss(torch.cat(along))
        found, energies, gradients_B = Gradients([value]), [], []
        for stack, A, B, reach, rows in zip(
            self.stacks, parts_A, parts_B, reaches, gradient_PS.split(self.rows), strict=True
        ):
            gradient_A, gradient_B, energy = stack.gradients(A, B, reach, rows)
            found.buffers.append(gradient_A.flatten(0, 1))
            gradients_B.append(gradient_B.flatten(0, 1))
            energies += [] if energy is None else [energy]
        if energies:
            found.values.append(torch.dot(torch.stack(energies), self.residual_scales))
        if any(scaling != 1 for scaling in self.scalings):
            torch._foreach_mul_(gradients_B, self.scalings)
        found.buffers += gradients_B
        return found


def runs(items: Sequence[T], sizes: Sequence[int], most: float) -> list[list[T]]:
    """The items, in order, in lists whose sizes sum to at most `most`, or that have one element."""
    found: list[list[T]] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if not found or total + size > most:
            found.append([])
            total = 0
        found[-1].append(item)
        total += size
    return found


def _split(items: Sequence[T], counts: Sequence[int]) -> list[Sequence[T]]:
    """The items in lists of so many."""
    ends = list(itertools.accumulate(counts))
    return [items[end - count : end] for count, end in zip(counts, ends, strict=True)]


def _alike(
    inputs: StackedInputs, groups: Sequence[MapGroup], factors: Mapping[str, LoraFactors]
) -> Iterator[tuple[StackedInputs, list[ProtectedMap]]]:
    """Maps whose adapters have equal shapes, group by group: of all groups, or of each where the groups differ."""
    by_shape: list[dict[tuple, list[ProtectedMap]]] = []
    for group in groups:
        found: dict[tuple, list[ProtectedMap]] = {}
        for linear_map in group.held:
            known = factors[linear_map.name]
            found.setdefault((*known.lora_B_OR.shape, known.scaling), []).append(linear_map)
        by_shape.append(found)
    sizes = [{shape: len(maps) for shape, maps in found.items()} for found in by_shape]
    if all(size == sizes[0] for size in sizes):
        for shape in sizes[0]:
            yield inputs, [linear_map for found in by_shape for linear_map in found[shape]]
    else:
        for position, found in enumerate(by_shape):
            for maps in found.values():
                yield inputs.of_group(position), maps


class StackedLoss:
    """The protection loss of all maps; lambda_interval is not in it.

    Args:
        regions: of each distinct input, with the maps that read it.
        adapter: whether LoRA adapters train instead of the maps' weights.

    Attributes:
        share: the rows whose terms this process computes; the loss is the sum over all of them. None: every row.
    """

    def __init__(
        self, regions: Sequence[tuple[Sequence[ProtectedMap], ForgetRegion]], config: BarrierConfig, adapter: bool
    ):
        groups = [MapGroup(list(maps), region, region.thin_factor()) for maps, region in regions]
        self._set(groups, config, adapter, sum(len(group.maps) for group in groups))

    @classmethod
    def of_groups(cls, groups: list[MapGroup], config: BarrierConfig, adapter: bool, num_maps: int) -> StackedLoss:
        """The part of the loss of all `num_maps` maps that these have in it."""
        part = cls.__new__(cls)
        part._set(groups, config, adapter, num_maps)
        return part

    def _set(self, groups: list[MapGroup], config: BarrierConfig, adapter: bool, num_maps: int) -> None:
        self.groups, self.config, self.adapter = groups, config, adapter
        self.share: Share | None = None
        self._weight = 1 / num_maps if config.normalize_protection else 1.0  # of a map's loss in the total
        self._build()

    def to(self, device: torch.device) -> None:
        """Move everything."""
        for group in self.groups:
            group.to(device)
        self._build()

    def cut(self, share: Share | None) -> None:
        """Compute the terms of these rows from now on."""
        if share != self.share:
            self.share = share
            self._build()

    @property
    def maps(self) -> list[ProtectedMap]:
        """All maps, group by group."""
        return [linear_map for group in self.groups for linear_map in group.maps]

    def _build(self) -> None:
        by_shape: dict[tuple, list[MapGroup]] = {}
        for group in self.groups:
            group.share = self.share
            if group.held:
                by_shape.setdefault(group.shape, []).append(group)
        full: dict[tuple, list[FullStack]] = {}
        self._lora: dict[tuple, list[LoraStacks]] = {}  # by ranks and scalings
        self._inputs: list[tuple[StackedInputs, list[MapGroup]]] = []
        most = math.inf if self.adapter else MOST_STACKED
        for alike in by_shape.values():
            for groups in runs(alike, [sum(group.outputs) * group.region.num_features for group in alike], most):
                inputs = stack_inputs(groups, self.config, side_by_side=not self.adapter)
                self._inputs.append((inputs, groups))
                if not self.adapter:
                    maps = [linear_map for group in groups for linear_map in group.held]
                    sizes = [linear_map.num_outputs * linear_map.num_features for linear_map in maps]
                    parts = runs(maps, sizes, most) if len(groups) == 1 else [maps]
                    stacks = [FullStack(inputs, part, self._weight, self.share) for part in parts]
                    full.setdefault(tuple(inputs.half_widths_GKT.shape[1:]), []).extend(stacks)
        self._full = [FullStacks(stacks) for stacks in full.values()]
        if self.adapter and self.share is None:  # now rather than in the first step
            self._lora_stacks({linear_map.name: linear_map.lora() for linear_map in self.maps})

    def value(self, snapshots: Snapshots) -> Tensor:
        """The loss now; the snapshots are not read where adapters train."""
        return self.of_adapters() if self.adapter else self.of_weights(snapshots)

    def of_weights(self, snapshots: Snapshots) -> Tensor:
        """For maps that train their full weights; these and the biases are measured from the snapshots."""
        maps, share = self.maps, self.share
        layers = {linear_map.name: linear_map.layer for linear_map in maps}
        now = own_rows(maps, {name: (layer.weight, bias_of(layer)) for name, layer in layers.items()}, share)
        then = own_rows(maps, snapshots, share)
        parameters = [parameter for stacks in self._full for parameter in stacks.of(now)]
        origins = [origin for stacks in self._full for origin in stacks.of(then)]
        counts = [len(stacks.rows) for stacks in self._full]

        def compute(now: Sequence[Tensor | None]) -> Gradients:
            found = Gradients()
            for stacks, part, then in zip(self._full, _split(now, counts), _split(origins, counts), strict=True):
                found.extend(stacks.gradients(part, then))
            return found

        rows = [number for stacks in self._full for number in stacks.rows]
        empty = [value for pair in now.values() for value in pair if value is not None and not len(value)]
        return self._over_all_rows(compute, rows, parameters, empty)

    def of_adapters(self) -> Tensor:
        """For maps whose LoRA adapter trains; the frozen base weights are the snapshot."""
        factors = {linear_map.name: linear_map.lora() for linear_map in self.maps}
        if self.share is not None:
            downs = gathered([known.lora_A_RD for known in factors.values()])
            factors = {
                name: replace(known, lora_A_RD=down, lora_B_OR=own_part(known.lora_B_OR))
                for (name, known), down in zip(factors.items(), downs, strict=True)
            }
        stacks = self._lora_stacks(factors)
        counts = [2 * len(stack.maps) for stack in stacks]
        parameters = [
            parameter
            for stack in stacks
            for parameter in (
                *(factors[linear_map.name].lora_A_RD for linear_map in stack.maps),
                *(factors[linear_map.name].lora_B_OR for linear_map in stack.maps),
            )
        ]

        def compute(now: Sequence[Tensor]) -> Gradients:
            found = Gradients()
            for stack, part in zip(stacks, _split(now, counts), strict=True):
                found.extend(stack.gradients(part[: len(stack.maps)], part[len(stack.maps) :]))
            return found

        idle = [known for known in factors.values() if not len(known.lora_B_OR)]
        empty = [factor for known in idle for factor in (known.lora_A_RD[:0], known.lora_B_OR)]
        return self._over_all_rows(compute, [len(parameter) for parameter in parameters], parameters, empty)

    def _over_all_rows(
        self,
        compute: Callable[[Sequence[Any]], Gradients],
        rows: Sequence[int],
        parameters: Sequence[Tensor | None],
        empty: Sequence[Tensor],
    ) -> Tensor:
        """The loss over this process's rows, summed over the processes.

        Args:
            empty: parameters of which this process holds no row. They get an empty gradient: it would else be missing
                here, and an operation of all processes would wait for this one.
        """
        if parameters:
            loss = _ClosedForm.apply(compute, rows, *parameters)
        else:
            loss = torch.zeros((), device=self.groups[0].region.mean.device)
        if empty:
            loss = loss + torch.cat([value.flatten() for value in empty]).float().sum()
        return summed(loss, self.share)

    def _lora_stacks(self, factors: dict[str, LoraFactors]) -> list[LoraStacks]:
        """The stacks for adapters of these ranks and scalings, made once."""
        kinds = tuple((len(known.lora_A_RD), known.scaling) for known in factors.values())
        if kinds not in self._lora:
            by_size: dict[tuple[int, int], list[tuple[LoraStack, float]]] = {}
            for inputs, groups in self._inputs:
                for part, maps in _alike(inputs, groups, factors):
                    known = factors[maps[0].name]
                    stack = LoraStack(part, maps, self._weight, self.share)
                    size = len(known.lora_A_RD), inputs.half_widths_GKT.shape[1]
                    by_size.setdefault(size, []).append((stack, known.scaling))
            self._lora = {
                kinds: [
                    LoraStacks([stack for stack, _ in made], rank, [scaling for _, scaling in made])
                    for (rank, _), made in by_size.items()
                ]
            }
        return self._lora[kinds]
