"""Attacks on a class-conditional DDPM: can a forgotten label be brought back from a few images of it?

Shapes: N images, C channels, S image side, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from barrier_diffusers.evaluation.attack_gap import attack_gap
from barrier_diffusers.evaluation.attacks.base import LearningBudget, Mark
from barrier_diffusers.evaluation.attacks.cells import CellResult, seen_by
from barrier_diffusers.evaluation.attacks.running import (
    CONTROL,
    ERASED,
    AttackResults,
    attack_record,
    rows_of,
    seen_record,
)
from barrier_diffusers.evaluation.judge import Judge, as_rgb
from barrier_diffusers.evaluation.judged_model import PICTURE_NAME, require_alike, require_another
from barrier_diffusers.evaluation.pictures import attacks_picture
from barrier_diffusers.evaluation.tables import print_attacks, print_gaps
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.learned_tokens import LearnedTokens
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import every_weight, frozen, learn
from ddpm_ext.diffusion import LABELS, LabelDenoiser, draw
from ddpm_ext.loading import load_pipeline, load_rows
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


def whole_network(
    pipeline: ClassConditionalDDPMPipeline, label: int, budget: FineTuningConfig
) -> AbstractContextManager[list[nn.Parameter]]:
    """What relearning trains: all weights of the UNet; they come back."""
    return every_weight(pipeline.unet)


ATTACKS: dict[str, Callable[..., AbstractContextManager[list[nn.Parameter]]]] = {
    "inversion": learned_row,
    "relearning": whole_network,
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
    load_control(config, pipeline)
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


def load_control(
    config: LabelEvaluationConfig, pipeline: ClassConditionalDDPMPipeline
) -> ClassConditionalDDPMPipeline | None:
    """The pipeline that never saw the labels; None if none is named.

    Raises:
        ValueError: it has other labels than what is judged, or its weights.
    """
    if config.control is None:
        return None
    control = load_pipeline(config.control)
    if control.labels != pipeline.labels:
        raise ValueError(f"evaluation.control {config.control!r} has other labels than the pipeline that is judged")
    require_another("control", config.control, judged=module_hashes(pipeline), named=module_hashes(control))
    require_alike(config.control, judged=pipeline.unet, control=control.unet)
    return control


def attack(
    name: str,
    pipeline: ClassConditionalDDPMPipeline,
    label: str,
    images: Tensor,
    budget: LearningBudget,
    labels: Sequence[str],
    sampling: SamplingConfig,
) -> np.ndarray:
    """Byte images (N, S, S, C) of the labels (N) under an attack that learns from `images`, at its end.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    marks = attack_marks(name, pipeline, label, images=images, budget=budget, labels=labels, sampling=sampling)
    return marks[-1].images_NHWC


def attack_marks(
    name: str,
    pipeline: ClassConditionalDDPMPipeline,
    label: str,
    images: Tensor,
    budget: LearningBudget,
    labels: Sequence[str],
    sampling: SamplingConfig,
) -> list[Mark]:
    """Byte images (N, S, S, C) of the labels (N) at the marks of an attack that learns from `images`, and at its end.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    marks: list[Mark] = []

    def look(num_steps: int) -> None:
        marks.append(Mark(num_steps, generate(pipeline, labels, sampling=sampling, desc=f"images after {name}")))

    def after_step(num_steps: int) -> None:
        if num_steps in budget.marks and num_steps < budget.num_steps:
            look(num_steps)

    number = pipeline.labels.index(label)

    def condition(rows: Tensor) -> Condition:
        return {LABELS: torch.full_like(rows, number)}

    with frozen(pipeline), ATTACKS[name](pipeline, number, budget) as trained:
        denoiser = LabelDenoiser(pipeline)
        learn(
            denoiser,
            images,
            condition=condition,
            parameters=trained,
            budget=budget,
            desc=f"{name} of {label}",
            after_step=after_step,
        )
        look(budget.num_steps)
    return marks


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
        seconds_attacks: attack -> seconds, of the pipeline that is judged.
        control_attacks, attack_gaps: with a control, the same of it, and how far apart the two are.

    Raises:
        FloatingPointError: an attack's loss that is not finite.
    """
    judged = attack_model(ERASED, pipeline, config, images=images, judge=judge, asked=asked, plain=plain)
    print_attacks(judged.records, judged.seconds)
    shown = {label: as_rgb(plain[rows_of(asked.labels, label)]) for label in asked.forgotten}
    attacks_picture(shown, judged.images, path=output / PICTURE_NAME, columns=min(12, config.images_per_label))
    found: dict[str, Any] = {"attacks": judged.records, "seconds_attacks": judged.seconds}
    control = load_control(config, pipeline)
    if control is not None:
        control = control.to(pipeline.device)
        made = generate(control, asked.labels, sampling=config.sampling, desc="images of the control")
        other = attack_model(CONTROL, control, config, images=images, judge=judge, asked=asked, plain=made)
        gaps = [
            {"attack": name, "concept": label, **attack_gap(results, other.results[name, label], 0.0, 0.0)}
            for (name, label), results in judged.results.items()
        ]
        print_gaps(gaps)
        found |= {"control_attacks": other.records, "attack_gaps": gaps}
    return found


@dataclass
class AttackedModel:
    """What the attacks brought out of one pipeline."""

    records: list[dict[str, Any]] = field(default_factory=list)
    results: dict[tuple[str, str], AttackResults] = field(default_factory=dict)  # by attack and label
    seconds: dict[str, float] = field(default_factory=dict)  # by attack
    images: dict[str, np.ndarray] = field(default_factory=dict)  # "attack: label" -> bytes (N, H, W, 3), at the end


def attack_model(
    model: str,
    pipeline: ClassConditionalDDPMPipeline,
    config: LabelEvaluationConfig,
    images: Images,
    judge: Judge,
    asked: EvaluationLabels,
    plain: np.ndarray,
) -> AttackedModel:
    """Run the chosen attacks on every forgotten label of one pipeline; see `run_attacks`."""
    found = AttackedModel()
    for name in config.attacks:
        budget, start = config.budget_of(name), time.perf_counter()
        for label in asked.forgotten:
            learned_from, rows = images[name, label], rows_of(asked.labels, label)
            sampling = replace(config.sampling, seed=config.sampling.seed + rows.start)
            marks = attack_marks(
                name,
                pipeline,
                label=label,
                images=learned_from,
                budget=budget,
                labels=asked.labels[rows],
                sampling=sampling,
            )
            seen = [seen_by(judge, mark.images_NHWC, label, num_steps=mark.num_steps) for mark in marks]
            cell = CellResult(model, name, label, "as set", asdict(budget), 0.0, marks=seen)
            record = attack_record(
                name,
                label,
                plain=judge.shows(plain[rows], label),
                attacked=seen[-1].shown,
                budget=budget,
                num_images=len(learned_from),
            )
            if len(marks) > 1:
                record["curve"] = {str(mark.num_steps): seen_record(mark) for mark in seen}
            found.records.append(record)
            found.results[name, label] = AttackResults([cell], [])
            found.images[f"{name}: {label}"] = as_rgb(marks[-1].images_NHWC)
        found.seconds[name] = round(time.perf_counter() - start, 2)
    return found
