"""What every base objective gets, and the registry that maps a name to it.

Shapes: B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

# What one prompt per sample tells the network: tensors with the batch first. Which ones, only the pipeline's row in
# architectures.py knows, which encodes and reads them: everybody else passes a condition to `predict` as it is.
Condition = dict[str, Tensor]


@dataclass(frozen=True)
class DiffusionStep:
    """One mini-batch at one draw of noise and timesteps; both sides of any comparison share them."""

    predict: Callable[[Tensor, Tensor, Condition], Tensor]  # (noisy, timesteps, condition) -> prediction (B, c, h, w)
    noisy: Tensor  # x_t (B, c, h, w)
    timesteps: Tensor  # (B,)
    target: Tensor  # what the network is trained to predict: noise, velocity or flow (B, c, h, w)
    condition: Condition  # the sample's own prompt
    anchor: Condition | None = None  # the anchor prompt c'; None if the objective needs none

    def prediction(self) -> Tensor:
        """The network's prediction for the sample's own prompt, with gradient."""
        return self.predict(self.noisy, self.timesteps, self.condition)

    def ordinary_loss(self) -> Tensor:
        """MSE(eps(x_t, c), target): the loss the network was trained with, and the retain loss."""
        return F.mse_loss(self.prediction().float(), self.target.float())


@dataclass(frozen=True)
class Objective:
    """A base objective: its loss on a forget batch, and what it needs."""

    loss: Callable[[DiffusionStep], Tensor]
    needs_anchor: bool = False


OBJECTIVES: dict[str, Objective] = {}


def register(name: str, needs_anchor: bool = False) -> Callable[[Callable], Callable]:
    """Enter a loss function into the registry under `name`."""

    def enter(loss: Callable[[DiffusionStep], Tensor]) -> Callable[[DiffusionStep], Tensor]:
        if name in OBJECTIVES:
            raise ValueError(f"an objective named {name!r} is registered already")
        OBJECTIVES[name] = Objective(loss, needs_anchor)
        return loss

    return enter


def get_objective(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; known are {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name]
