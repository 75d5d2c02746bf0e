"""What a classifier says of generated images, for the forgotten labels and for the rest.

Shapes: N images, C channels (1 or 3), S side, D features, J labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from barrier_diffusers.data.images import ByteImages
from barrier_diffusers.evaluation.accuracy import erasure_metrics, isin, share
from barrier_diffusers.evaluation.extractors import Extractor, get_extractor
from barrier_diffusers.evaluation.fidelity import FidelityConfig, compare_features, reference_features
from barrier_diffusers.evaluation.manifold import entropy, inception_score, precision_recall
from ddpm_ext.loading import load_rows
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import LabelEvaluationConfig, LabelledDataConfig


def as_rgb(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey images (N, H, W, 1) with three equal channels; those in colour as they are."""
    return np.repeat(images_NHWC, 3, axis=-1) if images_NHWC.shape[-1] == 1 else images_NHWC


class Judge:
    """An AttributeClassifier that is shown a generator's images.

    Raises:
        ValueError: no such classifier, or it does not know every label.
    """

    def __init__(self, config: LabelEvaluationConfig, labels: Sequence[str]):
        assert config.judge is not None
        self.config = config
        self.extractor: Extractor = get_extractor(f"classifier={config.judge}")
        network: Any = self.extractor.network
        if config.attribute not in network.attributes:
            raise ValueError(f"the judge has no head {config.attribute!r}; it has {', '.join(network.attributes)}")
        self.names: list[str] = network.attributes[config.attribute]
        unknown = sorted(set(labels) - set(self.names))
        if unknown:
            raise ValueError(f"the judge does not know {', '.join(unknown)}; it knows {', '.join(self.names)}")
        self.side: int = network.resolution

    def render(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Byte images (N, S, S, C) as the judge is shown them, bytes (N, H, W, 3)."""
        rgb = as_rgb(images_NHWC)
        if self.config.rendering == "plain":
            return rgb
        margin = max(0, self.side - rgb.shape[1])
        sides = (margin // 2, margin - margin // 2)
        return 255 - np.pad(rgb, ((0, 0), sides, sides, (0, 0)))

    @torch.no_grad()
    def probabilities(self, rendered_NHWC: np.ndarray) -> Tensor:
        """What the judge believes, (N, J), of images that `render` returned."""
        network: Any = self.extractor.network
        parts = []
        for batch in ByteImages(rendered_NHWC).batches(256):
            logits = network(network.pixels(batch))[self.config.attribute]
            parts.append(logits.float().softmax(1))
        return torch.cat(parts)

    def recognise(self, probabilities_NJ: Tensor) -> list[str]:
        """The most likely label of each image."""
        return [self.names[index] for index in probabilities_NJ.argmax(1).tolist()]

    def shows(self, images_NHWC: np.ndarray, label: str) -> list[bool]:
        """Whether each byte image (N, S, S, C) is recognised as the label."""
        return [found == label for found in self.recognise(self.probabilities(self.render(images_NHWC)))]


@dataclass(frozen=True)
class EvaluationLabels:
    """What is asked of a generator: a label per image. Image i starts from noise of seed `sampling.seed + i`."""

    labels: list[str]
    forgotten: list[str]


def make_evaluation_labels(
    config: LabelEvaluationConfig, labels: Sequence[str], forgotten: Sequence[str]
) -> EvaluationLabels:
    """So many images of each label, the forgotten ones first.

    Raises:
        ValueError: a forgotten label that there is not.
    """
    for label in forgotten:
        if label not in labels:
            raise ValueError(f"no label {label!r}; the pipeline has {', '.join(labels)}")
    each = config.images_per_retained_label or config.images_per_label
    asked = [label for label in forgotten for _ in range(config.images_per_label)]
    asked += [label for label in labels if label not in forgotten for _ in range(each)]
    return EvaluationLabels(asked, list(forgotten))


def real_images(
    config: LabelEvaluationConfig,
    data: LabelledDataConfig,
    pipeline: ClassConditionalDDPMPipeline,
    forgotten: Sequence[str],
) -> np.ndarray | None:
    """Every image of the retained labels in the evaluation split, bytes (N, S, S, C); None if nothing is compared.

    Raises:
        ValueError: a retained label without an image: none may be left out of the comparison.
    """
    if config.split is None:
        return None
    rows, labels = load_rows(data, pipeline, config.split), pipeline.labels
    kept = [index for index, label in enumerate(labels) if label not in forgotten]
    missing = [labels[index] for index in kept if not (rows.labels == index).any()]
    if missing:
        raise ValueError(f"split {config.split!r} of {data.source!r} has no image of {', '.join(missing)}")
    chosen = rows[torch.isin(rows.labels, torch.tensor(kept)).nonzero().flatten()]
    return chosen.images.permute(0, 2, 3, 1).numpy()


def retained_quality(judge: Judge, generated_MD: Tensor, probabilities_MJ: Tensor, real_ND: Tensor) -> dict[str, Any]:
    """FID, KID, precision and recall against real images, and the judge's inception score; all on retained labels.

    Args:
        generated_MD, real_ND: features of the judge's extractor.
        probabilities_MJ: of the generated images.
    """
    found = compare_features(real_ND, generated_MD, judge.extractor, FidelityConfig())
    name = judge.extractor.name
    manifold = precision_recall(F.normalize(real_ND, dim=1), F.normalize(generated_MD, dim=1), judge.config.neighbours)
    found |= {f"{key}_{name}": value for key, value in manifold.items()}
    found[f"is_{name}"] = round(inception_score(probabilities_MJ), 4)
    found["details"] |= {"neighbours": judge.config.neighbours, "features_of_precision_and_recall": "unit length"}
    return found


def evaluate(
    judge: Judge,
    questions: EvaluationLabels,
    before: np.ndarray | None,
    after: np.ndarray,
    real: np.ndarray | None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Accuracy per label before and after, the judge's entropy on forgotten labels, and the quality of the rest.

    Args:
        before, after: generated byte images (N, S, S, C); before may be unknown.
        real: of the retained labels.

    Returns:
        `erasure_metrics` (UA = unlearning_accuracy, FA = forget_accuracy_after, TA = retain_accuracy_after) with
        `forget_entropy_before/after` in nats, and `retained_before/after` of `retained_quality`. Without forgotten
        labels: `accuracy`, `per_<attribute>` and `retained_after`.
    """
    asked, attribute = np.array(questions.labels, dtype=object), judge.config.attribute
    forget = isin(asked, questions.forgotten)
    images = {"before": before, "after": after}
    shown = {when: judge.render(found) for when, found in images.items() if found is not None}
    beliefs = {when: judge.probabilities(found) for when, found in shown.items()}
    answers = {when: {attribute: judge.recognise(found)} for when, found in beliefs.items()}
    scores: dict[str, Any]
    if questions.forgotten:
        wanted = {attribute: questions.labels}
        scores = erasure_metrics(answers.get("before"), answers["after"], wanted, attribute, questions.forgotten)
        for when, belief in beliefs.items():
            scores[f"forget_accuracy_{when}"] = scores["details"][f"forget_accuracy_{when}"]["value"]
            scores[f"forget_entropy_{when}"] = round(float(entropy(belief[torch.from_numpy(forget)]).mean()), 4)
    else:
        right = np.array(answers["after"][attribute], dtype=object) == asked
        per_label = {label: share(right[asked == label]) for label in dict.fromkeys(questions.labels)}
        scores = {"accuracy": share(right), f"per_{attribute}": per_label}
    if real is not None:
        size, kept = FidelityConfig().batch_size, torch.from_numpy(~forget)
        real_ND = reference_features(ByteImages(judge.render(real)), judge.extractor, size, cache)
        for when, found in shown.items():
            features = judge.extractor.features(ByteImages(found[~forget]), size)
            scores[f"retained_{when}"] = retained_quality(judge, features, beliefs[when][kept], real_ND)
    sampling = judge.config.sampling
    seeds = {"first": sampling.seed, "last": sampling.seed + len(asked) - 1}
    facts = {
        "num_images": len(asked),
        "seeds": seeds,
        "sampling": asdict(sampling),
        "rendering": judge.config.rendering,
    }
    return {**scores, **facts, "judge": {"folder": judge.config.judge, **judge.extractor.facts()}}
