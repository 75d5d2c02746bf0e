"""The products of a drift with what the loss knows of an input, all in one go and with the least work backwards.

A `Frame` is a region in the form the products take, made once. The product dW C_res of the forward pass is half of the
residual term's gradient; for LoRA it is A C_res, and nothing of size O x D is formed. Shapes: M stacked maps, O output
features, D input features, K kept directions, S = 1 + K, R LoRA rank, L columns of a factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from barrier_diffusers.region import ForgetRegion

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
        ctx.frame, ctx.spent = frame, False
        ctx.save_for_backward(along_OS)
        ctx.product_OD = product_OD
        return frame.read(along_OS, energy_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (along_OS,), product_OD = ctx.saved_tensors, ctx.product_OD
        with torch.autocast(along_OS.device.type, enabled=False):  # should backward() be called under one
            gradient_OS = ctx.frame.read_backward(along_OS, *gradients)
            if ctx.frame.residual_DD is None:
                return gradient_OS @ ctx.frame.axes_DS.T, None
            if ctx.spent:
                raise RuntimeError("the protection loss goes backward once: compute it again for another backward")
            ctx.spent, ctx.product_OD = True, None  # the product becomes the gradient, in place: each is large
            return product_OD.mul_(2 * gradients[2][:, None]).addmm_(gradient_OS, ctx.frame.axes_DS.T), None


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
