"""Random label (docs/method.md section 5): answer the concept's prompt as another one.

The other prompt is that of another label, or an anchor prompt.
"""

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective


@register_objective("rl", needs=("anchor",))
def random_label(step: DiffusionStep) -> Tensor:
    """MSE(eps(x_t, c), sg eps(x_t, c')): same x_t and timestep on both sides, no graph on the anchor's."""
    anchored = step.fixed_prediction(step.anchor)
    return F.mse_loss(step.prediction().float(), anchored.float())
