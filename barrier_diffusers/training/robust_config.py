"""RobustConfig: what training does so that an attacker cannot bring the concept back (docs/method.md section 8).

Annotations are evaluated at once, as in run_config.py.
"""

from dataclasses import dataclass, field
from typing import Literal

from barrier_diffusers.utils.checks import ABOVE_0, Checked, Range, at_least, rules


@dataclass
class RobustConfig(Checked):
    """Robust training, in parts that are off by default. Each works beside every objective that trains."""

    # a relearner fine-tunes a copy of the weights on a few forget images for so many steps, one of these numbers at a
    # time, and the objective's gradient after it is added to the one before; empty: none does
    meta_steps: list[int] = field(default_factory=list)
    meta_every: int = 1  # it does so in every so many steps
    meta_weight: float = 1.0  # of the gradient after relearning
    # what the relearner moves: the weights that train here; the factors of a LoRA adapter that is thrown away, which
    # takes a third less time and no copy; or one of the two at random
    meta_weights: Literal["trained", "adapter", "either"] = "trained"
    # of the relearner's Adam, one at a time
    meta_learning_rates: list[float] = field(default_factory=lambda: [3e-5, 1e-4, 3e-4, 1e-3])
    meta_adapter_learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])  # where it has one
    meta_adapter_rank: int = 8
    # maps that the adapter is on, named as barrier.targets
    meta_adapter_targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    meta_num_images: int = 10  # forget images that it learns from, drawn anew each time

    SECTION = "robust."
    RULES = rules(
        meta_steps=at_least(1),
        meta_every=at_least(1),
        meta_weight=ABOVE_0,
        meta_learning_rates=ABOVE_0,
        meta_adapter_learning_rates=ABOVE_0,
        meta_adapter_rank=Range(1, 4096),
        meta_num_images=at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("meta_learning_rates", "meta_adapter_learning_rates", "meta_adapter_targets"):
            if not getattr(self, name):
                raise ValueError(f"robust.{name} is empty, but must hold at least one value")

    @property
    def parts(self) -> list[str]:
        """The settings that are switched on."""
        return [name for name in ("meta_steps",) if getattr(self, name)]

    @property
    def summary(self) -> str:
        """What a run's announcement adds."""
        return f"; robust: {', '.join(self.parts)}" if self.parts else ""

    @property
    def has_adapter(self) -> bool:
        """Whether a relearner may train an adapter."""
        return bool(self.meta_steps) and self.meta_weights != "trained"

    @property
    def reads_forget_images(self) -> bool:
        """Whether a part learns from forget images, also beside an objective that needs none."""
        return bool(self.meta_steps)
