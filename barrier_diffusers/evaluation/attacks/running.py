"""Run attacks: how often the judge recognises the forgotten concept before and after each.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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


@dataclass
class AttackResults:
    """What a number of attacks brought back."""

    records: list[dict[str, Any]] = field(default_factory=list)  # of `attack_record`, per attack and concept
    seconds: dict[str, float] = field(default_factory=dict)  # by attack
    images: dict[str, np.ndarray] = field(default_factory=dict)  # "attack: concept" -> bytes (N, H, W, 3)


def rows_of(labels: Sequence[str], concept: str) -> slice:
    """Where a concept's rows are among the labels of all evaluation prompts; they follow one another."""
    first = labels.index(concept)
    return slice(first, first + labels.count(concept))


def attack_record(
    attack: str, concept: str, *, plain: Sequence[bool], attacked: Sequence[bool], budget: Budget, num_images: int
) -> dict[str, Any]:
    """The record of one attack on one concept.

    Args:
        plain, attacked: which images show the concept, of the plain prompts and under the attack.
        num_images: that the attack learned from.
    """
    return {
        "attack": attack,
        "concept": concept,
        "pre_attack": share(plain),
        "post_attack": share(attacked),
        "budget": asdict(budget),
        "num_training_images": num_images,
    }


def forgotten_concepts(
    evaluation: ImageEvaluationConfig,
    config: ConceptConfig,
    asked: EvaluationPrompts,
    erased: Sequence[ErasedConcepts],
    resolution: int,
) -> list[Forgotten]:
    """What an attacker knows of each concept: its prompts, and the images of the evaluation split.

    What was `erased` before, beside the concepts, is left out of the images of other things.

    Raises:
        ValueError: a split or column that does not exist, or a concept without a row.
    """
    loaded = load_rows(config, evaluation.split)
    others = image_text(retained_rows(loaded, config, erased=erased), config)
    found = []
    for concept in config.concepts:
        mine, _ = split_concepts(loaded, config.concept_column, concepts=[concept])
        rows = rows_of(asked.labels, concept)
        found.append(
            Forgotten(
                concept,
                prompts=asked.prompts[rows],
                images=image_text(mine, config),
                others=others,
                sampling=replace(evaluation.sampling, seed=evaluation.sampling.seed + rows.start),
                resolution=resolution,
            )
        )
    return found


def run_attacks(
    pipeline: Any,
    forgotten: Sequence[Forgotten],
    budgets: Mapping[str, Budget],
    judge: Judge,
    plain: Mapping[str, np.ndarray],
) -> AttackResults:
    """Run every attack on every concept, each on the pipeline as it is.

    Args:
        budgets: name of the attack -> what it may spend.
        plain: concept -> images (N, H, W, 3) of its plain prompts.
    """
    results = AttackResults()
    for name, budget in budgets.items():
        start = time.perf_counter()
        for known in forgotten:
            concept = known.concept
            attempt = ATTACKS.find(name).run(pipeline, known, budget)
            record = attack_record(
                name,
                concept,
                plain=judge.shows(plain[concept], concept),
                attacked=judge.shows(attempt.images_NHWC, concept),
                budget=budget,
                num_images=attempt.num_training_images,
            )
            results.images[f"{name}: {concept}"] = attempt.images_NHWC
            results.records.append({**record, "prompts": list(dict.fromkeys(attempt.prompts)), **attempt.found})
        results.seconds[name] = round(time.perf_counter() - start, 2)
    return results
