"""Random label (docs/method.md section 5): answer the concept's prompt as another one.

The other prompt is that of another label, or an anchor prompt.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective
from barrier_diffusers.utils.checks import Checked


@dataclass
class RlSettings(Checked):
    """Own settings of objectives rl and concept."""

    # rl, concept: whose answer to the anchor prompt is aimed at. network: the one that trains, as it is in the step;
    # base: the frozen one, whose answers do not drift along
    anchor_target: Literal["network", "base"] = "network"

    SECTION = "objective."

    @property
    def reads_reference(self) -> bool:
        """Whether the frozen model is read."""
        return self.anchor_target == "base"


@register_objective("rl", needs=("anchor",), settings=RlSettings)
def random_label(step: DiffusionStep) -> Tensor:
    """MSE(eps(x_t, c), sg eps(x_t, c')): same x_t and timestep on both sides, no graph on the anchor's."""
    from_base = getattr(step.options, "reads_reference", False)  # a step may have no settings
    anchored = step.reference_prediction(step.anchor) if from_base else step.fixed_prediction(step.anchor)
    return F.mse_loss(step.prediction().float(), anchored.float())
