"""Run attacks: how often the judge recognises the forgotten concept before and after each.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.data.readers import split_concepts
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.attacks.base import ATTACKS, Budget, Forgotten
from barrier_diffusers.evaluation.erasure import EvaluationPrompts, ImageEvaluationConfig
from barrier_diffusers.evaluation.evaluation_split import image_text, load_rows, retained_rows
from barrier_diffusers.evaluation.judge import Judge


def rows_of(labels: Sequence[str], concept: str) -> slice:
    """Where a concept stands among the labels of all questions: its questions follow one another."""
    first = labels.index(concept)
    return slice(first, first + labels.count(concept))


def outcome(
    attack: str, concept: str, shown: tuple[Sequence[bool], Sequence[bool]], budget: Budget, num_training_images: int
) -> dict[str, Any]:
    """The record of one attack; `shown` says which images show the concept, without and under the attack."""
    return {
        "attack": attack,
        "concept": concept,
        "pre_attack": share(shown[0]),
        "post_attack": share(shown[1]),
        "budget": asdict(budget),
        "num_training_images": num_training_images,
    }


def forgotten_concepts(
    evaluation: ImageEvaluationConfig,
    config: ConceptConfig,
    questions: EvaluationPrompts,
    erased: Sequence[ErasedConcepts],
    resolution: int,
) -> list[Forgotten]:
    """What an attacker knows of each concept: its questions, and the images of the evaluation split.

    What was `erased` before, beside the concepts, is left out of the images of other things.

    Raises:
        ValueError: a split or column that does not exist, or a concept without a row.
    """
    loaded = load_rows(config, evaluation.split)
    others = image_text(retained_rows(loaded, config, erased), config)
    found = []
    for concept in config.concepts:
        mine, _ = split_concepts(loaded, config.concept_column, [concept])
        rows = rows_of(questions.labels, concept)
        sampling = replace(evaluation.sampling, seed=evaluation.sampling.seed + rows.start)
        found.append(
            Forgotten(concept, questions.prompts[rows], image_text(mine, config), others, sampling, resolution)
        )
    return found


def run_attacks(
    pipeline: Any,
    forgotten: Sequence[Forgotten],
    budgets: Mapping[str, Budget],
    judge: Judge,
    plain: Mapping[str, np.ndarray],
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, np.ndarray]]:
    """Run every attack on every concept, each on the pipeline as it is.

    Args:
        budgets: name of the attack -> what it may spend.
        plain: concept -> images (N, H, W, 3) of its plain prompts.

    Returns:
        (per attack and concept: shares of images recognised as the concept before and after, the budget, the prompts;
        attack -> seconds; "attack: concept" -> images (N, H, W, 3)).
    """
    results: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}
    images: dict[str, np.ndarray] = {}
    for name, budget in budgets.items():
        start = time.perf_counter()
        for entry in forgotten:
            attempt, concept = ATTACKS.find(name).run(pipeline, entry, budget), entry.concept
            images[f"{name}: {concept}"] = made = attempt.images_NHWC
            shown = (judge.shows(plain[concept], concept), judge.shows(made, concept))
            results.append(
                {
                    **outcome(name, concept, shown, budget, attempt.num_training_images),
                    "prompts": list(dict.fromkeys(attempt.prompts)),
                    **attempt.found,
                }
            )
        seconds[name] = round(time.perf_counter() - start, 2)
    return results, seconds, images
