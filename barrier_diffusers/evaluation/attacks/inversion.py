"""Concept inversion: one new token is learned whose prompts bring the concept back, while no weight changes.

Textual inversion (arXiv 2208.01618) turned on an unlearned model, as in arXiv 2308.01508.

Shapes: B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from barrier_diffusers.evaluation.attacks.base import (
    Attempt,
    Forgotten,
    LearningBudget,
    register_attack,
    rename_concept,
)
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import TOKEN, learned_tokens
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import encode, frozen, learn


@dataclass
class InversionConfig(LearningBudget):
    """Budget of concept inversion."""

    initial_words: str | None = None  # the new embedding starts as the mean of these words'; None: the concept's name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_words is not None and not self.initial_words.strip():
            raise ValueError("inversion.initial_words is empty: name some words, or null for the concept's name")

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """Enough images, and captions that name the concept."""
        self.require(forgotten.images, forgotten.concept)
        rename_concept([*forgotten.images["text"], *forgotten.prompts], forgotten.concept, words=TOKEN)


@register_attack("inversion", InversionConfig)
def inversion(pipeline: Any, forgotten: Forgotten, budget: InversionConfig) -> Attempt:
    """Learn the embedding for which "a photo of a <forgotten>" denoises held-out images of the concept, then ask with
    it: the plain prompts with the new token instead of the concept's words."""
    denoiser, images = PipelineDenoiser(pipeline), budget.choose(forgotten.images)
    captions = rename_concept(images["text"], forgotten.concept, words=TOKEN)
    prompts = rename_concept(forgotten.prompts, forgotten.concept, words=TOKEN)
    distinct = sorted(set(captions))
    caption_ids = torch.tensor([distinct.index(caption) for caption in captions])

    def condition(rows: Tensor) -> Condition:
        asked, rows_of_asked = caption_ids[rows].unique(
            return_inverse=True
        )  # each caption goes through the encoder once
        encoded = denoiser.architecture.encode(pipeline, [distinct[index] for index in asked])
        return {key: value[rows_of_asked] for key, value in encoded.items()}

    with frozen(pipeline), learned_tokens(pipeline, budget.initial_words or forgotten.concept) as new:
        moments = encode(pipeline, images, resolution=forgotten.resolution)
        learn(denoiser, moments, condition=condition, parameters=new.parameters, budget=budget, desc="inversion")
        made = generate(pipeline, prompts, sampling=forgotten.sampling, desc="images after inversion")
    return Attempt(made, prompts, len(images))
