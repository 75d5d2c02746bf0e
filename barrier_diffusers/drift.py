"""Drift dW = W - W0 of one map (or of several stacked along O), seen as full weights or as LoRA factors.

Everything the loss needs is dW times something; with LoRA nothing of size O x D is ever formed. All results are
float32. Shapes: O output features, D input features, K kept directions, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from barrier_diffusers.products import Frame, Products, full_products, lora_products

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
