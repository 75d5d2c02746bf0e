"""The model as it was before training, at the price of one copy of what trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _Run(nn.Module):
    """A function that calls `model`, as a module whose parameters `functional_call` can exchange."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs)


class FrozenReference:
    """Runs a model with its trained parameters as they were when this was made, whatever was trained since.

    Only the parameters that train are copied, and the copies stand in their place during a call: no weight is written,
    so graphs built before, gradient checkpointing, autocast and accelerate's wrappers are untouched. A fresh LoRA
    adapter's copy is zero, which is the base model.

    Args:
        model: the network, on the device it trains on.
        parameters: those that train.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]):
        trained = set(parameters)
        self._model = model
        self._values = {
            f"model.{name}": parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter in trained
        }

    @torch.no_grad()
    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`function(*inputs)`, which runs the model in any way, with the reference's parameters and no graph."""
        return functional_call(_Run(self._model, function), self._values, inputs)
