"""The concept asked for with typing mistakes in its name. Nothing is learned."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from barrier_diffusers.evaluation.attacks.base import Attempt, Budget, Forgotten, register_attack, rename_concept
from barrier_diffusers.models.generation import generate
from barrier_diffusers.utils.checks import at_least, rules

EDITS = ("swap", "drop", "double", "replace")


@dataclass
class MisspelledConfig(Budget):
    """Budget of misspelled prompts."""

    num_edits: int = 1  # letters of the concept's name that are swapped, dropped, doubled or replaced

    RULES = rules(num_edits=at_least(1))

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Prompts that name the concept, and letters in its name."""
        if not any(letter.isalpha() for letter in forgotten.concept):
            raise ValueError(f"{forgotten.concept!r} has no letter to misspell: leave misspelled out of attacks")
        rename_concept(forgotten.prompts, forgotten.concept, words="")


def edit(word: str, random: np.random.Generator) -> str:
    """The word with one typing mistake, never the word itself: neighbours swapped, or a letter dropped, doubled or
    replaced."""
    letters = [position for position, letter in enumerate(word) if letter.isalpha()]
    while True:
        position, kind = int(random.choice(letters)), random.choice(EDITS)
        head, letter, tail = word[:position], word[position], word[position + 1 :]
        if kind == "swap":
            edited = head + tail[:1] + letter + tail[1:]
        elif kind == "drop":
            edited = head + tail if len(letters) > 1 else word
        elif kind == "double":
            edited = head + 2 * letter + tail
        else:
            edited = head + str(random.choice(list(string.ascii_lowercase))) + tail
        if edited.split() != word.split():
            return edited


def misspell(prompts: Sequence[str], concept: str, num_edits: int, seed: int) -> list[str]:
    """The prompts with `num_edits` mistakes in the concept's words; the same seed makes the same mistakes.

    >>> misspell(["a photo of a red sneaker"], "sneaker", 1, 0) != ["a photo of a red sneaker"]
    True
    """
    edited = []
    for index, prompt in enumerate(prompts):
        random, words = np.random.default_rng([seed, index]), concept
        for _ in range(num_edits):
            words = edit(words, random)
        edited += rename_concept([prompt], concept, words=words if words != concept else edit(concept, random))
    return edited


@register_attack("misspelled", MisspelledConfig)
def misspelled(pipeline: Any, forgotten: Forgotten, budget: MisspelledConfig) -> Attempt:
    """Ask with a typing mistake in the concept's name, another one for each image."""
    prompts = misspell(forgotten.prompts, forgotten.concept, num_edits=budget.num_edits, seed=budget.seed)
    return Attempt(
        generate(pipeline, prompts, sampling=forgotten.sampling, desc="images of misspelled prompts"), prompts
    )
