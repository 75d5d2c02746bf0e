"""ObjectiveConfig: which base objective runs, and the settings that objectives may read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from barrier_diffusers.utils.checks import require_positive


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
        require_positive(self, ("num_inference_steps",), "objective.{}")

    def anchors_of(self, concepts: Sequence[str]) -> list[str | None]:
        """`anchor` for each of these concepts.

        Raises:
            ValueError: a list of the wrong length, or an anchor that is to be forgotten itself.
        """
        words = self.anchor if isinstance(self.anchor, list) else [self.anchor] * len(concepts)
        if len(words) != len(concepts):
            raise ValueError(f"objective.anchor lists {len(words)} words for {len(concepts)} concepts")
        for word in set(words) & set(concepts):
            raise ValueError(f"objective.anchor {word!r} is to be forgotten itself: choose something that is retained")
        return list(words)
