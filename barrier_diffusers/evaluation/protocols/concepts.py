"""Protocols class and style: what is recognised of forgotten concepts and of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from barrier_diffusers.data.captions import labels_in_texts
from barrier_diffusers.data.erased_concepts import ErasedConcepts, read_erased, rows_about_others
from barrier_diffusers.data.images import ImageColumn, ImageFiles, ImageSet
from barrier_diffusers.data.prompt_files import PromptRow, PromptsConfig
from barrier_diffusers.evaluation.attacks.base import Forgotten
from barrier_diffusers.evaluation.attacks.cells import evenly
from barrier_diffusers.evaluation.attacks.running import forgotten_concepts, rows_of
from barrier_diffusers.evaluation.erasure import (
    EvaluationPrompts,
    check_evaluation_prompts,
    concepts_erased,
    evaluate_erasure,
    make_evaluation_prompts,
)
from barrier_diffusers.evaluation.evaluation_split import load_rows, retained_rows
from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.judged_model import ImagePair, JudgedModel
from barrier_diffusers.evaluation.lpips import Lpips, lpips_distances, lpips_facts
from barrier_diffusers.evaluation.membership import membership, membership_images
from barrier_diffusers.evaluation.protocols.base import Likeness, Protocol, register_protocol
from barrier_diffusers.evaluation.tables import print_membership, print_metrics, print_values

if TYPE_CHECKING:
    from barrier_diffusers.evaluation.settings import EvaluateConfig

OTHERS = "everything else"  # the label of prompts that name no concept


@register_protocol("class")
@register_protocol("style")
class ConceptProtocol(Protocol):
    """Class and style: accuracy on the forgotten concepts and on the rest, likeness of the rest, LPIPS."""

    judges_concepts = True

    @classmethod
    def check(cls, config: EvaluateConfig) -> None:
        """Concepts, one source of prompts, and somebody who judges the images."""
        if not config.concept:
            raise ValueError("set concept: protocols class and style ask what was forgotten")
        has_data, has_lists = bool(config.train_data_dir or config.dataset_name), bool(config.forget_prompts)
        if has_data + has_lists + (config.prompts.file is not None) != 1 and config.images_dir is None:
            raise ValueError(
                "prompts come from a data set, from prompts.file or from forget_prompts and retain_prompts: set "
                "train_data_dir or dataset_name, or one of the other two"
            )
        style_alone = config.clip or config.lpips.weights
        if config.evaluation.classifier is None and ("class" in config.protocols or not style_alone):
            raise ValueError(
                "nobody judges the images: set evaluation.classifier (or, for style, clip or lpips.weights)"
            )
        if config.membership.enabled and (not has_data or config.images_dir is not None):
            raise ValueError(
                "membership takes a pipeline and two splits of a data set: leave it out of images_dir and prompts"
            )
        if config.lpips.weights and not (config.base_model or config.base_images_dir):
            raise ValueError("LPIPS compares images before and after: set base_model or base_images_dir")
        config.concept_config  # noqa: B018  its own checks

    def __init__(self, config: EvaluateConfig, judged_model: JudgedModel):
        self.config, self.judged_model, evaluation = config, judged_model, config.evaluation
        self.concepts = config.concept_config
        self.judge = Judge(evaluation.source, self.concepts.concepts) if evaluation.classifier else None
        self.erased = erased_besides(config)
        if config.prompts.file is None and config.images_dir is None:
            self.prompts = PromptsConfig()
            self.asked = make_evaluation_prompts(evaluation, self.concepts, erased=self.erased)
            self.rows = prompt_rows(self.asked, evaluation.sampling.seed)
        else:
            self.prompts = config.prompts
            self.rows = labelled(judged_model, config)
            counts = self.prompts.images_per_prompt
            self.asked = prompts_of_rows(self.rows, counts, concepts=self.concepts.concepts, erased=self.erased)
        check_evaluation_prompts(evaluation, self.asked)
        others = rows_about_others(self.asked.prompts, self.erased)
        labels, mine = self.asked.labels, set(self.concepts.concepts)
        self.retained = [row for row in others if labels[row] not in mine]
        self.forgotten = [row for row, label in enumerate(labels) if label in mine]
        if not self.retained:
            raise ValueError("no prompt asks for anything that is retained, so nothing says what was kept")
        self.likeness = Likeness(config, judged_model, self._reference() if config.fidelity.extractors else None)
        self.lpips = Lpips(config.lpips).to(judged_model.device) if config.lpips.weights else None
        self.pair: ImagePair | None = None
        self.split_images = None
        if config.membership.enabled:
            self.split_images = membership_images(
                config.membership, evaluation, concepts=self.concepts, erased=self.erased
            )

    def _reference(self) -> ImageSet | None:
        config = self.concepts
        if config.source is None or self.config.fidelity.reference_dir:
            return None
        rows = load_rows(config, self.config.evaluation.split)
        return ImageColumn(retained_rows(rows, config, erased=self.erased), config.image_column)

    def images(self) -> ImagePair:
        """The images of its prompts, made or read."""
        return self.judged_model.images("concepts", self.rows, self.prompts)

    def run(self) -> dict[str, Any]:
        """`classes`, and `fidelity`, `clip_score` and `lpips` as far as they are asked for."""
        self.pair = self.images()
        results: dict[str, Any] = {}
        if self.judge is not None:
            attribute, metrics = evaluate_erasure(
                self.config.evaluation,
                self.asked,
                before=self.pair.before,
                after=self.pair.after,
                classifier=self.judge.classifier,
            )
            results["classes"] = metrics
            print_metrics(metrics, attribute, forgotten=self.asked.forgotten)
        if self.likeness.extractors:
            results["fidelity"] = {
                when: self.likeness.distances(images.select(self.retained)) for when, images in self.pair.items()
            }
        if self.likeness.clip is not None:
            results["clip_score"] = {when: self._clip(images) for when, images in self.pair.items()}
        if self.lpips is not None:
            results["lpips"] = self._lpips(self.pair)
        if self.split_images is not None:
            results["membership"] = membership(
                self.judged_model.pipelines,
                self.split_images,
                resolution=self.judged_model.resolution,
                options=self.config.membership,
                device=self.judged_model.device,
            )
            print_membership(results["membership"])
        print_values("images of what is retained, against real ones", results.get("fidelity", {}))
        print_values("CLIP score", results.get("clip_score", {}))
        print_values("LPIPS before - after", {"after": results.get("lpips", {})})
        return results

    def plain_images(self, concept: str, images: ImageFiles | None = None) -> np.ndarray:
        """Images (N, H, W, 3) of the concept's plain prompts, after, or among those of another model."""
        assert self.pair is not None
        rows = [row for row, label in enumerate(self.asked.labels) if label == concept]
        return (images or self.pair.after).select(rows).array()

    def control(self) -> tuple[ImageFiles, dict[str, Any]]:
        """(images of the same prompts by the control, what the judge says of them)."""
        images = self.judged_model.control_images("concepts", self.rows, self.prompts)
        _, metrics = evaluate_erasure(self.config.evaluation, self.asked, before=None, after=images)
        return images, metrics

    def attackers_view(self) -> list[Forgotten]:
        """What an attacker knows of each concept; where there are only prompts, no image.

        A grid and a comparison with a control also look at what is retained, with up to half as many prompts.
        """
        found = self._attackers_view()
        if self.judge is None or not (self.config.attack_budget or self.config.control):
            return found
        labels = self.asked.labels
        known = [row for row in self.retained if labels[row] in self.judge.labels]
        rows = [known[place] for place in evenly(len(known), max(1, self.config.evaluation.images_per_label // 2))]
        prompts = [self.asked.prompts[row] for row in rows]
        return [replace(one, retain_prompts=prompts, retain_labels=[labels[row] for row in rows]) for one in found]

    def _attackers_view(self) -> list[Forgotten]:
        evaluation, resolution = self.config.evaluation, self.judged_model.resolution
        if self.concepts.source is not None:
            return forgotten_concepts(
                evaluation, self.concepts, asked=self.asked, erased=self.erased, resolution=resolution
            )
        nothing, sampling = Dataset.from_dict({"image": [], "text": []}), evaluation.sampling
        found = []
        for concept in self.concepts.concepts:
            rows = rows_of(self.asked.labels, concept)
            found.append(
                Forgotten(
                    concept,
                    prompts=self.asked.prompts[rows],
                    images=nothing,
                    others=nothing,
                    sampling=replace(sampling, seed=sampling.seed + rows.start),
                    resolution=resolution,
                )
            )
        return found

    def _clip(self, images: ImageFiles) -> dict[str, Any]:
        groups = {"forgotten": self.forgotten, "retained": self.retained}
        prompts = self.asked.prompts
        scores = {
            name: self.likeness.clip_score(images.select(rows), [prompts[row] for row in rows])
            for name, rows in groups.items()
            if rows
        }
        values = {name: score["clip_score"] for name, score in scores.items()}
        return {**values, "details": {name: score["details"] for name, score in scores.items()}}

    def _lpips(self, pair: ImagePair) -> dict[str, Any]:
        assert self.lpips is not None and pair.before is not None
        distances = np.array(
            lpips_distances(pair.before, pair.after, network=self.lpips, batch_size=self.config.lpips.batch_size)
        )
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
    saved = config.lora_weights or config.pretrained_model_name_or_path
    mine = set(config.concept_config.concepts)
    found = read_erased(saved) if saved else []
    others = [
        ErasedConcepts(
            [name for name in run.concepts if name not in mine],
            run.captions,
            [] if mine & set(run.concepts) else run.synonyms,
        )
        for run in found
    ]
    return [run for run in others if run.concepts]


def prompt_rows(asked: EvaluationPrompts, seed: int) -> list[PromptRow]:
    """The prompts as rows of a prompt file; image i starts from seed + i."""
    pairs = zip(asked.prompts, asked.labels, strict=True)
    return [PromptRow(str(index), prompt, seed + index, None, label) for index, (prompt, label) in enumerate(pairs)]


def labelled(judged_model: JudgedModel, config: EvaluateConfig) -> list[PromptRow]:
    """The rows of a prompt file; their labels are of the concept's column, of a column `label`, or None."""
    rows = judged_model.rows(config.prompts, config.concept_column)
    return rows if any(row.label for row in rows) else judged_model.rows(config.prompts)


def prompts_of_rows(
    rows: Sequence[PromptRow], images_per_prompt: int, concepts: list[str], erased: Sequence[ErasedConcepts]
) -> EvaluationPrompts:
    """Rows of a prompt file as evaluation prompts, one for each image.

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
    return EvaluationPrompts(prompts, labels, concepts, concepts_erased(erased))
