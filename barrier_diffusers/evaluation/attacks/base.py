"""What every attack gets and gives back, and the registry that maps a name to it.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from datasets import Dataset
from torch import Tensor

from barrier_diffusers.data.captions import swap_concept
from barrier_diffusers.data.readers import take_evenly
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
    "Level",
    "Mark",
    "Run",
    "Variant",
    "encode",
    "frozen",
    "learn",
    "register_attack",
    "rename_concept",
]

# of the grids that relearn
MARKS = [5, 10, 20, 40, 100, 200]
FIRST_MARKS = [5, 10, 20, 40]  # of the first round of a thorough grid
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
NUM_IMAGES = (2, 10, 60)  # that a thorough grid relearns from


def image_counts(available: int) -> list[int]:
    """Numbers of images that a thorough grid relearns from, as far as there are so many."""
    return sorted({min(count, available) for count in NUM_IMAGES})


@dataclass(frozen=True)
class Forgotten:
    """One forgotten concept, as an attacker knows it."""

    concept: str  # the words that name it in captions
    prompts: list[str]  # that ask for it in plain words; an attack makes one image for each
    images: Dataset  # held-out images of it: columns image and text
    others: Dataset  # held-out images of what is retained: columns image and text
    sampling: SamplingConfig  # image i starts from seed + i, with and without an attack
    resolution: int  # side in pixels at which the images are encoded
    # some prompts of what is retained, and what each asks for: what a pipeline under attack still can do
    retain_prompts: list[str] = field(default_factory=list)
    retain_labels: list[str] = field(default_factory=list)

    @property
    def other_words(self) -> list[str]:
        """Up to two names of retained concepts, the same for each evaluation: where a search may start."""
        names = sorted(set(self.retain_labels))
        return [names[0], names[len(names) // 2]] if len(names) > 1 else names


Level = Literal["standard", "thorough"]  # a handful of settings of each attack, or a grid


@dataclass
class Budget(Checked):
    """What an attack may spend. The subclass of an attack is its settings."""

    seed: int = 0  # of everything the attack draws

    SURVIVORS: ClassVar[int] = 0  # variants of the first round that `further` is asked for, at most
    RULES = rules(seed=SEED)

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """What a grid tries, each with these settings but for what it is named after; here the settings as they are.

        An attack that declares several joins --attack_budget with them.
        """
        return [Variant("as set", self)]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """What a grid tries in its second round with a variant that was not beaten in the first: more steps, say."""
        return []

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Refuse what the attack cannot work with, before any work.

        Raises:
            ValueError: says what is missing and what to do.
        """


@dataclass(frozen=True)
class Variant:
    """One cell of a grid: a budget, and the name that tells it from the attack's other variants."""

    name: str
    budget: Budget
    num_images: int | None = None  # only the first of the concept's prompts are asked; None: all


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


@dataclass
class LearningBudget(ImageBudget):
    """What an attack that trains may spend: `num_steps` of AdamW, without weight decay."""

    learning_rate: float = 5e-3  # constant
    # steps after which images are drawn, beside the last: an attacker may stop where he likes
    marks: list[int] = field(default_factory=list)

    RULES = rules(learning_rate=ABOVE_0, marks=at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.marks and max(self.marks) > self.num_steps:
            raise ValueError(f"marks name step {max(self.marks)}, but num_steps is {self.num_steps}: raise it")

    def until(self, marks: list[int], **changes: Any) -> Self:
        """These settings with other marks, which end with the last of them, and with what else a grid varies."""
        return replace(self, marks=marks, num_steps=max(marks), **changes)


@dataclass(frozen=True)
class Mark:
    """What a pipeline drew when an attack had taken some of its steps."""

    num_steps: int  # 0: the attack takes none
    images_NHWC: np.ndarray  # bytes (N, H, W, 3), one image per prompt of the concept
    retained_NHWC: np.ndarray | None = None  # of the prompts of what is retained; None: the attack changes no weight
    # text encoder -> embeddings (T, D) of the tokens that were learned and the prompts hold; empty: none were
    tokens: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """The images that an attack brought out of the pipeline, and how."""

    images_NHWC: np.ndarray  # bytes (N, H, W, 3), one image per prompt of the concept
    prompts: list[str]  # what was really asked (N)
    num_training_images: int = 0  # that the attack learned from
    found: dict[str, Any] = field(default_factory=dict)  # what a search found, for the record
    marks: list[Mark] = field(default_factory=list)  # in the order of their steps; empty: the images above are all
    failed: str | None = None  # why it ended before its last step


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


class Marks:
    """Draws images at the marks of a training attack, and at its end.

    Args:
        draw: number of steps taken -> what the pipeline draws.
    """

    def __init__(self, budget: LearningBudget, draw: Callable[[int], Mark]):
        self.budget, self.draw, self.drawn = budget, draw, list[Mark]()

    def __call__(self, num_steps: int) -> None:
        """To be called after each step."""
        if num_steps in self.budget.marks or num_steps == self.budget.num_steps:
            self.drawn.append(self.draw(num_steps))

    def train(self, learning: Callable[[], None]) -> str | None:
        """Run a training that calls this object; why it ended early, if it did after a mark.

        Raises:
            FloatingPointError: a loss or pixels that are not finite, before the first mark.
        """
        try:
            learning()
        except FloatingPointError as error:
            if not self.drawn:
                raise
            return str(error)
        return None


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
