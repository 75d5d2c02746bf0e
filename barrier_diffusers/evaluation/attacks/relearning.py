"""Relearning: an adapter, or every weight, is trained on a few images of the concept, or (benign) on images of other
things only, and the plain prompts are asked again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor, nn

from barrier_diffusers.data.encoding import EncodedImages, encode_prompts
from barrier_diffusers.evaluation.attacks.base import (
    FIRST_MARKS,
    LEARNING_RATES,
    MARKS,
    Attempt,
    Forgotten,
    LearningBudget,
    Level,
    Mark,
    Marks,
    Variant,
    image_counts,
    register_attack,
    rename_concept,
)
from barrier_diffusers.evaluation.attacks.inversion import InversionConfig, learn_tokens
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import TOKEN, learned_tokens
from barrier_diffusers.models.loading import add_adapter
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.targets import resolve_targets
from barrier_diffusers.training.learning import encode, every_weight, frozen, learn
from barrier_diffusers.utils.checks import Range, at_least, rules

ATTENTION, ALL_MAPS = ["to_q", "to_k", "to_v", "to_out.0"], ["Linear", "Conv2d"]
LORA_8 = "LoRA 8 on attention"  # of the standard grid; the thorough one has its neighbours
# trained_weights, targets and rank -> their name
TRAINED: dict[str, tuple[Literal["adapter", "all"], list[str], int]] = {
    "LoRA 4 on attention": ("adapter", ATTENTION, 4),
    LORA_8: ("adapter", ATTENTION, 8),
    "LoRA 16 on attention": ("adapter", ATTENTION, 16),
    "LoRA 4 on all maps": ("adapter", ALL_MAPS, 4),
    "LoRA 16 on all maps": ("adapter", ALL_MAPS, 16),
    "all weights": ("all", ATTENTION, 8),
}


@dataclass
class RelearningConfig(LearningBudget):
    """Budget of fine-tuning on images of the concept."""

    num_steps: int = 100  # of AdamW
    batch_size: int = 10  # images per step
    learning_rate: float = 1e-4
    num_images: int | None = 10
    trained_weights: Literal["adapter", "all"] = "adapter"  # a LoRA adapter, or every weight of the denoiser
    rank: int = 8  # of the adapter; a narrower map gets one of its own width
    targets: list[str] = field(default_factory=lambda: list(ATTENTION))  # maps that get one
    # steps of inversion first: the token that it finds stands in the captions and prompts; 0: the concept's own name
    token_steps: int = 0

    SURVIVORS = 8
    RULES = rules(rank=Range(1, 4096), token_steps=at_least(0))

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
        if self.token_steps:
            rename_concept([*images["text"], *forgotten.prompts], forgotten.concept, words=TOKEN)

    def fewer_images(self, forgotten: Forgotten) -> list[int]:
        """Numbers of images that a thorough grid tries."""
        return image_counts(len(self.images_of(forgotten)[1]))

    def trying(self, trained: str, rate: float, num_images: int | None, marks: list[int]) -> RelearningConfig:
        """These settings with others for what a grid varies."""
        kind, targets, rank = TRAINED[trained]
        return self.until(
            marks, trained_weights=kind, targets=targets, rank=rank, learning_rate=rate, num_images=num_images
        )

    @property
    def standard_marks(self) -> list[int]:
        """The marks of a standard grid: those that are set, else the usual ones."""
        return self.marks or MARKS

    def variants(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """standard: six attackers with the settings' images and marks. thorough: every combination, few steps and
        images."""
        if level == "standard":
            tried = [(LORA_8, rate) for rate in (3e-4, 1e-3, 3e-3)]
            tried += [("all weights", rate) for rate in (3e-5, 1e-4, 3e-4)]
            return [
                Variant(f"{trained}, {rate:g}", self.trying(trained, rate, self.num_images, self.standard_marks))
                for trained, rate in tried
            ]
        thorough = [trained for trained in TRAINED if trained != LORA_8]
        return [
            Variant(f"{trained}, {rate:g}, {count} images", self.trying(trained, rate, count, FIRST_MARKS), 10)
            for trained, rate, count in product(thorough, LEARNING_RATES, self.fewer_images(forgotten))
        ]

    def further(self, level: Level, forgotten: Forgotten) -> list[Variant]:
        """All marks, with the concept's name and with a token that is learned first."""
        if level == "standard":
            return []
        longer = self.until(MARKS)
        return [Variant("", longer), Variant("learned token", replace(longer, token_steps=100))]


@contextmanager
def trained_parameters(network: Any, budget: RelearningConfig) -> Iterator[list[nn.Parameter]]:
    """What the attack trains; afterwards the network is as it was."""
    if budget.trained_weights == "all":
        with every_weight(network) as weights:
            yield weights
        return
    with torch.random.fork_rng():
        try:
            torch.manual_seed(budget.seed)  # of the adapter's first values
            add_adapter(network, BarrierConfig(targets=budget.targets), rank=budget.rank, at_most=True)
            yield [value for value in network.parameters() if value.requires_grad]
        finally:
            network.unload_lora()


@register_attack("relearning", RelearningConfig)
def relearning(pipeline: Any, forgotten: Forgotten, budget: RelearningConfig) -> Attempt:
    """Train on the budget's images with their own captions, ask the plain prompts at each mark, take it back."""
    what, available = budget.images_of(forgotten)
    denoiser, images = PipelineDenoiser(pipeline), budget.choose(available)
    network, captions, prompts = denoiser.network, list(images["text"]), forgotten.prompts
    moments = encode(pipeline, images, resolution=forgotten.resolution)
    ask = partial(generate, pipeline, sampling=forgotten.sampling, desc="images after relearning")

    def draw(num_steps: int) -> Mark:
        retained = ask(forgotten.retain_prompts) if forgotten.retain_prompts else None
        return Mark(num_steps, ask(prompts), retained)

    def train() -> str | None:
        distinct = sorted(set(captions))
        ids = torch.tensor([distinct.index(caption) for caption in captions])
        encoded = EncodedImages(moments, ids, ids, encode_prompts(pipeline, distinct))

        def condition(rows: Tensor) -> dict[str, Tensor]:
            return encoded.condition(ids[rows])

        with trained_parameters(network, budget) as parameters:
            return marks.train(
                lambda: learn(
                    denoiser,
                    moments,
                    condition=condition,
                    parameters=parameters,
                    budget=budget,
                    desc=f"relearning on {what}",
                    after_step=marks,
                )
            )

    marks = Marks(budget, draw)
    with frozen(pipeline):
        if budget.token_steps:
            with learned_tokens(pipeline, forgotten.concept) as new:
                captions = rename_concept(captions, forgotten.concept, words=new.words)
                prompts = rename_concept(prompts, forgotten.concept, words=new.words)
                search = InversionConfig(seed=budget.seed, num_steps=budget.token_steps, batch_size=budget.batch_size)
                learn_tokens(pipeline, new, captions=captions, moments=moments, budget=search)
                failed = train()
        else:
            failed = train()
    return Attempt(marks.drawn[-1].images_NHWC, prompts, len(images), marks=marks.drawn, failed=failed)
