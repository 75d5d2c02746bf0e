"""Attacks on a class-conditional DDPM: can a forgotten label be brought back from a few images of it?

Shapes: N images, C channels, S image side, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL.Image import fromarray
from torch import Tensor, nn

from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.data.readers import rows_hash
from barrier_diffusers.evaluation.accuracy import erasure_metrics
from barrier_diffusers.evaluation.attacked import CURVES_NAME, Plain, attack_models, check_budgets
from barrier_diffusers.evaluation.attacks.base import Attempt, Forgotten, LearningBudget, Mark, Marks, Run
from barrier_diffusers.evaluation.attacks.cells import PICTURE_COLUMNS, CellRunner, Scene, evenly
from barrier_diffusers.evaluation.attacks.running import CONTROL, ERASED, rows_of
from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.judged_model import PICTURE_NAME, require_alike, require_another
from barrier_diffusers.evaluation.pictures import attacks_picture
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import LearnedTokens
from barrier_diffusers.models.loading import module_hashes
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.training.learning import every_weight, frozen, learn
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import fingerprint, module_hash
from ddpm_ext.diffusion import LABELS, LabelDenoiser
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


TRAINED: dict[str, Callable[..., AbstractContextManager[list[nn.Parameter]]]] = {
    "inversion": learned_row,
    "relearning": whole_network,
}


def attack(name: str, pipeline: ClassConditionalDDPMPipeline, forgotten: Forgotten, budget: LearningBudget) -> Attempt:
    """Train what the attack of this name trains, on the budget's images of the label, ask for it, take it back.

    Raises:
        FloatingPointError: a loss that is not finite, before the first mark.
    """
    images = budget.choose(forgotten.images)
    pixels_NCSS, number = as_bytes(images), pipeline.labels.index(forgotten.concept)
    ask = partial(generate, pipeline, sampling=forgotten.sampling, desc=f"images after {name}")
    changes_weights = name == "relearning"

    def draw(num_steps: int) -> Mark:
        others = forgotten.retain_prompts if changes_weights else []
        return Mark(num_steps, ask(forgotten.prompts), ask(others) if others else None)

    def condition(rows: Tensor) -> Condition:
        return {LABELS: torch.full_like(rows, number)}

    marks = Marks(budget, draw)
    with frozen(pipeline), TRAINED[name](pipeline, number, budget) as trained:
        failed = marks.train(
            lambda: learn(
                LabelDenoiser(pipeline),
                pixels_NCSS,
                condition=condition,
                parameters=trained,
                budget=budget,
                desc=f"{name} of {forgotten.concept}",
                after_step=marks,
            )
        )
    return Attempt(marks.drawn[-1].images_NHWC, forgotten.prompts, len(images), marks=marks.drawn, failed=failed)


def as_dataset(rows: LabelledImages) -> Dataset:
    """The same with columns image and text, the label's name."""
    pictures = [fromarray(image.permute(1, 2, 0).squeeze(2).numpy()) for image in rows.images]  # grey ones flat
    names = [rows.names[label] for label in rows.labels.tolist()]
    columns = {"image": pictures, "text": names}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))


def as_bytes(images: Dataset) -> Tensor:
    """Bytes (N, C, S, S) of a data set that `as_dataset` made."""
    pixels_NSSC = np.stack([np.atleast_3d(np.asarray(image)) for image in images["image"]])
    return torch.from_numpy(pixels_NSSC).permute(0, 3, 1, 2).contiguous()


def attackers_view(
    config: LabelEvaluationConfig,
    data: LabelledDataConfig,
    pipeline: ClassConditionalDDPMPipeline,
    asked: EvaluationLabels,
) -> list[Forgotten]:
    """What an attacker knows of each label, whose images are the evaluation split's; call it before any long work.

    A grid and a comparison with a control also look at what is retained, with up to half as many images.

    Raises:
        ValueError: what an attack cannot work with, too few images or no such label, or a control that is none.
    """
    control = load_control(config, pipeline)
    if not config.attacks:
        return []
    rows, found = load_rows(data, pipeline, split=config.split), []
    retained = [label for label in asked.labels if label not in asked.forgotten]
    half = max(1, config.images_per_label // 2) if config.attack_budget or config.control else 0
    others = [retained[place] for place in evenly(len(retained), half)]
    for label in asked.forgotten:
        place, sampling = rows_of(asked.labels, label), config.sampling
        found.append(
            Forgotten(
                label,
                prompts=asked.labels[place],
                images=as_dataset(rows[rows.rows_of(label)]),
                others=as_dataset(rows[[]]),
                sampling=replace(sampling, seed=sampling.seed + place.start),
                resolution=pipeline.resolution,
                retain_prompts=others,
                retain_labels=others,
            )
        )
    models = [pipeline, *([control] if control is not None else [])]
    check_budgets(config.budgets, config.attack_budget, models, found)
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


class LabelCellRunner(CellRunner):
    """Runs attacks on class-conditional DDPMs."""

    def load(self, model: str) -> ClassConditionalDDPMPipeline:
        """The pipeline of a model."""
        return load_pipeline(self.scene.models[model][0])

    def attack_of(self, name: str) -> Run:
        """What runs the attack of this name."""
        return partial(attack, name)


def run_attacks(
    folder: str,
    pipeline: ClassConditionalDDPMPipeline,
    config: LabelEvaluationConfig,
    forgotten: Sequence[Forgotten],
    judge: Judge,
    asked: EvaluationLabels,
    plain: np.ndarray,
    output: Path,
    cache: Path,
) -> dict[str, Any]:
    """Run the chosen attacks on every forgotten label, each on the pipeline as it is; print and draw what came of it.

    Args:
        folder: the pipeline's, which other processes load.
        forgotten: of `attackers_view`.
        plain: byte images (N, S, S, C) of the labels that are asked for, without an attack.
        output: folder that gets the picture, and the curves if there are some.
        cache: folder of what each attacker brought back: what is there is not tried again.

    Returns:
        attacks: per attack and label, shares of images recognised as the label before and after, and the budget.
        seconds_attacks: attack -> seconds.
        control, control_attacks, attack_gaps: with a control, the same of it, and how far apart the two are.

    Raises:
        FloatingPointError: without a grid, an attack's loss that is not finite.
    """
    pipelines = {ERASED: pipeline}
    models: dict[str, tuple[str, str | None, str | None]] = {ERASED: (folder, None, None)}
    drawn = {ERASED: plain_answers(judge, asked, plain)}
    control = load_control(config, pipeline)
    if control is not None:
        pipelines[CONTROL], models[CONTROL] = control.to(pipeline.device), (str(config.control), None, None)
        images = generate(control, asked.labels, sampling=config.sampling, desc="images of the control")
        drawn[CONTROL] = plain_answers(judge, asked, images)
    scene = Scene(
        models=models,
        hashes={model: fingerprint(module_hashes(one)) for model, one in pipelines.items()},
        forgotten=list(forgotten),
        classifier=judge.source,
        facts=[
            *(module_hash(judge.classifier), judge.attribute, judge.rendering),
            *(rows_hash(known.images, ["image", "text"]) for known in forgotten),
        ],
        cache=cache,
        first_failure_ends=config.attack_budget is None,
        attribute=judge.attribute,
        rendering=judge.rendering,
    )
    runner = LabelCellRunner(scene, str(pipeline.device), pipelines)
    attacked = attack_models(runner, config.budgets, config.attack_budget, drawn, workers=config.attack_workers)
    if attacked.has_curves:
        write_json(output / CURVES_NAME, attacked.curves)
    columns = min(PICTURE_COLUMNS, config.images_per_label)
    attacks_picture(attacked.plain, attacked.pictures, path=output / PICTURE_NAME, columns=columns)
    return {**attacked.metrics, "seconds_attacks": attacked.seconds}


def plain_answers(judge: Judge, asked: EvaluationLabels, images: np.ndarray) -> Plain:
    """What the judge says of images (N, S, S, C) of the labels that are asked for, and those of each forgotten one."""
    answers = {judge.attribute: judge.recognise(judge.probabilities(judge.render(images)))}
    wanted = {judge.attribute: asked.labels}
    numbers = erasure_metrics(None, answers, wanted=wanted, attribute=judge.attribute, forgotten=asked.forgotten)
    return Plain(numbers, {label: images[rows_of(asked.labels, label)] for label in asked.forgotten})
