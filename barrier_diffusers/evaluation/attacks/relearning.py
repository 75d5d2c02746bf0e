"""Relearning: a LoRA adapter is trained on a few images of the concept, or (benign) on images of other things only,
and the plain prompts are asked again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from barrier_diffusers.data.encoding import EncodedImages, encode_prompts
from barrier_diffusers.evaluation.attacks.base import (
    Attempt,
    Forgotten,
    LearningBudget,
    register_attack,
)
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.loading import add_adapter
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.targets import resolve_targets
from barrier_diffusers.training.learning import encode, frozen, learn
from barrier_diffusers.utils.checks import Range, rules


@dataclass
class RelearningConfig(LearningBudget):
    """Budget of LoRA fine-tuning on images of the concept."""

    num_steps: int = 100  # of AdamW
    batch_size: int = 10  # images per step
    learning_rate: float = 1e-4
    num_images: int | None = 10
    rank: int = 8  # of the adapter
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # maps that get one

    RULES = rules(rank=Range(1, 4096))

    def images_of(self, forgotten: Forgotten) -> tuple[str, Dataset]:
        """(what they show, the images it may draw from)."""
        return forgotten.concept, forgotten.images

    def check(self, pipeline: Any, forgotten: Forgotten) -> None:
        """A denoiser without adapter that has the targets, and enough images."""
        network = PipelineDenoiser(pipeline).network
        if getattr(network, "peft_config", None):
            raise ValueError("the pipeline carries an adapter: fuse and unload it before a relearning attack")
        resolve_targets(network, self.targets)
        what, images = self.images_of(forgotten)
        self.require(images, what)


@register_attack("relearning", RelearningConfig)
def relearning(pipeline: Any, forgotten: Forgotten, budget: RelearningConfig) -> Attempt:
    """Train the adapter on the budget's images with their own captions, ask the plain prompts, take it off again."""
    what, available = budget.images_of(forgotten)
    denoiser, images = PipelineDenoiser(pipeline), budget.choose(available)
    network, captions = denoiser.network, list(images["text"])
    distinct = sorted(set(captions))
    ids = torch.tensor([distinct.index(caption) for caption in captions])
    moments = encode(pipeline, images, resolution=forgotten.resolution)
    encoded = EncodedImages(moments, ids, ids, encode_prompts(pipeline, distinct))

    def condition(rows: Tensor) -> dict[str, Tensor]:
        return encoded.condition(ids[rows])

    with frozen(pipeline), torch.random.fork_rng():
        try:
            torch.manual_seed(budget.seed)  # of the adapter's first values
            add_adapter(network, BarrierConfig(targets=budget.targets), rank=budget.rank)
            adapter = [value for value in network.parameters() if value.requires_grad]
            learn(
                denoiser, moments, condition=condition, parameters=adapter, budget=budget, desc=f"relearning on {what}"
            )
            made = generate(pipeline, forgotten.prompts, sampling=forgotten.sampling, desc="images after relearning")
        finally:
            network.unload_lora()
    return Attempt(made, forgotten.prompts, len(images))
