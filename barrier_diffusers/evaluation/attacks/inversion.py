"""Concept inversion: one new token is learned whose prompts bring the concept back, while no weight changes.

Textual inversion (arXiv 2208.01618) turned on an unlearned model, as in arXiv 2308.01508.

Shapes: N images, B prompts, L tokens, D embedding features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from barrier_diffusers.evaluation.attacks.base import (
    Attempt,
    Forgotten,
    LearningBudget,
    encode,
    frozen,
    learn,
    register_attack,
    rename_concept,
)
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.objectives.base import Condition

TOKEN = "<forgotten>"


@dataclass
class InversionConfig(LearningBudget):
    """Budget of concept inversion."""

    initial_words: str | None = None  # the new embedding starts as the mean of these words'; None: the concept's name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_words is not None and not self.initial_words.strip():
            raise ValueError("inversion.initial_words is empty: name some words, or null for the concept's name")

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """One text encoder, enough images, and captions that name the concept."""
        self.require_one_encoder(pipeline, "inversion learns one embedding")
        self.require(forgotten.images, forgotten.concept)
        rename_concept([*forgotten.images["text"], *forgotten.prompts], forgotten.concept, words=TOKEN)


class LearnedToken(nn.Module):
    """An embedding layer that knows one token more than the layer it stands for, or one of its tokens anew.

    Args:
        layer: the embedding layer it stands for, which keeps its weights.
        token_id: the new token's, or that of the row.
        vector_D: the token's embedding at the start.
    """

    def __init__(self, layer: nn.Module, token_id: int, vector_D: Tensor):
        super().__init__()
        self.layer, self.token_id = layer, token_id
        self.vector = nn.Parameter(vector_D.detach().clone())

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Token ids (B, L) -> embeddings (B, L, D)."""
        is_new = ids_BL == self.token_id
        return torch.where(is_new.unsqueeze(-1), self.vector, self.layer(ids_BL.masked_fill(is_new, 0)))


@contextmanager
def learned_token(pipeline: Any, initial_words: str) -> Iterator[LearnedToken]:
    """The pipeline with the token TOKEN in its vocabulary; at the end its own tokenizer and layer stand there again.

    Raises:
        ValueError: the tokenizer knows TOKEN already.
    """
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    layer, extended = encoder.get_input_embeddings(), copy.deepcopy(tokenizer)
    if not extended.add_tokens(TOKEN):
        raise ValueError(f"the tokenizer has a token {TOKEN} already, which inversion wants to learn")
    ids = tokenizer(initial_words, add_special_tokens=False).input_ids
    learned = LearnedToken(layer, extended.convert_tokens_to_ids(TOKEN), layer.weight[ids].mean(0))
    try:
        pipeline.tokenizer = extended
        encoder.set_input_embeddings(learned)
        yield learned
    finally:
        encoder.set_input_embeddings(layer)
        pipeline.tokenizer = tokenizer


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

    with frozen(pipeline), learned_token(pipeline, budget.initial_words or forgotten.concept) as token:
        moments = encode(pipeline, images, resolution=forgotten.resolution)
        learn(denoiser, moments, condition=condition, parameters=[token.vector], budget=budget, desc="inversion")
        made = generate(pipeline, prompts, sampling=forgotten.sampling, desc="images after inversion")
    return Attempt(made, prompts, len(images))
