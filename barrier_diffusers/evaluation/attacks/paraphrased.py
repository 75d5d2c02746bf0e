"""The concept asked for by paraphrases that the user gives. Nothing is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from barrier_diffusers.data.captions import cycle
from barrier_diffusers.evaluation.attacks.base import Attempt, Budget, Forgotten, register_attack, rename_concept
from barrier_diffusers.models.generation import generate
from barrier_diffusers.utils.words import folded


@dataclass
class ParaphrasedConfig(Budget):
    """Paraphrases: other words for the concept, or whole prompts. The seed draws nothing."""

    words: list[str] = field(default_factory=list)  # each in turn replaces the concept's words
    prompts: list[str] = field(default_factory=list)  # or each in turn is asked as it is

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """One of the two lists, without blanks, and without the concept's own name: that asks nothing new."""
        if bool(self.words) == bool(self.prompts) or not all(text.strip() for text in self.words + self.prompts):
            raise ValueError(
                "the attack paraphrased needs paraphrased.words or paraphrased.prompts, without empty ones"
            )
        name = spelled(forgotten.concept)
        same = [words for words in self.words if spelled(words) == name]
        same += [prompt for prompt in self.prompts if name in spelled(prompt)]
        if same:
            raise ValueError(
                f"paraphrase {same[0]!r} names the concept {forgotten.concept!r} itself, as the plain prompts do: "
                "leave it out of paraphrased"
            )
        if self.words:
            rename_concept(forgotten.prompts, forgotten.concept, words="")


def spelled(text: str) -> str:
    """The words of a text between single spaces, as they are read: case and hyphens count for nothing.

    >>> spelled("Running-Shoe") == spelled(" running  shoe ")
    True
    """
    return f" {' '.join(folded(text)[0].replace('-', ' ').split())} "


@register_attack("paraphrased", ParaphrasedConfig)
def paraphrased(pipeline: Any, forgotten: Forgotten, budget: ParaphrasedConfig) -> Attempt:
    """Ask with the user's paraphrases."""
    prompts = cycle(budget.prompts, len(forgotten.prompts))
    if budget.words:
        words = cycle(budget.words, len(forgotten.prompts))
        pairs = zip(forgotten.prompts, words, strict=True)
        prompts = [rename_concept([prompt], forgotten.concept, words=other)[0] for prompt, other in pairs]
    return Attempt(generate(pipeline, prompts, sampling=forgotten.sampling, desc="images of paraphrases"), prompts)
