"""Boundary shrink: forget images get the label across the nearest boundary (Chen et al., arXiv 2303.11570)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from classification_ext.methods.base import METHODS, Logits, Method, Step
from classification_ext.settings import MethodConfig


def nearest_other_label(model: Logits, pixels: Tensor, labels: Tensor, options: MethodConfig) -> Tensor:
    """The likeliest other label after one step of `epsilon` up the sign of the loss gradient, for each image (B,).

    It is found once, with the network as it was before unlearning.
    """
    pixels = pixels.detach().requires_grad_()
    loss = F.cross_entropy(model(pixels).float(), labels)
    (gradient,) = torch.autograd.grad(loss, pixels)
    with torch.no_grad():
        logits = model((pixels + options.epsilon * gradient.sign()).clamp(-1, 1)).float()
    return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)


METHODS.register(Method("boundary_shrink", Step.ordinary_loss, relabel=nearest_other_label, reads=("epsilon",)))
