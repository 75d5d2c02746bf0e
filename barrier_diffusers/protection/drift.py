"""Drift dW = W - W0 of one map, seen as full weights or as LoRA factors, for certificates and logs.

Everything a certificate needs is dW times something. All results are float32. Shapes: O output features, D input
features, K kept directions, R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Drift(Protocol):
    """What a drift does to a vector, a basis and a covariance."""

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

    def dense(self) -> Tensor:
        """dW itself, (O, D); for certificates and tests, not for training."""
        ...


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

    def dense(self) -> Tensor:
        """s B A, (O, D)."""
        return self.scaling * (self.lora_B_OR.float() @ self.lora_A_RD.float())


def full_drift(weight: Tensor, weight0: Tensor, bias: Tensor | None = None, bias0: Tensor | None = None) -> FullDrift:
    """dW = W - W0 and db = b - b0; convolution kernels are flattened to (O, C_in / groups * kh * kw)."""
    delta_OD = weight.float().flatten(1) - weight0.float().flatten(1)
    if bias is None or bias0 is None:
        return FullDrift(delta_OD)
    return FullDrift(delta_OD, bias.float() - bias0.float())
