"""The concept asked for by paraphrases that the user gives. Nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from barrier_diffusers.data.concepts import cycle
from barrier_diffusers.evaluation.attacks.base import Attempt, Budget, Forgotten, register_attack, rename_concept
from barrier_diffusers.models.generation import generate


@dataclass
class ParaphrasedConfig(Budget):
    """Paraphrases: other words for the concept, or whole prompts. The seed draws nothing."""

    words: list[str] = field(default_factory=list)  # each in turn replaces the concept's words
    prompts: list[str] = field(default_factory=list)  # or each in turn is asked as it is

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """One of the two lists, none of them blank."""
        if bool(self.words) == bool(self.prompts) or not all(text.strip() for text in self.words + self.prompts):
            raise ValueError(
                "the attack paraphrased needs paraphrased.words or paraphrased.prompts, without empty ones"
            )
        if self.words:
            rename_concept(forgotten.prompts, forgotten.concept, words="")


@register_attack("paraphrased", ParaphrasedConfig)
def paraphrased(pipeline: Any, forgotten: Forgotten, budget: ParaphrasedConfig) -> Attempt:
    """Ask with the user's paraphrases."""
    prompts = cycle(budget.prompts, len(forgotten.prompts))
    if budget.words:
        words = cycle(budget.words, len(forgotten.prompts))
        pairs = zip(forgotten.prompts, words, strict=True)
        prompts = [rename_concept([prompt], forgotten.concept, words=other)[0] for prompt, other in pairs]
    return Attempt(generate(pipeline, prompts, sampling=forgotten.sampling, desc="images of paraphrases"), prompts)
