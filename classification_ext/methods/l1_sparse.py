"""Fine-tuning with an L1 penalty: a sparser network remembers less (Jia et al., arXiv 2304.04934)."""

import torch
from torch import Tensor

from classification_ext.methods.base import METHODS, Method, Step


def sparse_tuning(step: Step) -> Tensor:
    """CE on retained images + l1_weight (1 - progress) |w|_1: the penalty ends, so that accuracy comes back."""
    norms = torch.stack([parameter.abs().sum() for parameter in step.parameters])
    return step.ordinary_loss() + step.options.l1_weight * (1 - step.progress) * norms.sum()


METHODS.register(Method("l1_sparse", sparse_tuning, over="retain", reads=("l1_weight",)))
