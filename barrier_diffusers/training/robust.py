"""The objective's part of the loss in robust training: at the weights as they are, and where attackers would take
them (docs/method.md section 8)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from barrier_diffusers.objectives import DiffusionStep, Objective
from barrier_diffusers.objectives.base import Condition, Predict
from barrier_diffusers.training.lives import Lives
from barrier_diffusers.training.relearner import LOSS_SCALE, Relearner, gradients_of
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.training.token_adversary import TokenAdversary


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


def moved_loss(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """A loss at weights that have been moved; its gradient is for the weights as they will be again."""
    return with_gradient(value, parameters, gradients_of(value, parameters))


def relearned_loss(value: Tensor, parameters: Sequence[nn.Parameter], relearner: Lives[Any, Any]) -> Tensor:
    """`moved_loss` where a relearner moved them.

    A relearner whose learning rate broke the network is no attacker: where the loss or its gradient is not finite,
    both are 0, it is not met again, and a warning says so.
    """
    gradients = gradients_of(value, parameters)
    norms = torch.stack(torch._foreach_norm(gradients))
    if not bool(torch.isfinite(torch.cat([norms.flatten(), value.detach().flatten()])).all()):
        warnings.warn(
            "a relearner of robust.meta_steps broke the network (a loss that is not finite), and its part of the step "
            "is left out: lower the largest of the robust.meta_..._learning_rates that it draws from",
            stacklevel=2,
        )
        relearner.end_life()
        value, gradients = torch.zeros_like(value), [torch.zeros_like(one) for one in gradients]
    return with_gradient(value, parameters, gradients)


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
        predict: runs the bare network, not what wraps it for several processes.
        parameters: those that train.
        relearner: of the network that trains; None unless a setting asks for one.
        adversary: the same.
        mean: of tensors over the processes; None: there is one.
    """

    def __init__(
        self,
        config: RobustConfig,
        objective: Objective,
        *,
        predict: Predict,
        parameters: Sequence[nn.Parameter],
        relearner: Relearner | None = None,
        adversary: TokenAdversary | None = None,
        mean: Callable[[list[Tensor]], list[Tensor]] | None = None,
    ):
        self.config, self.objective, self.predict = config, objective, predict
        self.parameters, self.relearner, self.adversary, self.mean = list(parameters), relearner, adversary, mean

    @property
    def names(self) -> list[str]:
        """Of the parts beside the objective's."""
        return ["meta"] if self.config.meta_steps else []

    def named(self, batch: dict[str, Any], step: int, number: int) -> dict[str, Any]:
        """The batch as the adversary asks for the concept, which first learns what is due."""
        if self.adversary is None:
            return batch
        self.adversary.catch_up(step)
        return self.adversary.exchange(batch, number)

    def __call__(self, made: DiffusionStep, step: int, number: int) -> dict[str, Tensor]:
        """The parts for one batch.

        Args:
            step: number of steps done.
            number: number of batches seen before, which decides about what is drawn here.
        """
        config, parts = self.config, {}
        if made.reference is not None:
            made = replace(made, reference=Remembered(made.reference))
        if config.context_radius:
            made = replace(made, named=made.condition if made.named is None else made.named)
            condition = worst_condition(self.objective, replace(made, predict=self.predict), config.context_radius)
            made = replace(made, condition=condition)
        # before the graph of the weights as they are, which cannot be moved while it is alive
        if config.meta_steps and step % config.meta_every == 0:
            assert self.relearner is not None
            loss = partial(relearned_loss, relearner=self.relearner)
            parts["meta"] = config.meta_weight * self._moved(made, self.relearner.relearned(number), loss)
        if config.sharpness:
            assert self.relearner is not None
            return {"objective": self._moved(made, self.relearner.ascended(number), moved_loss), **parts}
        return {"objective": self.objective.loss_of(made), **parts}

    def _moved(
        self,
        made: DiffusionStep,
        block: AbstractContextManager[None],
        loss: Callable[[Tensor, Sequence[nn.Parameter]], Tensor],
    ) -> Tensor:
        """The objective with the weights as they are in a block; its gradient is for the weights as they are now."""
        relearner, reference = self.relearner, made.reference
        assert relearner is not None

        def frozen(noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            assert reference is not None
            with relearner.without_adapter():
                return reference(noisy, timesteps, condition)

        there = replace(made, predict=self.predict, reference=frozen if reference else None)
        with block:
            return loss(self.objective.loss_of(there), self.parameters)

    def reconciled(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of a batch with the retain loss, of which the erasing ones do not work against it if the settings
        ask for that. Gradients are those of all processes."""
        if not self.config.project_conflicts:
            return parts
        erasing = [name for name in ("objective", "meta") if name in parts]
        losses = [torch.stack([parts[name] for name in erasing]).sum(), parts["retain"]]
        forget, retain = (gradients_of(loss, self.parameters) for loss in losses)
        if self.mean is not None:
            forget, retain = self.mean(forget), self.mean(retain)
        take_out_conflict(forget, retain)
        given: dict[str, Tensor] = {name: parts[name].detach() for name in erasing}
        given["objective"] = with_gradient(parts["objective"], self.parameters, forget)
        return {**given, "retain": with_gradient(parts["retain"], self.parameters, retain)}


@torch.no_grad()
def take_out_conflict(forget: list[Tensor], retain: list[Tensor]) -> None:
    """Where <g_F, g_R> < 0, g_F <- g_F - <g_F, g_R> / |g_R|^2 g_R, in place (Yu et al., arXiv 2001.06782)."""
    product = torch.stack([(one * other).sum() for one, other in zip(forget, retain, strict=True)]).sum()
    square = torch.stack([other.square().sum() for other in retain]).sum()
    share = product.clamp(max=0) / square.clamp_min(torch.finfo(square.dtype).tiny)
    for one, other in zip(forget, retain, strict=True):
        one.sub_(share * other)


PGD_STEPS = 2
PGD_STEP = 0.75  # of the radius: two steps reach the ball's edge from any direction's start


def worst_condition(objective: Objective, made: DiffusionStep, radius: float) -> Condition:
    """The forget prompts' condition, moved against the objective by projected gradient ascent.

    Each token embedding moves inside a ball of `radius` times its own length; what is no sequence of embeddings stays,
    such as a pooled one.

    Raises:
        ValueError: the condition holds no sequence of embeddings.
    """
    own = {key: value for key, value in made.condition.items() if value.is_floating_point() and value.dim() == 3}
    if not own:
        raise ValueError("robust.context_radius moves token embeddings, but the model reads none: leave it at 0")
    balls = {key: radius * value.norm(dim=-1, keepdim=True) for key, value in own.items()}
    moves = {key: torch.zeros_like(value) for key, value in own.items()}
    for _ in range(PGD_STEPS):
        moves = {key: value.requires_grad_() for key, value in moves.items()}
        condition = {**made.condition, **{key: own[key] + move for key, move in moves.items()}}
        loss = objective.loss_of(replace(made, condition=condition))
        ways = torch.autograd.grad(loss * LOSS_SCALE, list(moves.values()))
        with torch.no_grad():
            for (key, move), way in zip(list(moves.items()), ways, strict=True):
                moved = move + PGD_STEP * balls[key] * F.normalize(way, dim=-1)
                moves[key] = moved * (balls[key] / moved.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return {**made.condition, **{key: own[key] + move for key, move in moves.items()}}


@torch.no_grad()
def mix_in_fresh(network: Any, parameters: Sequence[nn.Parameter], share: float, seed: int) -> None:
    """theta <- (1 - share) theta + share * a fresh initialisation of the same network, in place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = dict(type(network).from_config(network.config).named_parameters())
    trained = set(parameters)
    for name, parameter in network.named_parameters():
        if parameter in trained:
            parameter.lerp_(fresh[name].to(parameter), share)
