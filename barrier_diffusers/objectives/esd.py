"""Erased Stable Diffusion (docs/method.md section 5; Gandikota et al., arXiv 2303.07345).

The concept's prompt is answered with the guidance turned round. It needs prompts only, no image: x_t is sampled by the
model that trains.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective
from barrier_diffusers.utils.checks import Checked, at_least, rules


@dataclass
class EsdSettings(Checked):
    """Own settings of objective esd."""

    eta: float = 1.0  # esd: how far the target lies beyond the empty prompt's prediction, away from the concept

    SECTION = "objective."
    RULES = rules(eta=at_least(0))


@register_objective("esd", needs=("samples_from_model", "unconditional", "reference"), settings=EsdSettings)
def erased_guidance(step: DiffusionStep) -> Tensor:
    """MSE(eps(x_t, c), e0 - eta (ec - e0)), e0 and ec the frozen model's predictions without and with the prompt.

    The prompt of ec names the concept itself, also where robust training asks the network by a name that an attacker
    learned.
    """
    empty = step.reference_prediction(step.unconditional).float()
    return F.mse_loss(step.prediction().float(), step.beyond(empty, step.options.eta))
