"""Protocol "post-attack": how often the judge recognises the forgotten concept before and after each attack.

Shapes: N images, H height, W width.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from datasets import Dataset

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.data.readers import split_concepts
from barrier_diffusers.evaluation.accuracy import recognise, share
from barrier_diffusers.evaluation.attacks import Budget, Forgotten, get_attack
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.evaluation.erasure import (
    ImageEvaluationConfig,
    Questions,
    forgotten_attribute,
    image_text,
    load_rows,
    retained_rows,
)


class Judge:
    """Says which images show a concept.

    Args:
        folder: of a saved AttributeClassifier.
        concepts: labels of one of its attributes.

    Raises:
        ValueError: the classifier does not know the concepts.
    """

    def __init__(self, folder: str, concepts: Sequence[str]):
        self.classifier = AttributeClassifier.from_pretrained(folder)
        self.attribute = forgotten_attribute(self.classifier.attributes, concepts)

    def shows(self, images_NHWC: np.ndarray, concept: str) -> list[bool]:
        """Whether each byte image (N, H, W, 3) is recognised as the concept."""
        return [label == concept for label in recognise(self.classifier, images_NHWC)[self.attribute]]


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
    questions: Questions,
    erased: Sequence[ErasedConcepts],
    resolution: int,
) -> list[Forgotten]:
    """What an attacker knows of each concept: its questions, and the images of the evaluation split.

    What was `erased` before, beside the concepts, is left out of the images of other things.

    Raises:
        ValueError: a split or column that does not exist, or a concept without a row.
    """
    loaded = load_rows(evaluation, config)
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


def images_hash(images: Dataset) -> str:
    """SHA-256 over the pixels and captions of (image, text) rows."""
    digest = hashlib.sha256()
    for row in images:
        digest.update(row["text"].encode())
        digest.update(row["image"].convert("RGB").tobytes())
    return digest.hexdigest()


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
            attempt, concept = get_attack(name).run(pipeline, entry, budget), entry.concept
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
