"""Concept inversion: new tokens are learned whose prompts bring the concept back, while no weight changes.

Textual inversion (arXiv 2208.01618) turned on an unlearned model, as in arXiv 2308.01508.

Shapes: N images, B batch, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from barrier_diffusers.evaluation.attacks.base import (
    Attempt,
    Forgotten,
    LearningBudget,
    Level,
    Mark,
    Marks,
    Variant,
    register_attack,
    rename_concept,
)
from barrier_diffusers.models.architectures import prompts_cut
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import NewWords, learned_tokens
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import encode, frozen, learn
from barrier_diffusers.utils.checks import at_least, rules
from barrier_diffusers.utils.words import parts_of

RANDOM = "random tokens"  # a start of the search


@dataclass
class InversionConfig(LearningBudget):
    """Budget of concept inversion."""

    initial_words: str | None = None  # the new embeddings start as the mean of these words'; None: the concept's name
    start: Literal["words", "random"] = "words"  # random: as random tokens of the vocabulary, drawn by the seed
    num_tokens: int = 1  # that are learned and stand for the concept

    SURVIVORS = 2
    RULES = rules(num_tokens=at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_words is not None and not self.initial_words.strip():
            raise ValueError("inversion.initial_words is empty: name some words, or null for the concept's name")
        if self.initial_words is not None and self.start == "random":
            raise ValueError("inversion.start is random, so it starts at no words: leave out initial_words")

    def words(self, forgotten: Forgotten) -> str | None:
        """The words at whose embeddings the tokens start; None: random tokens."""
        return None if self.start == "random" else self.initial_words or " ".join(parts_of(forgotten.concept))

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Enough images, captions that name the concept, and room for the tokens in every prompt."""
        self.require(forgotten.images, forgotten.concept)
        with learned_tokens(pipeline, self.words(forgotten), count=self.num_tokens, seed=self.seed) as new:
            texts = [*forgotten.images["text"], *forgotten.prompts]
            renamed = rename_concept(texts, forgotten.concept, words=new.words)
            was_cut, cut = prompts_cut(pipeline, texts), prompts_cut(pipeline, renamed)
        for name, longer in cut.items():
            if self.num_tokens > 1 and any(now and not then for now, then in zip(longer, was_cut[name], strict=True)):
                raise ValueError(
                    f"with {self.num_tokens} tokens a prompt is longer than the {name} reads: lower "
                    "inversion.num_tokens"
                )

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: two starts. thorough: four starts, one and four tokens, two learning rates."""
        starts = [forgotten.concept, *forgotten.other_words, RANDOM]
        counts: tuple[int, ...] = (1, 4)
        rates: tuple[float, ...] = (self.learning_rate, 4 * self.learning_rate)
        tried = self
        if level == "standard":
            starts, counts, rates = starts[:2], (self.num_tokens,), (self.learning_rate,)
        else:
            tried = replace(self, num_steps=300, batch_size=16)
        return [
            Variant(
                f"from {start}, {count} token{'s' * (count > 1)}, {rate:g}",
                replace(tried, num_tokens=count, learning_rate=rate, **start_of(start)),
            )
            for start, count, rate in product(starts, counts, rates)
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """A thousand steps of twice as many images."""
        return [Variant("1,000 steps", replace(self, num_steps=1000, batch_size=32))] if level == "thorough" else []


def start_of(start: str) -> dict[str, Any]:
    """The settings of a start that a grid names."""
    random = {"start": "random", "initial_words": None}
    return random if start == RANDOM else {"start": "words", "initial_words": start}


def learn_tokens(
    pipeline: Any,
    new: NewWords,
    captions: Sequence[str],
    moments: Tensor,
    budget: LearningBudget,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Learn the embeddings of new words with which the captions, which hold them, denoise their images.

    Args:
        moments: VAE posteriors (N, 2 c, h, w) of the images.
        captions: of each image (N).
    """
    denoiser = PipelineDenoiser(pipeline)
    distinct = sorted(set(captions))
    caption_ids = torch.tensor([distinct.index(caption) for caption in captions])

    def condition(rows: Tensor) -> Condition:
        # each caption goes through the encoder once
        asked, rows_of_asked = caption_ids[rows].unique(return_inverse=True)
        encoded = denoiser.architecture.encode(pipeline, [distinct[index] for index in asked])
        return {key: value[rows_of_asked] for key, value in encoded.items()}

    learn(
        denoiser,
        moments,
        condition=condition,
        parameters=new.parameters,
        budget=budget,
        desc="inversion",
        after_step=after_step,
    )


@register_attack("inversion", InversionConfig)
def inversion(pipeline: Any, forgotten: Forgotten, budget: InversionConfig) -> Attempt:
    """Learn the embeddings for which "a photo of a <forgotten>" denoises held-out images of the concept, then ask with
    them: the plain prompts with the new tokens instead of the concept's words."""
    images = budget.choose(forgotten.images)
    words = budget.words(forgotten)
    with frozen(pipeline), learned_tokens(pipeline, words, count=budget.num_tokens, seed=budget.seed) as new:
        captions = rename_concept(images["text"], forgotten.concept, words=new.words)
        prompts = rename_concept(forgotten.prompts, forgotten.concept, words=new.words)

        def draw(num_steps: int) -> Mark:
            made = generate(pipeline, prompts, sampling=forgotten.sampling, desc="images after inversion")
            return Mark(num_steps, made, tokens=new.vectors())

        marks = Marks(budget, draw)
        moments = encode(pipeline, images, resolution=forgotten.resolution)
        failed = marks.train(
            lambda: learn_tokens(pipeline, new, captions=captions, moments=moments, budget=budget, after_step=marks)
        )
    return Attempt(marks.drawn[-1].images_NHWC, prompts, len(images), marks=marks.drawn, failed=failed)
