"""KL divergence (docs/method.md section 5): move the prediction's distribution away from the frozen model's."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective
from barrier_diffusers.utils.checks import ABOVE_0, Checked, rules


@dataclass
class KlSettings(Checked):
    """Own settings of objective kl."""

    temperature: float = 0.1  # > 0; kl: of both softmaxes

    SECTION = "objective."
    RULES = rules(temperature=ABOVE_0)


@register_objective("kl", needs=("reference",), settings=KlSettings)
def divergence(step: DiffusionStep) -> Tensor:
    """- mean_B KL(softmax(eps_ref / T) || softmax(eps / T)), in nats.

    Each sample's whole prediction, (c, h, w) flattened, is one distribution: the softmax runs over c * h * w entries.
    There is no floor: stop early. At the first step both sides are equal, where the loss has its maximum 0 and the
    gradient is 0 up to rounding; Adam, which divides by the gradient's size, leaves that point all the same.
    """
    reference = step.knew()
    temperature = step.options.temperature
    log_reference, log_prediction = (
        F.log_softmax(value.float().flatten(1) / temperature, dim=1) for value in (reference, step.prediction())
    )
    return -F.kl_div(log_prediction, log_reference, reduction="batchmean", log_target=True)
