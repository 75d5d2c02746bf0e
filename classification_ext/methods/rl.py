"""Random labels for the forget images (Golatkar et al., arXiv 1911.04933; the base loss of SalUn and of BARRIER)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from classification_ext.methods.base import METHODS, Method, Step


def other_labels(labels: Tensor, num_labels: int) -> Tensor:
    """For each label another one, every other equally likely; drawn anew at every step."""
    return (labels + torch.randint(1, num_labels, labels.shape, device=labels.device)) % num_labels


def random_label(step: Step) -> Tensor:
    """CE to another label."""
    return F.cross_entropy(step.model(step.pixels).float(), other_labels(step.labels, step.num_labels))


METHODS.register(Method("rl", random_label))
