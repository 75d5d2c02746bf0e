"""Gradient ascent (docs/method.md section 5): raise the ordinary loss on the forget batch.

It has no floor: stop early.
"""

from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective


@register_objective("ga")
def gradient_ascent(step: DiffusionStep) -> Tensor:
    """The ordinary loss with its sign turned: - MSE(eps(x_t, c), noise)."""
    return -step.ordinary_loss()
