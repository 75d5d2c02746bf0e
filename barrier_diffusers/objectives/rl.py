"""Random label (docs/method.md section 5): answer the concept's prompt as another one.

The other prompt is that of another label, or an anchor prompt.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.objectives.base import DiffusionStep, register_objective
from barrier_diffusers.utils.checks import Checked, at_least, check_settings, rules


@dataclass
class RlSettings(Checked):
    """Own settings of objectives rl and concept."""

    # rl, concept: whose answer to the anchor prompt is aimed at. network: the one that trains, as it is in the step;
    # base: the frozen one, whose answers do not drift along
    anchor_target: Literal["network", "base"] = "network"
    # rl, concept: how far the target lies beyond the anchor's answer, away from the base's answer to the concept, in
    # distances between the two; 0: at the anchor's answer
    anchor_eta: float = 0.0
    # rl, concept: which names' target lies beyond the anchor's answer. all; or the concept's own alone, as one that
    # robust.token_rounds learned may stand beside a retained word
    anchor_eta_names: Literal["all", "own"] = "all"

    SECTION = "objective."
    RULES = rules(anchor_eta=at_least(0))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.anchor_eta and not self.reads_reference:
            raise ValueError(
                "objective.anchor_eta measures from the base's answers: set objective.anchor_target to base, or leave "
                "objective.anchor_eta at 0"
            )
        if self.anchor_eta_names != "all" and not self.anchor_eta:
            raise ValueError(
                f"objective.anchor_eta_names is {self.anchor_eta_names!r}, but objective.anchor_eta is 0: set it, or "
                "leave objective.anchor_eta_names at all"
            )

    @property
    def reads_reference(self) -> bool:
        """Whether the frozen model is read."""
        return self.anchor_target == "base"


@register_objective("rl", needs=("anchor",), settings=RlSettings)
def random_label(step: DiffusionStep) -> Tensor:
    """MSE(eps(x_t, c), sg eps(x_t, c')): same x_t and timestep on both sides, no graph on the anchor's.

    With `anchor_eta` the target is eps_0(x_t, c') + anchor_eta (eps_0(x_t, c') - eps_0(x_t, c)).
    """
    from_base = getattr(step.options, "reads_reference", False)  # a step may have no settings
    anchored = step.reference_prediction(step.anchor) if from_base else step.fixed_prediction(step.anchor)
    target = anchored.float()
    if eta := getattr(step.options, "anchor_eta", 0.0):
        beyond = step.beyond(target, eta)
        if step.learned is not None and step.options.anchor_eta_names == "own":
            beyond[step.learned] = target[step.learned]
        target = beyond
    return F.mse_loss(step.prediction().float(), target)
