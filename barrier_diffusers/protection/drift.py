"""Drift dW = W - W0 of one map (or of several stacked along O), seen as full weights or as LoRA factors.

Everything the loss needs is dW times something; with LoRA nothing of size O x D is ever formed. All results are
float32. Shapes: O output features, D input features, K kept directions, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from barrier_diffusers.protection.region import ForgetRegion

MOST_STACKED = 5_000_000  # numbers of a stacked dW (20 MB): enough to fill a device, and no more memory than needed


class Drift(Protocol):
    """What a drift does to a vector, a basis and a covariance, and to all that the loss reads of an input at once."""

    @property
    def delta_bias_O(self) -> Tensor | None:
        """db, (O,); None for a map without bias."""
        ...

    def apply(self, vector_D: Tensor) -> Tensor:
        """dW v, (O,)."""
        ...

    def project(self, basis_DK: Tensor) -> Tensor:
        """d = dW basis, (O, K)."""
        ...

    def energy(self, covariance_DD: Tensor) -> Tensor:
        """Diagonal of dW C dW^T, (O,): the mean squared drift of each output on centred inputs of covariance C."""
        ...

    def products(self, frame: Frame) -> Products:
        """dW mean, dW basis and the energy in one go."""
        ...

    def dense(self) -> Tensor:
        """dW itself, (O, D); for certificates and tests, not for training."""
        ...


class _Difference(torch.autograd.Function):
    """W - W0 of several maps, flattened and stacked along O, without a copy of each; gradients are views."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        half = len(tensors) // 2
        weights, origins = tensors[:half], tensors[half:]
        ctx.weights = [(weight.shape, weight.dtype) for weight in weights]
        ctx.set_materialize_grads(False)
        rows = [len(weight) for weight in weights]
        delta_OD = weights[0].new_empty(sum(rows), weights[0][0].numel(), dtype=torch.float32)
        for part, weight, origin in zip(delta_OD.split(rows), weights, origins, strict=True):
            torch.sub(weight.float().flatten(1), origin.float().flatten(1), out=part)
        return delta_OD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        none = (None,) * len(ctx.weights)
        if gradients[0] is None:
            return none + none
        parts = gradients[0].split([shape[0] for shape, _ in ctx.weights])
        own = (part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.weights, strict=True))
        return (*own, *none)


@dataclass(frozen=True)
class FullDrift:
    """A drift of full weights."""

    delta_OD: Tensor
    delta_bias_O: Tensor | None = None

    def apply(self, vector_D: Tensor) -> Tensor:
        """dW v, (O,)."""
        return self.delta_OD @ vector_D

    def project(self, basis_DK: Tensor) -> Tensor:
        """d = dW basis, (O, K)."""
        return self.delta_OD @ basis_DK

    def energy(self, covariance_DD: Tensor) -> Tensor:
        """diag(dW C dW^T), (O,)."""
        return ((self.delta_OD @ covariance_DD) * self.delta_OD).sum(1)

    def products(self, frame: Frame) -> Products:
        """dW mean, dW basis and the energy in one go."""
        return full_products(self.delta_OD, frame)

    def dense(self) -> Tensor:
        """dW, (O, D)."""
        return self.delta_OD


@dataclass(frozen=True)
class LoraDrift:
    """dW = scaling * B A, kept as factors; the frozen base weight is the snapshot."""

    lora_A_RD: Tensor
    lora_B_OR: Tensor
    scaling: float
    delta_bias_O: Tensor | None = None

    def apply(self, vector_D: Tensor) -> Tensor:
        """s B (A v), (O,)."""
        return self.scaling * (self.lora_B_OR.float() @ (self.lora_A_RD.float() @ vector_D))

    def project(self, basis_DK: Tensor) -> Tensor:
        """s B (A basis), (O, K)."""
        return self.scaling * (self.lora_B_OR.float() @ (self.lora_A_RD.float() @ basis_DK))

    def energy(self, covariance_DD: Tensor) -> Tensor:
        """diag(s^2 B (A C A^T) B^T), (O,); its sum is s^2 <B^T B, A C A^T>."""
        lora_A_RD, lora_B_OR = self.lora_A_RD.float(), self.lora_B_OR.float()
        inner_RR = lora_A_RD @ covariance_DD @ lora_A_RD.T
        return self.scaling**2 * ((lora_B_OR @ inner_RR) * lora_B_OR).sum(1)

    def products(self, frame: Frame) -> Products:
        """dW mean, dW basis and the energy in one go."""
        return stack_lora([self]).products(frame)

    def dense(self) -> Tensor:
        """s B A, (O, D)."""
        return self.scaling * (self.lora_B_OR.float() @ self.lora_A_RD.float())


@dataclass(frozen=True)
class LoraStack:
    """M maps with the same O, R and input as one map with M * O outputs."""

    lora_A_MRD: Tensor
    lora_B_MOR: Tensor  # the scaling is in it
    delta_bias_O: Tensor | None = None

    def products(self, frame: Frame) -> Products:
        """dW mean, dW basis and the energy in one go, for the outputs of all maps."""
        return lora_products(self.lora_A_MRD, self.lora_B_MOR, frame)


def full_drift(weight: Tensor, weight0: Tensor, bias: Tensor | None = None, bias0: Tensor | None = None) -> FullDrift:
    """dW = W - W0 and db = b - b0; convolution kernels are flattened to (O, C_in / groups * kh * kw)."""
    return stacked_drift([weight], [weight0], [bias], [bias0])


def stacked_drift(
    weights: Sequence[Tensor],
    weights0: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    biases0: Sequence[Tensor | None],
) -> FullDrift:
    """Maps that read the same input as one map with all their outputs: one matrix product instead of several."""
    delta_OD = _Difference.apply(*weights, *weights0)
    pairs = list(zip(weights, biases, biases0, strict=True))
    if all(bias is None or bias0 is None for _, bias, bias0 in pairs):
        return FullDrift(delta_OD)
    parts = [
        delta_OD.new_zeros(len(weight)) if bias is None or bias0 is None else bias.float() - bias0.float()
        for weight, bias, bias0 in pairs
    ]
    return FullDrift(delta_OD, torch.cat(parts))


def stack_lora(drifts: Sequence[LoraDrift]) -> LoraStack:
    """Maps with the same O, R and input as one; no bias of theirs drifts, as peft's are frozen."""
    lora_A_MRD = torch.stack([drift.lora_A_RD.float() for drift in drifts])
    return LoraStack(lora_A_MRD, torch.stack([drift.scaling * drift.lora_B_OR.float() for drift in drifts]))


def chunks(sizes: Sequence[int], most: int = MOST_STACKED) -> list[list[int]]:
    """Positions 0, 1, ... in runs whose sizes sum to at most `most`, or that have one element."""
    found: list[list[int]] = []
    total = 0
    for position, size in enumerate(sizes):
        if not found or total + size > most:
            found.append([])
            total = 0
        found[-1].append(position)
        total += size
    return found


THIN = 4  # a factor of C_res is used where it has at most D / THIN columns: then it halves the work at least


LEFT_OUT = 1e-6  # share of the trace of C_res that its factor may miss: the size of float32's rounding


class Products(NamedTuple):
    """What the loss reads of a drift, one row per output."""

    mean_O: Tensor  # dW mean
    drift_OK: Tensor  # dW basis
    energy_O: Tensor | None  # diagonal of dW C_res dW^T; None without a residual


@dataclass(frozen=True)
class Frame:
    """Mean, basis and residual covariance of a region, as the products take them; on the region's device."""

    axes_DS: Tensor  # the mean, the basis, and the columns of F with F F^T = C_res where few of them are enough
    residual_DD: Tensor | None  # C_res itself; None where there is none, or F
    num_directions: int  # K

    @classmethod
    def of(cls, region: ForgetRegion) -> Frame:
        """The frame of a region. It shares the residual's memory, or replaces it by a thin factor."""
        axes, residual_DD, directions = [region.mean[:, None], region.basis], region.residual, region.basis.shape[1]
        if residual_DD is not None:
            factor_DL = thin_factor(residual_DD, len(region.mean) // THIN)
            if factor_DL is not None:
                axes.append(factor_DL)
                residual_DD = None
        return cls(torch.cat(axes, dim=1), residual_DD, directions)

    @property
    def has_factor(self) -> bool:
        """Whether the axes hold F; it may have no column, where C_res is zero."""
        return self.axes_DS.shape[1] > 1 + self.num_directions

    def of_moved(self, region: ForgetRegion) -> Frame:
        """The same frame where the region is now."""
        residual_DD = None if self.residual_DD is None else region.residual
        return Frame(self.axes_DS.to(region.mean.device), residual_DD, self.num_directions)

    def read(self, along_OS: Tensor, energy_O: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """dW axes in its parts (views); the energy is that along F where it was not computed from C_res."""
        end = 1 + self.num_directions
        if self.has_factor:
            energy_O = along_OS[:, end:].square().sum(1)
        return along_OS[:, 0], along_OS[:, 1:end], energy_O

    def read_backward(self, along_OS: Tensor, mean_O: Tensor, drift_OK: Tensor, energy_O: Tensor | None) -> Tensor:
        """The gradient of dW axes from those of its parts."""
        end = 1 + self.num_directions
        gradient_OS = torch.empty_like(along_OS)
        gradient_OS[:, 0], gradient_OS[:, 1:end] = mean_O, drift_OK
        if self.has_factor and energy_O is not None:
            torch.mul(along_OS[:, end:], 2 * energy_O[:, None], out=gradient_OS[:, end:])
        return gradient_OS


def thin_factor(covariance_DD: Tensor, most: int) -> Tensor | None:
    """F (D, L) with L <= `most` and F F^T = C up to LEFT_OUT of the trace; None if C has a higher rank.

    Cholesky with the largest diagonal entry left as pivot (Higham 1990); what is left over is positive semi-definite,
    so its trace, which is known at every step, bounds what a loss can miss: trace * ||dW||^2 / O. In float64, on the
    host, with work O(D L^2).
    """
    left_DD = covariance_DD.detach().double().cpu()
    diagonal_D = left_DD.diagonal().clone()
    enough = LEFT_OUT * diagonal_D.sum()
    columns = torch.zeros(most, len(left_DD), dtype=torch.float64)  # one row per column of F
    for step in range(most + 1):
        if diagonal_D.clamp_min(0).sum() <= enough:
            return columns[:step].T.to(covariance_DD).contiguous()
        if step == most:
            break
        pivot = int(diagonal_D.argmax())
        column_D = left_DD[pivot] - columns[:step, pivot] @ columns[:step]
        columns[step] = column_D / diagonal_D[pivot].sqrt()
        diagonal_D -= columns[step].square()
    return None


class _FullProducts(torch.autograd.Function):
    """The products of dW; for symmetric C_res one matrix product backwards, as dW C_res is kept."""

    @staticmethod
    def forward(ctx: Any, delta_OD: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor | None]:
        along_OS, product_OD, energy_O = delta_OD @ frame.axes_DS, None, None
        if frame.residual_DD is not None:
            product_OD = delta_OD @ frame.residual_DD
            energy_O = (product_OD * delta_OD).sum(1)
        ctx.frame = frame
        ctx.save_for_backward(along_OS, product_OD)
        return frame.read(along_OS, energy_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        along_OS, product_OD = ctx.saved_tensors
        with torch.autocast(along_OS.device.type, enabled=False):  # should backward() be called under one
            gradient_OD = ctx.frame.read_backward(along_OS, *gradients) @ ctx.frame.axes_DS.T
            if product_OD is not None:
                gradient_OD.addcmul_(product_OD, gradients[2][:, None], value=2)
        return gradient_OD, None


class _LoraProducts(torch.autograd.Function):
    """The same for M maps with dW = B A; A C_res is kept, of size R x D."""

    @staticmethod
    def forward(
        ctx: Any, lora_A_MRD: Tensor, lora_B_MOR: Tensor, frame: Frame
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        maps, rank, features = lora_A_MRD.shape
        flat_A = lora_A_MRD.view(maps * rank, features)
        axes_MRS = (flat_A @ frame.axes_DS).view(maps, rank, -1)
        along_OS = (lora_B_MOR @ axes_MRS).flatten(0, 1)
        product_MRD, spread_MOR, energy_O = None, None, None
        if frame.residual_DD is not None:
            product_MRD = (flat_A @ frame.residual_DD).view(maps, rank, features)
            spread_MOR = lora_B_MOR @ (product_MRD @ lora_A_MRD.mT)
            energy_O = (spread_MOR * lora_B_MOR).sum(2).flatten()
        ctx.frame = frame
        ctx.save_for_backward(lora_B_MOR, along_OS, axes_MRS, product_MRD, spread_MOR)
        return frame.read(along_OS, energy_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        lora_B_MOR, along_OS, axes_MRS, product_MRD, spread_MOR = ctx.saved_tensors
        with torch.autocast(along_OS.device.type, enabled=False):
            along_MOS = ctx.frame.read_backward(along_OS, *gradients).view(len(lora_B_MOR), -1, along_OS.shape[1])
            gradient_B = along_MOS @ axes_MRS.mT
            gradient_A = (lora_B_MOR.mT @ along_MOS) @ ctx.frame.axes_DS.T
            if product_MRD is not None:
                energy_MO1 = gradients[2].view(len(lora_B_MOR), -1, 1)
                gradient_B.addcmul_(spread_MOR, energy_MO1, value=2)
                gradient_A.baddbmm_((lora_B_MOR * energy_MO1).mT @ lora_B_MOR, product_MRD, alpha=2)
        return gradient_A, gradient_B, None


def full_products(delta_OD: Tensor, frame: Frame) -> Products:
    """The products of dW, (O, D) float32."""
    return Products(*_FullProducts.apply(delta_OD, frame))


def lora_products(lora_A_MRD: Tensor, lora_B_MOR: Tensor, frame: Frame) -> Products:
    """The products of M maps with dW = B A, the scaling in B; their outputs one after the other, M * O in all."""
    return Products(*_LoraProducts.apply(lora_A_MRD, lora_B_MOR, frame))
