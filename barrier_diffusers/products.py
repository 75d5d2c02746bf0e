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

    axes_DS: Tensor  # the mean, then the basis
    residual_DD: Tensor | None  # C_res itself; None where there is none, or a factor
    factor_DL: Tensor | None = None  # F with F F^T = C_res, where few columns are enough

    @classmethod
    def of(cls, region: ForgetRegion) -> Frame:
        """The frame of a region. It shares the residual's memory, or replaces it by a thin factor."""
        axes_DS = torch.cat([region.mean[:, None], region.basis], dim=1)
        if region.residual is None:
            return cls(axes_DS, None)
        factor_DL = thin_factor(region.residual, len(region.mean) // THIN)
        return cls(axes_DS, region.residual if factor_DL is None else None, factor_DL)

    def of_moved(self, region: ForgetRegion) -> Frame:
        """The same frame where the region is now."""
        device = region.mean.device
        factor_DL = None if self.factor_DL is None else self.factor_DL.to(device)
        return Frame(self.axes_DS.to(device), region.residual if factor_DL is None else None, factor_DL)

    def times_residual(self, x_ND: Tensor) -> Tensor | None:
        """x C_res, (N, D); None without a residual."""
        if self.factor_DL is not None:
            return (x_ND @ self.factor_DL) @ self.factor_DL.T
        return None if self.residual_DD is None else x_ND @ self.residual_DD


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
    """dW [mean | basis] and diag(dW C dW^T) for symmetric C; one matrix product backwards, as dW C is kept."""

    @staticmethod
    def forward(ctx: Any, delta_OD: Tensor, frame: Frame) -> tuple[Tensor, Tensor | None]:
        product_OD = frame.times_residual(delta_OD)
        ctx.frame = frame
        ctx.save_for_backward(product_OD)
        energy_O = None if product_OD is None else (product_OD * delta_OD).sum(1)
        return delta_OD @ frame.axes_DS, energy_O

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (product_OD,) = ctx.saved_tensors
        along_OS, energy_O = gradients
        with torch.autocast(along_OS.device.type, enabled=False):  # should backward() be called under one
            gradient_OD = along_OS @ ctx.frame.axes_DS.T
            if product_OD is not None:
                gradient_OD.addcmul_(product_OD, energy_O[:, None], value=2)
        return gradient_OD, None


class _LoraProducts(torch.autograd.Function):
    """The same for M maps with dW = B A; A C is kept, of size R x D."""

    @staticmethod
    def forward(ctx: Any, lora_A_MRD: Tensor, lora_B_MOR: Tensor, frame: Frame) -> tuple[Tensor, Tensor | None]:
        maps, rank, features = lora_A_MRD.shape
        flat_A = lora_A_MRD.reshape(maps * rank, features)
        axes_MRS = (flat_A @ frame.axes_DS).view(maps, rank, -1)
        product, spread_MOR, energy = frame.times_residual(flat_A), None, None
        if product is not None:
            product = product.view(maps, rank, features)
            spread_MOR = lora_B_MOR @ (product @ lora_A_MRD.mT)
            energy = (spread_MOR * lora_B_MOR).sum(2).flatten()
        ctx.frame = frame
        ctx.save_for_backward(lora_B_MOR, axes_MRS, product, spread_MOR)
        return (lora_B_MOR @ axes_MRS).flatten(0, 1), energy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        lora_B_MOR, axes_MRS, product_MRD, spread_MOR = ctx.saved_tensors
        along_MOS = gradients[0].view(len(lora_B_MOR), -1, axes_MRS.shape[2])
        with torch.autocast(along_MOS.device.type, enabled=False):
            gradient_B = along_MOS @ axes_MRS.mT
            gradient_A = (lora_B_MOR.mT @ along_MOS) @ ctx.frame.axes_DS.T
            if product_MRD is not None:
                energy_MO1 = gradients[1].view(len(lora_B_MOR), -1, 1)
                gradient_B.addcmul_(spread_MOR, energy_MO1, value=2)
                gradient_A.baddbmm_((lora_B_MOR * energy_MO1).mT @ lora_B_MOR, product_MRD, alpha=2)
        return gradient_A, gradient_B, None


def full_products(delta_OD: Tensor, frame: Frame) -> Products:
    """The products of dW, (O, D) float32."""
    along_OS, energy_O = _FullProducts.apply(delta_OD, frame)
    return Products(along_OS[:, 0], along_OS[:, 1:], energy_O)


def lora_products(lora_A_MRD: Tensor, lora_B_MOR: Tensor, frame: Frame) -> Products:
    """The products of M maps with dW = B A, the scaling in B; their outputs one after the other, M * O in all."""
    along_OS, energy_O = _LoraProducts.apply(lora_A_MRD, lora_B_MOR, frame)
    return Products(along_OS[:, 0], along_OS[:, 1:], energy_O)
