"""The objective's part of the loss in robust training: at the weights as they are, and where attackers would take
them (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.objectives import DiffusionStep, Objective
from barrier_diffusers.objectives.base import Condition, Predict
from barrier_diffusers.training.relearner import Relearner, gradients_of
from barrier_diffusers.training.robust_config import RobustConfig


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *received: Any) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, received[0])
        return None, None, *gradients


def with_gradient(value: Tensor, parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> Tensor:
    """A loss of this value whose gradient for the parameters is the given one, wherever it was computed.

    So everything that acts on a loss acts on it: weights, accumulation, scaling, the mean over processes. `gradients`
    are used up.
    """
    return _Given.apply(value.detach(), gradients, *parameters)


class Remembered:
    """The frozen network's predictions for one batch, each computed once."""

    def __init__(self, predict: Predict):
        self._predict = predict
        self._known: list[tuple[Tensor, Condition, Tensor]] = []

    def __call__(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        for known_noisy, known_condition, answer in self._known:
            if known_noisy is noisy and known_condition is condition:
                return answer
        answer = self._predict(noisy, timesteps, condition)
        self._known.append((noisy, condition, answer))
        return answer


class RobustTerms:
    """The parts of the loss that come from a forget batch.

    Args:
        relearner: of the network that trains; None unless a setting asks for one.
    """

    def __init__(self, config: RobustConfig, objective: Objective, relearner: Relearner | None):
        self.config, self.objective, self.relearner = config, objective, relearner

    @property
    def names(self) -> list[str]:
        """Of the parts beside the objective's."""
        return ["meta"] if self.config.meta_steps else []

    def __call__(self, made: DiffusionStep, step: int, number: int) -> dict[str, Tensor]:
        """The parts for one batch.

        Args:
            step: number of steps done.
            number: number of batches seen before, which decides about what is drawn here.
        """
        if made.reference is not None:
            made = replace(made, reference=Remembered(made.reference))
        parts: dict[str, Tensor] = {}
        if self.config.meta_steps and step % self.config.meta_every == 0:
            parts["meta"] = self.config.meta_weight * self._after_relearning(made, number)
        # last, as no graph of the weights may be alive when these are moved
        return {"objective": self.objective.loss_of(made), **parts}

    def _after_relearning(self, made: DiffusionStep, number: int) -> Tensor:
        relearner = self.relearner
        assert relearner is not None
        reference = made.reference

        def frozen(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            assert reference is not None
            with relearner.without_adapter():
                return reference(noisy, timesteps, condition)

        there = replace(made, predict=relearner.predict, reference=frozen if reference else None)
        with relearner.relearned(number):
            value = self.objective.loss_of(there)
            gradients = gradients_of(value, relearner.parameters)
        return with_gradient(value, relearner.parameters, gradients)
