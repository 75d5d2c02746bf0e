"""ObjectiveConfig: which base objective runs, and the settings that objectives may read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ObjectiveConfig:
    """The base objective that does the erasing. One that the chosen objective does not read must keep its default.

    Raises:
        ValueError: a value out of range, or both kinds of anchor.
    """

    name: str = "rl"  # see barrier_diffusers/objectives, or your own
    module: str | None = None  # .py file or importable module that registers an objective of yours: it is run
    alpha: float = 0.0  # weight of the ordinary loss on a retain batch; 0: no retain batch is loaded or run
    # words that replace the concept's in each caption, or a list, one per concept; None: another label at random
    anchor: str | list[str] | None = None
    anchor_prompt: str | None = None  # or one whole prompt for every forget image
    temperature: float = 0.1  # > 0; kl: of both softmaxes
    eta: float = 1.0  # esd: how far the target lies beyond the empty prompt's prediction, away from the concept
    guidance_scale: float = 3.0  # esd: classifier-free guidance while the model samples its own x_t
    num_inference_steps: int = 50  # >= 1; esd: steps of that sampling, of which a random number is run
    preserve_weight: float = 1.0  # >= 0; uce: of each token of a retain prompt, against 1 of a forget prompt
    ridge: float = 0.1  # > 0; uce: weight of ||W - W0||^2

    def __post_init__(self) -> None:
        if self.anchor is not None and self.anchor_prompt is not None:
            raise ValueError("set objective.anchor (words) or objective.anchor_prompt (a whole prompt), not both")
        for name in ("alpha", "preserve_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}, but must be >= 0")
        for name in ("temperature", "ridge"):
            if not getattr(self, name) > 0:
                raise ValueError(f"objective.{name} is {getattr(self, name)}, but must be > 0")
        if self.num_inference_steps < 1:
            raise ValueError(f"objective.num_inference_steps is {self.num_inference_steps}, but must be at least 1")
