"""The baseline: sections 1, 2 and 5 of docs/method.md as one would first write them, with nothing of the package.

Every map is on its own, its raw input rows are kept until they are decomposed, the residual basis is dense, dW of a
LoRA adapter is multiplied out, statistics stay on the host and are copied to the device at every step, and all
parameters of the network get gradients. The formulas are the ones on the paper; float32 throughout.

Shapes: N rows, D input features, O output features, K kept directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Statistics:
    """What the protection loss knows of one map; on the host."""

    mean: Tensor  # (D,)
    basis: Tensor  # (D, K)
    residual_basis: Tensor  # (D, D - K), or fewer columns where there are fewer rows
    residual_variance: Tensor  # (D - K,)
    z_lower: Tensor  # (K,), as the four below
    z_upper: Tensor
    outer_lower: Tensor
    outer_upper: Tensor


def fit(x_ND: Tensor, reduced_dim: int = 32, percentiles: tuple[float, float] = (0.05, 0.95), scale: float = 20.0):
    """Statistics of raw rows, from the singular value decomposition of the centred N x D matrix."""
    mean_D = x_ND.mean(0)
    centred_ND = x_ND - mean_D
    _, singular, vectors = torch.linalg.svd(centred_ND, full_matrices=False)
    largest_D1 = vectors.abs().argmax(1, keepdim=True)
    vectors = vectors * vectors.gather(1, largest_D1).sign()  # the sign rule: the largest entry is positive
    basis_DK = vectors[:reduced_dim].T
    z_NK = (centred_ND @ basis_DK).sort(0).values
    z_lower, z_upper = (z_NK[int(p * (len(z_NK) - 1))] for p in percentiles)
    return Statistics(
        mean=mean_D,
        basis=basis_DK.contiguous(),
        residual_basis=vectors[reduced_dim:].T.contiguous(),
        residual_variance=singular[reduced_dim:] ** 2 / len(x_ND),
        z_lower=z_lower,
        z_upper=z_upper,
        outer_lower=z_lower - scale,
        outer_upper=z_upper + scale,
    )


def record(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], forward_fn: Callable[[nn.Module, Any], Any]
) -> dict[str, Tensor]:
    """The raw rows (N, D) that reach every map, kept on the host."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = []
    for name, kept in rows.items():

        def hook(module: nn.Module, args: tuple, kept: list[Tensor] = kept) -> None:
            kept.append(args[0].detach().flatten(0, -2).float().cpu())

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in batches:
            forward_fn(model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(kept) for name, kept in rows.items()}


class NaiveBarrier:
    """The protection of some Linear maps of a model, by their full names."""

    def __init__(self, model: nn.Module, names: Iterable[str], lambda_interval: float = 10.0, reduced_dim: int = 32):
        self.model, self.names = model, list(names)
        self.lambda_interval, self.reduced_dim = lambda_interval, reduced_dim
        self.statistics: dict[str, Statistics] = {}
        self.snapshot: dict[str, tuple[Tensor, Tensor | None]] = {}

    def setup(self, batches: Iterable[Any], forward_fn: Callable[[nn.Module, Any], Any]) -> None:
        """Record, decompose map by map, take the snapshot."""
        rows = record(self.model, self.names, batches, forward_fn)
        self.install({name: fit(rows[name], self.reduced_dim) for name in self.names})

    def install(self, statistics: Mapping[str, Statistics]) -> None:
        """Take statistics as they are, and the snapshot."""
        self.statistics = dict(statistics)
        for name in self.names:
            layer = self.layer(name)
            bias = None if layer.bias is None else layer.bias.detach().clone()
            self.snapshot[name] = (layer.weight.detach().clone(), bias)

    def layer(self, name: str) -> Any:
        """The Linear, inside its LoRA layer if it has one."""
        module = self.model.get_submodule(name)
        return getattr(module, "base_layer", module)

    def effective(self, name: str) -> tuple[Tensor, Tensor | None]:
        """W and b of a map, a LoRA adapter multiplied out and added."""
        module, layer = self.model.get_submodule(name), self.layer(name)
        weight: Tensor = layer.weight
        if hasattr(module, "lora_A"):
            for adapter, down in module.lora_A.items():
                weight = weight + module.scaling[adapter] * (module.lora_B[adapter].weight @ down.weight)
        return weight, layer.bias

    def map_loss(self, name: str) -> Tensor:
        """L_mean + L_residual + L_interval of one map, with the two-corner region."""
        weight, bias = self.effective(name)
        weight0, bias0 = self.snapshot[name]
        device = weight.device
        known = Statistics(**{key: value.to(device) for key, value in vars(self.statistics[name]).items()})
        delta_OD = weight.float() - weight0.float()
        shift_O = delta_OD @ known.mean
        if bias is not None and bias0 is not None:
            shift_O = shift_O + (bias.float() - bias0.float())
        mean = shift_O.square().mean()
        residual = ((delta_OD @ known.residual_basis).square() * known.residual_variance).sum() / len(delta_OD)
        drift_OK = delta_OD @ known.basis
        plus_OK, minus_OK = drift_OK.clamp_min(0), (-drift_OK).clamp_min(0)
        interval = torch.zeros((), device=device)
        for lower, upper in ((known.outer_lower, known.z_lower), (known.z_upper, known.outer_upper)):
            low_O = plus_OK @ lower - minus_OK @ upper
            high_O = plus_OK @ upper - minus_OK @ lower
            interval = interval + (low_O.square() + high_O.square()).mean()
        return mean + residual + interval

    def loss(self) -> Tensor:
        """lambda * mean over maps."""
        total = sum((self.map_loss(name) for name in self.names), torch.zeros(()))
        return self.lambda_interval * total / len(self.names)


def random_label_step(
    model: nn.Module,
    barrier: NaiveBarrier | None,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    predict: Callable[..., Tensor],
    alpha: float = 0.0,
    retain: dict[str, Any] | None = None,
) -> dict[str, float]:
    """One training step of rl: MSE(eps(x_t, c), sg eps(x_t, c')) + alpha * retain loss + protection.

    The constant side is detached. With `retain` its loss is computed whatever alpha is, as the sum says.
    """
    noisy, timesteps = batch["noisy"], batch["timesteps"]
    with torch.no_grad():
        anchored = predict(model, noisy, timesteps, batch["anchor"])
    terms = {"objective": F.mse_loss(predict(model, noisy, timesteps, batch["condition"]), anchored)}
    if retain is not None:
        predicted = predict(model, retain["noisy"], retain["timesteps"], retain["condition"])
        terms["retain"] = alpha * F.mse_loss(predicted, retain["target"])
    if barrier is not None:
        terms["protection"] = barrier.loss()
    losses = {name: value.item() for name, value in terms.items()}
    sum(terms.values(), torch.zeros(())).backward()
    optimizer.step()
    model.zero_grad()
    return losses
