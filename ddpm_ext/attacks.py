"""Attacks on a class-conditional DDPM: can a forgotten label be brought back from a few images of it?

Shapes: N images, C channels, S image side, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from barrier_diffusers.evaluation.attacks.base import LearningBudget
from barrier_diffusers.evaluation.attacks.running import attack_record, rows_of
from barrier_diffusers.evaluation.judge import Judge, as_rgb
from barrier_diffusers.evaluation.judged_model import PICTURE_NAME
from barrier_diffusers.evaluation.pictures import attacks_picture
from barrier_diffusers.evaluation.tables import print_attacks
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.learned_tokens import LearnedTokens
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import frozen, learn
from ddpm_ext.diffusion import LABELS, LabelDenoiser, draw
from ddpm_ext.loading import load_rows
from ddpm_ext.metrics import EvaluationLabels
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import FineTuningConfig, LabelEvaluationConfig, LabelledDataConfig, RowInversionConfig


@contextmanager
def learned_row(
    pipeline: ClassConditionalDDPMPipeline, label: int, budget: RowInversionConfig
) -> Iterator[list[nn.Parameter]]:
    """What concept inversion trains: a new row of the class embedding for the label; the table comes back."""
    unet: Any = pipeline.unet
    table = unet.class_embedding
    start = label if budget.initial_label is None else pipeline.labels.index(budget.initial_label)
    try:
        unet.class_embedding = learned = LearnedTokens(table, [label], table.weight[[start]])
        yield [learned.vectors]
    finally:
        unet.class_embedding = table


@contextmanager
def every_weight(
    pipeline: ClassConditionalDDPMPipeline, label: int, budget: FineTuningConfig
) -> Iterator[list[nn.Parameter]]:
    """What relearning trains: all weights of the UNet; they come back."""
    weights = list(pipeline.unet.parameters())
    before = [weight.detach().clone() for weight in weights]
    try:
        yield [weight.requires_grad_(True) for weight in weights]
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


ATTACKS: dict[str, Callable[..., AbstractContextManager[list[nn.Parameter]]]] = {
    "inversion": learned_row,
    "relearning": every_weight,
}
Images = dict[tuple[str, str], Tensor]  # (attack, label) -> bytes (N, C, S, S) that it learns from


def attack_images(
    config: LabelEvaluationConfig,
    data: LabelledDataConfig,
    pipeline: ClassConditionalDDPMPipeline,
    forgotten: Sequence[str],
) -> Images:
    """What the chosen attacks learn from, of the evaluation split; call it before any long work.

    Raises:
        ValueError: a label with fewer images than an attack wants, or a new row that is to start as no label's.
    """
    start = config.inversion.initial_label
    if start is not None and start not in pipeline.labels:
        raise ValueError(
            f"inversion.initial_label {start!r} is no label of the pipeline: {', '.join(pipeline.labels)}"
        )
    found: Images = {}
    if config.attacks:
        rows = load_rows(data, pipeline, split=config.split)
        for name, label in product(config.attacks, forgotten):
            budget = config.budget_of(name)
            mine = rows[rows.rows_of(label)]
            budget.require(mine, f"{label} in split {config.split!r}")
            generator = torch.Generator().manual_seed(budget.seed)
            found[name, label] = draw(
                mine, [rows.index_of(label)], limit=budget.num_images, generator=generator
            ).images
    return found


def attack(
    name: str,
    pipeline: ClassConditionalDDPMPipeline,
    label: str,
    images: Tensor,
    budget: LearningBudget,
    labels: Sequence[str],
    sampling: SamplingConfig,
) -> np.ndarray:
    """Byte images (N, S, S, C) of the labels (N) under an attack that learns from `images`.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    number = pipeline.labels.index(label)

    def condition(rows: Tensor) -> Condition:
        return {LABELS: torch.full_like(rows, number)}

    with frozen(pipeline), ATTACKS[name](pipeline, number, budget) as trained:
        denoiser = LabelDenoiser(pipeline)
        learn(denoiser, images, condition=condition, parameters=trained, budget=budget, desc=f"{name} of {label}")
        return generate(pipeline, labels, sampling=sampling, desc=f"images after {name}")


def run_attacks(
    pipeline: ClassConditionalDDPMPipeline,
    config: LabelEvaluationConfig,
    images: Images,
    judge: Judge,
    asked: EvaluationLabels,
    plain: np.ndarray,
    output: Path,
) -> dict[str, Any]:
    """Run the chosen attacks on every forgotten label, each on the pipeline as it is; print and draw what came of it.

    Args:
        images: of `attack_images`.
        plain: byte images (N, S, S, C) of these labels, without an attack.
        output: folder that gets the picture.

    Returns:
        attacks: per attack and label, shares of images recognised as the label before and after, and the budget.
        seconds_attacks: attack -> seconds.

    Raises:
        FloatingPointError: an attack's loss that is not finite.
    """
    rows_by_label = {label: rows_of(asked.labels, label) for label in asked.forgotten}
    shown = {label: as_rgb(plain[rows]) for label, rows in rows_by_label.items()}
    attacked: dict[str, np.ndarray] = {}
    results: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    for name in config.attacks:
        budget, start = config.budget_of(name), time.perf_counter()
        for label, rows in rows_by_label.items():
            learned_from = images[name, label]
            sampling = replace(config.sampling, seed=config.sampling.seed + rows.start)
            made = attack(
                name,
                pipeline,
                label=label,
                images=learned_from,
                budget=budget,
                labels=asked.labels[rows],
                sampling=sampling,
            )
            attacked[f"{name}: {label}"] = as_rgb(made)
            results.append(
                attack_record(
                    name,
                    label,
                    plain=judge.shows(plain[rows], label),
                    attacked=judge.shows(made, label),
                    budget=budget,
                    num_images=len(learned_from),
                )
            )
        seconds[name] = round(time.perf_counter() - start, 2)
    print_attacks(results, seconds)
    attacks_picture(shown, attacked, path=output / PICTURE_NAME, columns=min(12, config.images_per_label))
    return {"attacks": results, "seconds_attacks": seconds}
