"""What every attack gets and gives back, and the registry that maps a name to it.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from barrier_diffusers.data.captions import swap_concept
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.models.architectures import get_architecture
from barrier_diffusers.models.generation import SamplingConfig
from barrier_diffusers.training.learning import encode, frozen, learn
from barrier_diffusers.utils.checks import ABOVE_0, SEED, Checked, at_least, rules
from barrier_diffusers.utils.registry import Registry

__all__ = [
    "ATTACKS",
    "Attack",
    "Attempt",
    "Budget",
    "Forgotten",
    "ImageBudget",
    "LearningBudget",
    "Run",
    "encode",
    "frozen",
    "learn",
    "register_attack",
    "rename_concept",
]


@dataclass(frozen=True)
class Forgotten:
    """One forgotten concept, as an attacker knows it."""

    concept: str  # the words that name it in captions
    prompts: list[str]  # that ask for it in plain words; an attack makes one image for each
    images: Dataset  # held-out images of it: columns image and text
    others: Dataset  # held-out images of what is retained: columns image and text
    sampling: SamplingConfig  # image i starts from seed + i, with and without an attack
    resolution: int  # side in pixels at which the images are encoded


@dataclass
class Budget(Checked):
    """What an attack may spend. The subclass of an attack is its settings."""

    seed: int = 0  # of everything the attack draws

    RULES = rules(seed=SEED)

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Refuse what the attack cannot work with, before any work.

        Raises:
            ValueError: says what is missing and what to do.
        """


@dataclass
class ImageBudget(Budget):
    """What an attack that learns from images may spend."""

    num_steps: int = 300  # of its optimizer
    batch_size: int = 32  # images per step, drawn with replacement
    num_images: int | None = None  # drawn once from the held-out images; None: all

    RULES = rules(num_steps=at_least(1), batch_size=at_least(1), num_images=at_least(1))

    def choose(self, images: Dataset) -> Dataset:
        """The images that the attack learns from."""
        return images.select(take_evenly(range(len(images)), self.num_images, seed=self.seed))

    def require(self, images: Sized, what: str) -> None:
        """A ValueError if there are fewer images than the budget names, or none."""
        wanted = self.num_images or 1
        if len(images) < wanted:
            raise ValueError(
                f"an attack wants {wanted} held-out images of {what}, but there are {len(images)}: lower num_images"
            )

    def require_one_encoder(self, pipeline: Any, attack: str) -> None:
        """A ValueError if the pipeline has several text encoders; `attack` says who needs one, and what for."""
        tokenizers = get_architecture(type(pipeline).__name__).tokenizers
        if len(tokenizers) > 1:
            raise ValueError(
                f"{attack}, but a {type(pipeline).__name__} has {len(tokenizers)} encoders: leave it out of attacks"
            )


@dataclass
class LearningBudget(ImageBudget):
    """What an attack that trains may spend: `num_steps` of AdamW, without weight decay."""

    learning_rate: float = 5e-3  # constant

    RULES = rules(learning_rate=ABOVE_0)


@dataclass(frozen=True)
class Attempt:
    """The images that an attack brought out of the pipeline, and how."""

    images_NHWC: np.ndarray  # bytes (N, H, W, 3), one image per prompt of the concept
    prompts: list[str]  # what was really asked (N)
    num_training_images: int = 0  # that the attack learned from
    found: dict[str, Any] = field(default_factory=dict)  # what a search found, for the record


Run = Callable[[Any, Forgotten, Any], Attempt]  # (pipeline, forgotten, budget); the pipeline comes back as it was


@dataclass(frozen=True)
class Attack:
    """An attack by its name, with the dataclass of its settings."""

    name: str
    run: Run
    budget: type[Budget]


ATTACKS: Registry[Attack] = Registry("attack")


def register_attack(name: str, budget: type[Budget]) -> Callable[[Run], Run]:
    """Decorator: register an attack under `name`, which its settings' section is called, too.

    Raises:
        ValueError: the name is taken.
    """

    def decorate(run: Run) -> Run:
        ATTACKS.register(Attack(name, run, budget))
        return run

    return decorate


def rename_concept(captions: Sequence[str], concept: str, words: str) -> list[str]:
    """The captions with other words for the concept.

    Raises:
        ValueError: a caption that does not name the concept.
    """
    renamed = []
    for caption in captions:
        try:
            renamed.append(swap_concept(caption, concept, replacement=words))
        except ValueError as error:
            raise ValueError(
                f"caption {caption!r} does not name the concept {concept!r}, so an attack cannot exchange its words: "
                "choose a concept that the captions name, or leave the attack out"
            ) from error
    return renamed
