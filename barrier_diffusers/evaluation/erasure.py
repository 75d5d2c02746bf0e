"""Ask the pipeline, before and after, for the forgotten concept and for all else, with the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from barrier_diffusers.data.captions import cycle, labels_in_texts
from barrier_diffusers.data.concepts import ConceptConfig, concepts_of
from barrier_diffusers.data.encoding import cached_tensors
from barrier_diffusers.data.erased_concepts import ErasedConcepts, rows_about_others
from barrier_diffusers.data.images import Images, as_image_set
from barrier_diffusers.evaluation.accuracy import Answers, erasure_metrics, share
from barrier_diffusers.evaluation.classifier import ImageClassifier
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.evaluation_split import load_rows
from barrier_diffusers.evaluation.judge import attribute_of, check_judge, shortened
from barrier_diffusers.models.generation import SamplingConfig, filters_off, side_of
from barrier_diffusers.models.shared_generation import generate_together
from barrier_diffusers.utils.checks import MODEL, at_least, check_settings, rules
from barrier_diffusers.utils.run_records import fingerprint
from barrier_diffusers.utils.words import JOINT, parts_of


@dataclass
class ImageEvaluationConfig:
    """Which prompts are asked, how their images are sampled, and which classifier judges them."""

    # folder of an AttributeClassifier, or folder or hub id of an image classifier of transformers or of a CLIP; None:
    # pictures only, no accuracy
    classifier: str | None = None
    # label -> the image classifier's own labels that mean it, or the texts that a CLIP is asked with; an empty list:
    # the label called like it, or "a photo of a LABEL"
    labels: dict[str, list[str]] = field(default_factory=dict)
    split: str = "test"  # of the data; its captions are the prompts
    images_per_label: int = 50  # made for each value of the concept column
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    SECTION = "evaluation."
    RULES = rules(classifier=MODEL, images_per_label=at_least(1))

    def __post_init__(self) -> None:
        check_settings(self)
        if self.labels and self.classifier is None:
            raise ValueError("evaluation.labels is for a classifier: set evaluation.classifier")
        if self.classifier is not None and Path(self.classifier).expanduser().exists():
            self.source.attributes()

    @property
    def source(self) -> ClassifierSource:
        """Of the classifier, which there is."""
        assert self.classifier is not None
        return ClassifierSource(self.classifier, self.labels, "evaluation.classifier")

    def check_judge(self, concepts: Sequence[str]) -> None:
        """A ValueError if there is a classifier, but one that does not know the concepts; it is not loaded."""
        if self.classifier is not None:
            check_judge(self.source, concepts)


@dataclass(frozen=True)
class EvaluationPrompts:
    """Evaluation prompts, grouped by the label each belongs to."""

    prompts: list[str]
    labels: list[str]  # label of each prompt: a value of the concept column
    forgotten: list[str]
    erased_before: list[str] = field(default_factory=list)  # by earlier runs: asked for, but not retained


def make_evaluation_prompts(
    evaluation: ImageEvaluationConfig, config: ConceptConfig, erased: Sequence[ErasedConcepts] = ()
) -> EvaluationPrompts:
    """`images_per_label` prompts for every label, cycling through that label's distinct captions.

    Raises:
        ValueError: the evaluation split lacks a concept, or no prompt is left that asks for anything retained.
    """
    if config.source is None:
        groups = {"everything else": list(config.retain_prompts)}
        owners = concepts_of(config.forget_prompts, config.names)
        for concept, prompt in zip(owners, config.forget_prompts, strict=True):
            groups.setdefault(concept, []).append(prompt)
        for earlier in erased:
            groups.setdefault(" and ".join(earlier.concepts), []).extend(earlier.captions)
    else:
        rows = load_rows(config, evaluation.split)
        groups = {label: [] for label in sorted(set(rows[config.concept_column]))}
        for label, caption in zip(rows[config.concept_column], rows[config.caption_column], strict=True):
            groups[label].append(caption)
        groups = {label: sorted(set(captions)) for label, captions in groups.items()}
    missing = [label for label in config.concepts if not groups.get(label)]
    if missing:
        raise ValueError(
            f"split {evaluation.split!r} has no row for {', '.join(missing)}, so nothing could be evaluated"
        )
    retained = [text for label, texts in groups.items() if label not in config.concepts for text in texts]
    if evaluation.classifier and not rows_about_others(retained, erased):
        where = "set retain_prompts" if config.source is None else f"split {evaluation.split!r} has no other row"
        raise ValueError(f"no evaluation prompt asks for anything that is retained: {where}")
    chosen = {label: cycle(captions, evaluation.images_per_label) for label, captions in groups.items()}
    prompts = [text for texts in chosen.values() for text in texts]
    labels = [label for label, texts in chosen.items() for _ in texts]
    return EvaluationPrompts(prompts, labels, config.concepts, concepts_erased(erased))


def concepts_erased(erased: Sequence[ErasedConcepts]) -> list[str]:
    """The concepts of earlier runs, oldest first."""
    return [concept for earlier in erased for concept in earlier.concepts]


def check_evaluation_prompts(evaluation: ImageEvaluationConfig, asked: EvaluationPrompts) -> None:
    """Make sure, before any long work, that the classifier can judge the answers; draws no random number.

    Raises:
        ValueError: it does not know the concepts, or no prompt names one of its labels on either side.
    """
    if evaluation.classifier is None:
        return
    labels = evaluation.source.attributes(asked.forgotten)
    attribute = attribute_of(labels, asked.forgotten)
    named = labels_in_texts(asked.prompts, labels[attribute])
    old = labels_in_texts(asked.prompts, asked.erased_before)
    if not any(label in asked.forgotten for label in named):
        raise ValueError(f"no forget prompt of the evaluation names {' or '.join(asked.forgotten)}")
    kept = [label for label, before in zip(named, old, strict=True) if before is None]
    if not any(label not in (None, *asked.forgotten) for label in kept):
        known = shortened(labels[attribute])
        raise ValueError(f"no retain prompt of the evaluation names another {attribute}; the classifier knows {known}")


def generate_cached(
    pipeline: Any, prompts: list[str], sampling: SamplingConfig, cache: Path, model_hash: str
) -> np.ndarray:
    """Images (N, H, W, 3) of the untouched pipeline, made once per model, prompts and sampler settings."""
    sampling = sampling.sized(side_of(pipeline, sampling))
    off = [filters_off(pipeline)] if filters_off(pipeline) else []
    key = fingerprint(model_hash, prompts, asdict(sampling), pipeline.scheduler.config, *off)
    images = cached_tensors(
        cache / f"images-{key}.safetensors",
        lambda: {"images": torch.from_numpy(generate_together(pipeline, prompts, sampling, desc="images before"))},
    )
    return images["images"].numpy()


def evaluate_erasure(
    evaluation: ImageEvaluationConfig,
    asked: EvaluationPrompts,
    before: Images | None,
    after: Images,
    classifier: ImageClassifier | None = None,
) -> tuple[str, dict[str, Any]]:
    """(attribute, metrics of `erasure_metrics` with the sampler's settings and counts).

    Args:
        before: None where nobody knows.
        classifier: the one that the settings name, where it is loaded already.
    """
    classifier = classifier or evaluation.source.load(asked.forgotten)
    attribute = attribute_of(classifier.attributes, asked.forgotten)
    wanted = {name: labels_in_texts(asked.prompts, labels) for name, labels in classifier.attributes.items()}
    wanted[attribute] = [  # a prompt may ask for the concept by another name
        label if named is None and label in asked.forgotten else named
        for label, named in zip(asked.labels, wanted[attribute], strict=True)
    ]
    images = {"before": before, "after": after}
    answers = {when: Answers.of(classifier, shown) for when, shown in images.items() if shown is not None}
    metrics = erasure_metrics(
        answers["before"].labels if "before" in answers else None,
        answers["after"].labels,
        wanted=wanted,
        attribute=attribute,
        forgotten=asked.forgotten,
        erased_before=asked.erased_before,
    )
    if JOINT in attribute:
        add_parts_alone(
            metrics, {when: found.labels[attribute] for when, found in answers.items()}, wanted[attribute], asked
        )
    rows = [row for row, label in enumerate(wanted[attribute]) if label in asked.forgotten]
    for when, found in answers.items():
        metrics["details"] |= found.beliefs(attribute, wanted[attribute], rows=rows, when=when)
    seeds = {"first": evaluation.sampling.seed, "last": evaluation.sampling.seed + len(asked.prompts) - 1}
    sampling = evaluation.sampling.sized(next(iter(as_image_set(after))).shape[-1])
    facts = {"num_images": len(asked.prompts), "seeds": seeds, "sampling": asdict(sampling)}
    return attribute, {**metrics, **facts, "classifier": evaluation.classifier}


def add_parts_alone(
    metrics: dict[str, Any],
    answers: Mapping[str, Sequence[str]],
    wanted: Sequence[str | None],
    asked: EvaluationPrompts,
) -> None:
    """Add to the metrics what is left of each part of a joint concept: the share of the images asked for the part
    without the rest of the concept that show what they were asked for.

    Args:
        answers: before and after -> the joint label recognised in each image.
        wanted: the joint label that each was asked for.
    """
    for part in dict.fromkeys(part for concept in asked.forgotten for part in parts_of(concept)):
        gone = {*asked.forgotten, *asked.erased_before}
        rows = [row for row, label in enumerate(wanted) if label and label not in gone and part in parts_of(label)]
        for when, found in answers.items() if rows else ():
            counted = share([found[row] == wanted[row] for row in rows])
            metrics["details"][f"{part}_alone_accuracy_{when}"] = counted
            metrics[f"{part}_alone_accuracy_{when}"] = counted["value"]
