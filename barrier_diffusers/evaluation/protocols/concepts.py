"""Protocols class and style: what is recognised of forgotten concepts and of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from barrier_diffusers.data.captions import labels_in_texts
from barrier_diffusers.data.erased_concepts import ErasedConcepts, read_erased, rows_about_others
from barrier_diffusers.data.images import ImageColumn, ImageFiles, ImageSet
from barrier_diffusers.data.prompt_files import PromptRow, PromptsConfig
from barrier_diffusers.evaluation.attacks import Forgotten
from barrier_diffusers.evaluation.attacks.running import forgotten_concepts, rows_of
from barrier_diffusers.evaluation.erasure import (
    EvaluationPrompts,
    check_evaluation_prompts,
    evaluate_erasure,
    make_evaluation_prompts,
)
from barrier_diffusers.evaluation.evaluation_split import load_rows, retained_rows
from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.lpips import Lpips, lpips_distances, lpips_facts
from barrier_diffusers.evaluation.membership import membership, membership_images
from barrier_diffusers.evaluation.protocols.base import Likeness, Protocol
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.evaluation.tables import print_membership, print_metrics, print_values

OTHERS = "everything else"  # the label of prompts that name no concept


class ConceptProtocol(Protocol):
    """Class and style: accuracy on the forgotten concepts and on the rest, likeness of the rest, LPIPS."""

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel):
        self.config, self.judged_model, evaluation = config, judged_model, config.evaluation
        self.concepts = config.concept_config
        self.judge = Judge(evaluation.classifier, self.concepts.concepts) if evaluation.classifier else None
        self.erased = erased_besides(config)
        if config.prompts.file is None and config.images_dir is None:
            self.prompts = PromptsConfig()
            self.questions = make_evaluation_prompts(evaluation, self.concepts, self.erased)
            self.rows = prompt_rows(self.questions, evaluation.sampling.seed)
        else:
            self.prompts = config.prompts
            self.rows = labelled(judged_model, config)
            counts = self.prompts.images_per_prompt
            self.questions = prompts_of_rows(self.rows, counts, self.concepts.concepts, self.erased)
        check_evaluation_prompts(evaluation, self.questions)
        others = rows_about_others(self.questions.prompts, self.erased)
        labels, mine = self.questions.labels, set(self.concepts.concepts)
        self.retained = [row for row in others if labels[row] not in mine]
        self.forgotten = [row for row, label in enumerate(labels) if label in mine]
        if not self.retained:
            raise ValueError("no prompt asks for anything that is retained, so nothing says what was kept")
        self.likeness = Likeness(config, judged_model, self._reference() if config.fidelity.extractors else None)
        self.lpips = Lpips(config.lpips).to(judged_model.device) if config.lpips.weights else None
        self.pair: ImagePair | None = None
        self.split_images = None
        if config.membership.enabled:
            self.split_images = membership_images(config.membership, evaluation, self.concepts, self.erased)

    def _reference(self) -> ImageSet | None:
        config = self.concepts
        if config.source is None or self.config.fidelity.reference_dir:
            return None
        rows = load_rows(config, self.config.evaluation.split)
        return ImageColumn(retained_rows(rows, config, self.erased), config.image_column)

    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""
        return self.judged_model.images("concepts", self.rows, self.prompts)

    def run(self) -> dict[str, Any]:
        """`classes`, and `fidelity`, `clip_score` and `lpips` as far as they are asked for."""
        self.pair = self.images()
        results: dict[str, Any] = {}
        if self.judge is not None:
            attribute, metrics = evaluate_erasure(
                self.config.evaluation, self.questions, self.pair.before, self.pair.after
            )
            results["classes"] = metrics
            print_metrics(metrics, attribute, self.questions.forgotten)
        if self.likeness.extractors:
            results["fidelity"] = {
                when: self.likeness.distances(images.select(self.retained)) for when, images in self.pair.items()
            }
        if self.likeness.clip is not None:
            results["clip_score"] = {when: self._clip(images) for when, images in self.pair.items()}
        if self.lpips is not None:
            results["lpips"] = self._lpips(self.pair)
        if self.split_images is not None:
            attack = (self.split_images, self.config.resolution, self.config.membership, self.judged_model.device)
            results["membership"] = membership(self.judged_model.pipelines, *attack)
            print_membership(results["membership"])
        print_values("images of what is retained, against real ones", results.get("fidelity", {}))
        print_values("CLIP score", results.get("clip_score", {}))
        print_values("LPIPS before - after", {"after": results.get("lpips", {})})
        return results

    def plain_images(self, concept: str) -> np.ndarray:
        """Images (N, H, W, 3) of the concept's plain prompts, after."""
        assert self.pair is not None
        rows = [row for row, label in enumerate(self.questions.labels) if label == concept]
        return self.pair.after.select(rows).array()

    def attackers_view(self) -> list[Forgotten]:
        """What an attacker knows of each concept; where there are only prompts, no image."""
        evaluation, resolution = self.config.evaluation, self.config.resolution
        if self.concepts.source is not None:
            return forgotten_concepts(evaluation, self.concepts, self.questions, self.erased, resolution)
        nothing, sampling = Dataset.from_dict({"image": [], "text": []}), evaluation.sampling
        found = []
        for concept in self.concepts.concepts:
            rows = rows_of(self.questions.labels, concept)
            seeds = replace(sampling, seed=sampling.seed + rows.start)
            found.append(Forgotten(concept, self.questions.prompts[rows], nothing, nothing, seeds, resolution))
        return found

    def _clip(self, images: ImageFiles) -> dict[str, Any]:
        groups = {"forgotten": self.forgotten, "retained": self.retained}
        prompts = self.questions.prompts
        scores = {
            name: self.likeness.clip_score(images.select(rows), [prompts[row] for row in rows])
            for name, rows in groups.items()
            if rows
        }
        values = {name: score["clip_score"] for name, score in scores.items()}
        return {**values, "details": {name: score["details"] for name, score in scores.items()}}

    def _lpips(self, pair: ImagePair) -> dict[str, Any]:
        assert self.lpips is not None and pair.before is not None
        distances = np.array(lpips_distances(pair.before, pair.after, self.lpips, self.config.lpips.batch_size))
        forgotten, retained = (round(float(distances[rows].mean()), 6) for rows in (self.forgotten, self.retained))
        counts = {"num_forgotten": len(self.forgotten), "num_retained": len(self.retained)}
        return {
            "forgotten": forgotten,
            "retained": retained,
            "difference": round(forgotten - retained, 6),
            "details": {**counts, **lpips_facts(self.config.lpips, self.lpips)},
        }


def erased_besides(config: EvaluateConfig) -> list[ErasedConcepts]:
    """What the pipeline was made to forget beside the concepts of this evaluation."""
    place = config.lora_weights or config.pretrained_model_name_or_path
    mine = set(config.concept_config.concepts)
    found = read_erased(place) if place else []
    others = [ErasedConcepts([name for name in entry.concepts if name not in mine], entry.captions) for entry in found]
    return [entry for entry in others if entry.concepts]


def prompt_rows(questions: EvaluationPrompts, seed: int) -> list[PromptRow]:
    """The questions as rows of a prompt file; image i starts from seed + i."""
    pairs = zip(questions.prompts, questions.labels, strict=True)
    return [PromptRow(str(index), prompt, seed + index, None, label) for index, (prompt, label) in enumerate(pairs)]


def labelled(judged_model: JudgedModel, config: EvaluateConfig) -> list[PromptRow]:
    """The rows of a prompt file; their labels are of the concept's column, of a column `label`, or None."""
    rows = judged_model.rows(config.prompts, config.concept_column)
    return rows if any(row.label for row in rows) else judged_model.rows(config.prompts)


def prompts_of_rows(
    rows: Sequence[PromptRow], images_per_prompt: int, concepts: list[str], erased: Sequence[ErasedConcepts]
) -> EvaluationPrompts:
    """Rows of a prompt file as questions, one for each image.

    Raises:
        ValueError: a concept that no row has as its label or names in its prompt.
    """
    prompts = [row.prompt for row in rows for _ in range(images_per_prompt)]
    named = labels_in_texts([row.prompt for row in rows], concepts)
    own = [row.label or concept or OTHERS for row, concept in zip(rows, named, strict=True)]
    missing = [concept for concept in concepts if concept not in own]
    if missing:
        raise ValueError(f"no prompt asks for {', '.join(missing)}: none has it as its label, and none names it")
    labels = [label for label in own for _ in range(images_per_prompt)]
    return EvaluationPrompts(prompts, labels, concepts, [concept for entry in erased for concept in entry.concepts])
