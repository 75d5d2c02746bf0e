"""Benign fine-tuning: relearning's adapter, trained on images of other things only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from barrier_diffusers.evaluation.attacks.base import Attempt, Forgotten, register_attack
from barrier_diffusers.evaluation.attacks.relearning import RelearningConfig, relearning


@dataclass
class BenignConfig(RelearningConfig):
    """Budget of LoRA fine-tuning on images of other things."""

    num_images: int | None = 100

    def images_of(self, forgotten: Forgotten) -> tuple[str, Dataset]:
        """(what they show, the images it may draw from)."""
        return "other things", forgotten.others


@register_attack("benign", BenignConfig)
def benign(pipeline: Any, forgotten: Forgotten, budget: BenignConfig) -> Attempt:
    """Train the adapter on images of other things, ask the plain prompts, take it off again."""
    return relearning(pipeline, forgotten, budget)
