"""Gradient ascent on the forget images (Thudi et al., arXiv 2109.13398)."""

from torch import Tensor

from classification_ext.methods.base import METHODS, Method, Step


def ascent(step: Step) -> Tensor:
    """- CE: less and less likely labels; not bounded, so few steps or a retain loss are needed."""
    return -step.ordinary_loss()


METHODS.register(Method("ga", ascent))
