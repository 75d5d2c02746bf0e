"""Benign fine-tuning: relearning's adapter, trained on images of other things only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from barrier_diffusers.evaluation.attacks.base import Attempt, Forgotten, Level, Variant, register_attack
from barrier_diffusers.evaluation.attacks.relearning import RelearningConfig, relearning


@dataclass
class BenignConfig(RelearningConfig):
    """Budget of LoRA fine-tuning on images of other things."""

    num_images: int | None = 100

    SURVIVORS = 3

    def images_of(self, forgotten: Forgotten) -> tuple[str, Dataset]:
        """(what they show, the images it may draw from)."""
        return "other things", forgotten.others

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """As relearning; no token, as that would be learned from images of the concept."""
        if self.token_steps:
            raise ValueError("benign.token_steps: a token is learned from images of the concept: leave it at 0")
        super().check(pipeline, forgotten)

    def fewer_images(self, forgotten: Forgotten) -> list[int]:
        """One number: what is drawn from other things is no secret to anybody."""
        return [min(self.num_images or len(forgotten.others), len(forgotten.others))]

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: an adapter and all weights, at the rate with which each learns fast. thorough: as relearning."""
        if level == "thorough":
            return super().variants(level, forgotten)
        tried = {"LoRA 16 on attention": 1e-3, "all weights": 1e-4}
        return [
            Variant(f"{trained}, {rate:g}", self.trying(trained, rate, self.num_images, self.standard_marks))
            for trained, rate in tried.items()
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """All marks."""
        return super().further(level, forgotten)[:1]


@register_attack("benign", BenignConfig)
def benign(pipeline: Any, forgotten: Forgotten, budget: BenignConfig) -> Attempt:
    """Train the adapter on images of other things, ask the plain prompts, take it off again."""
    return relearning(pipeline, forgotten, budget)
