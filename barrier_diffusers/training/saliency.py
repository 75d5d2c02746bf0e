"""SalUn's mask (Fan et al., arXiv 2310.12508): only the entries that matter most to the forget data may move.

Shapes: O output features, D input features, R LoRA rank. Score = |gradient of the ordinary loss, summed over the
forget data|.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from barrier_diffusers.protection.targets import ProtectedMap

LOSS_SCALE = 2.0**8  # changes no ranking; keeps small gradients above half precision's smallest number


NUDGE = 1e-3  # size of the largest entry of B, relative to A's, when A is scored


class ScoredStep(Protocol):
    """A mini-batch of forget samples: `DiffusionStep`, or a classifier's."""

    def ordinary_loss(self) -> Tensor: ...

    def __len__(self) -> int: ...


def summed_gradients(parameters: Sequence[nn.Parameter], steps: Iterable[ScoredStep]) -> list[Tensor]:
    """Gradient of the samples' ordinary losses, summed over `steps`, times LOSS_SCALE; .grad is left alone.

    Raises:
        FloatingPointError: non-finite gradients.
    """
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for step in steps:
        loss = step.ordinary_loss() * len(step) * LOSS_SCALE
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    if not all(bool(total.isfinite().all()) for total in totals):
        raise FloatingPointError("the forget gradient, from which saliency_mask is made, is not finite")
    return totals


def saliency_scores(
    maps: Sequence[ProtectedMap],
    parameters: Sequence[nn.Parameter],
    steps: Callable[[], Iterable[ScoredStep]],
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> list[list[tuple[nn.Parameter, Tensor]]]:
    """Groups of (parameter, scores) in which entries are ranked together.

    Full weights: one group, all parameters that train. LoRA: the factors B_OR of all maps, and the factors
    A_RD of all maps. While B is 0 the gradient for A is exactly 0, so A is scored by the gradient it gets after a
    small step of B down its own: a second pass, of another scale, hence a group of its own.

    Args:
        maps: those with an adapter, or any.
        parameters: those that train.
        steps: makes the forget data's steps anew, in a distributed run this process's share.
        reduce: sums a tensor over the processes.
    """
    if not maps[0].has_adapter:
        totals = [reduce(total).abs() for total in summed_gradients(parameters, steps())]
        return [list(zip(parameters, totals, strict=True))]
    factors = [entry.lora().parameters for entry in maps]
    down, up = [pair[0] for pair in factors], [pair[1] for pair in factors]
    up_gradients = [reduce(total) for total in summed_gradients(up, steps())]
    largest = max(float(total.abs().max()) for total in up_gradients) or 1.0
    size = NUDGE * max(float(factor.detach().abs().max()) for factor in down) / largest
    before = [factor.detach().clone() for factor in up]
    try:
        with torch.no_grad():
            for factor, gradient in zip(up, up_gradients, strict=True):
                factor.sub_(size * gradient)
        torch.clear_autocast_cache()  # it holds a half-precision copy of the old B
        down_gradients = [reduce(total) for total in summed_gradients(down, steps())]
    finally:
        with torch.no_grad():
            for factor, value in zip(up, before, strict=True):
                factor.copy_(value)
    pairs = ((up, up_gradients), (down, down_gradients))
    if not any(float(total.abs().max()) for total in down_gradients):
        raise FloatingPointError("the forget gradient for every LoRA factor A is 0: it cannot be ranked")
    return [[(factor, total.abs()) for factor, total in zip(*pair, strict=True)] for pair in pairs]


def keep_top(scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Masks that are True on the round(fraction * count) largest entries, at least one, of all scores together."""
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(max(1, round(fraction * len(flat)))).indices] = True
    parts = kept.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


class SaliencyMask:
    """Holds some entries of the trained parameters exactly where they are, against gradient, momentum and decay.

    Their gradient is set to 0 where it arises, so gradient clipping does not see it, and after each step of the
    optimizer they get their first value back. Its state travels with the checkpoints.

    Args:
        parameters: the trained parameters; everything may move until `choose` is called or a state is loaded.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.masks = [torch.ones_like(parameter, dtype=torch.bool) for parameter in self.parameters]
        self._first = [parameter.detach().clone() for parameter in self.parameters]
        self._hooks: list[Any] = []

    def choose(self, groups: Sequence[Sequence[tuple[nn.Parameter, Tensor]]], fraction: float) -> None:
        """Keep the top `fraction` of each group's scores (`saliency_scores`)."""
        position = {parameter: index for index, parameter in enumerate(self.parameters)}
        for group in groups:
            masks = keep_top([scores for _, scores in group], fraction)
            for (parameter, _), mask in zip(group, masks, strict=True):
                self.masks[position[parameter]] = mask

    @property
    def kept_fraction(self) -> float:
        """Share of the entries that may move."""
        return sum(int(mask.sum()) for mask in self.masks) / sum(mask.numel() for mask in self.masks)

    def attach(self, optimizer: Any) -> None:
        """Hook into the parameters' gradients and the torch optimizer's steps, until `detach`."""
        for index, parameter in enumerate(self.parameters):
            hook = parameter.register_hook(lambda gradient, index=index: gradient.masked_fill(~self.masks[index], 0))
            self._hooks.append(hook)
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._restore()))

    def detach(self) -> None:
        """Let everything move again."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, mask, first in zip(self.parameters, self.masks, self._first, strict=True):
            parameter.copy_(torch.where(mask, parameter, first))

    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": [mask.cpu() for mask in self.masks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the masks back; the parameters must have been loaded before."""
        self.masks = [mask.to(old.device) for mask, old in zip(state["masks"], self.masks, strict=True)]
        self._first = [parameter.detach().clone() for parameter in self.parameters]  # held entries never moved
