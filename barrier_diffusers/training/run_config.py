"""What the settings of every training run have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from barrier_diffusers.protection.config import BarrierConfig


@dataclass(kw_only=True)
class Protecting:
    """What the settings of every unlearning run say about its protection: the last base of their dataclasses."""

    if TYPE_CHECKING:  # the run's own fields
        barrier: BarrierConfig
        saliency_mask: float | None

    @property
    def protected(self) -> bool:
        """Whether a protection loss or a projection takes part."""
        return self.barrier.protects

    def check_saliency_mask(self) -> None:
        """A ValueError for anything but a fraction, or beside a projection."""
        if self.saliency_mask is not None and not 0 < self.saliency_mask <= 1:
            raise ValueError(f"saliency_mask is {self.saliency_mask}, but must be a fraction in (0, 1]")
        if self.saliency_mask is not None and self.barrier.has_projection:
            raise ValueError("saliency_mask holds entries that a projection has to move: use one of the two")


@dataclass(kw_only=True)
class Retaining(Protecting):
    """The same for a run with an objective."""

    if TYPE_CHECKING:
        objective: Any  # ObjectiveConfig, whose package imports torch
        learning_rate: float
        learning_rates: dict[str, float]

    def check_learning_rates(self) -> None:
        """A ValueError for a learning rate that is not above 0; targets are looked up when the model is there."""
        named = {f"learning_rates.{target}": rate for target, rate in self.learning_rates.items()}
        for name, rate in {"learning_rate": self.learning_rate, **named}.items():
            if not rate > 0:
                raise ValueError(f"{name} is {rate}, but must be > 0")

    @property
    def needs_retain(self) -> bool:
        """Whether any retain data is read: for the retain loss, or to fit the protection."""
        return self.objective.alpha > 0 or (self.protected and self.barrier.needs_retain_data)
