"""Erased Stable Diffusion (METHOD: esd; Gandikota et al., arXiv 2303.07345): the concept's prompt is answered with the
guidance turned round. It needs prompts only, no image: x_t is sampled by the model that trains."""

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register


@register("esd", needs=("own_samples", "unconditional", "reference"), reads=("eta",))
def erased_guidance(step: DiffusionStep) -> Tensor:
    """MSE(eps(x_t, c), e0 - eta (ec - e0)), e0 and ec the frozen model's predictions without and with the prompt."""
    empty, prompted = (step.reference_prediction(condition) for condition in (step.unconditional, step.condition))
    target = empty.float() - step.options.eta * (prompted.float() - empty.float())
    return F.mse_loss(step.prediction().float(), target)
