"""What several benchmarks time: bare forward passes, setting up, the loss with its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import Batch, forward
from torch import nn

from barrier_diffusers import Barrier, BarrierConfig

ForwardFn = Callable[[nn.Module, Batch], torch.Tensor]


def bare_passes(unet: nn.Module, batches: list[Batch], forward_fn: ForwardFn = forward) -> Callable[[], None]:
    """Two forward passes over the batches, as often as setting up reads them."""

    @torch.no_grad()
    def run() -> None:
        for batch in [*batches, *batches]:
            forward_fn(unet, batch)

    return run


def set_up(
    unet: nn.Module, batches: list[Batch], options: BarrierConfig, forward_fn: ForwardFn = forward
) -> Callable[[], None]:
    """Setting up the protection, which is removed again."""

    def run() -> None:
        barrier = Barrier(unet, options)
        barrier.setup_protection(batches, forward_fn)
        barrier.remove()

    return run


def backward_of(loss: Callable[[], torch.Tensor], barrier: Barrier) -> Callable[[], float]:
    """A loss and the gradients of what trains."""

    def run() -> float:
        for parameter in barrier.trainable_parameters():
            parameter.grad = None
        value = loss()
        value.backward()
        return value.item()

    return run
