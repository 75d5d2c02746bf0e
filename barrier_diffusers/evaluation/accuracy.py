"""Protocol "class": what a classifier recognises in generated images, for the forgotten concepts and for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from barrier_diffusers.data.images import Images
from barrier_diffusers.evaluation.classifier import ImageClassifier


@dataclass(frozen=True)
class Answers:
    """What a classifier says of N images, by attribute.

    Attributes:
        known: the attribute's labels.
        probabilities: of each of them, (N, J).
    """

    known: Mapping[str, Sequence[str]]
    probabilities: Mapping[str, Tensor]

    @classmethod
    def of(cls, classifier: ImageClassifier, images: Images) -> Answers:
        """Its answers for byte images, which are resampled if they are of another size."""
        return cls(classifier.attributes, classifier.probabilities_of(images))

    @property
    def labels(self) -> dict[str, list[str]]:
        """The most likely label of each image, a list of N per attribute."""
        return {
            name: [known[index] for index in self.probabilities[name].argmax(1).tolist()]
            for name, known in self.known.items()
        }

    def beliefs(self, attribute: str, wanted: Sequence[str | None], rows: Sequence[int], when: str) -> dict[str, Any]:
        """Of the images with these numbers: `forget_confidence_WHEN`, the mean probability of what was asked for in
        percent, and `forget_in_top5_WHEN` where there are more than five labels."""
        known, beliefs = list(self.known[attribute]), self.probabilities[attribute][list(rows)]
        asked = torch.tensor([known.index(str(wanted[row])) for row in rows])
        confidence = 100 * beliefs.gather(1, asked.unsqueeze(1)).mean().item()
        found: dict[str, Any] = {f"forget_confidence_{when}": round(confidence, 3)}
        if len(known) > 5:
            top_five = beliefs.topk(5, dim=1).indices
            found[f"forget_in_top5_{when}"] = share((top_five == asked.unsqueeze(1)).any(1).numpy())
        return found


def share(correct: Sequence[bool] | np.ndarray) -> dict[str, Any]:
    """Percentage of successes with its count and 95 % Wilson interval (also in percent)."""
    if not len(correct):
        raise ValueError(
            "no image to score: choose at least one evaluation prompt for forgotten and retained labels each"
        )
    interval = binomtest(int(sum(correct)), len(correct)).proportion_ci(0.95, method="wilson")
    return {
        "value": round(100 * float(np.mean(correct)), 3),
        "num_images": len(correct),
        "interval_95": [round(100 * interval.low, 3), round(100 * interval.high, 3)],
    }


def difference_interval(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float]:
    """95 % interval of before - after, in points, from two shares with their Wilson intervals.

    Newcombe's hybrid score interval for independent samples (Statistics in Medicine 17, 1998, method 10). Images of
    the same seeds are alike before and after, so that it is rather too wide than too narrow.
    """
    difference = before["value"] - after["value"]
    (low_before, high_before), (low_after, high_after) = before["interval_95"], after["interval_95"]
    down = math.hypot(before["value"] - low_before, high_after - after["value"])
    up = math.hypot(high_before - before["value"], after["value"] - low_after)
    return difference - down, difference + up


def erasure_metrics(
    predicted_before: Mapping[str, Sequence[str]] | None,
    predicted_after: Mapping[str, Sequence[str]],
    wanted: Mapping[str, Sequence[str | None]],
    attribute: str,
    forgotten: Sequence[str],
    erased_before: Sequence[str] = (),
) -> dict[str, Any]:
    """Unlearning accuracy (UA = 100 - accuracy on the forgotten labels) and what happened to everything else.

    Args:
        predicted_before, predicted_after, wanted: attribute -> N labels; `wanted` is what the prompts asked for (None:
            the prompt does not say, so the image does not count for that attribute). Without `predicted_before` there
            are no `before` entries and no drop.
        attribute: the attribute whose labels `forgotten` are to be forgotten.
        erased_before: labels of any attribute that earlier runs erased: scored apart, not part of what is retained.

    Returns:
        Percentages `unlearning_accuracy`, `retain_accuracy_before/after`, `retain_accuracy_drop`,
        `per_<attribute>_before/after`, and `<other attribute>_accuracy_before/after` on the retained images; with
        `erased_before` its labels' `erased_before_unlearning_accuracy_before/after`; `details` holds counts and
        intervals.
    """
    asked = {name: np.array(labels, dtype=object) for name, labels in wanted.items()}
    truth = asked[attribute]
    known, forget = truth != np.array(None), isin(truth, forgotten)
    old = np.any([isin(labels, erased_before) for labels in asked.values()], axis=0)
    retain = known & ~forget & ~old
    others = [name for name in wanted if name != attribute and any(label is not None for label in wanted[name])]
    details: dict[str, Any] = {}
    per_label: dict[str, dict[str, float]] = {}
    for when, predictions in (("before", predicted_before), ("after", predicted_after)):
        if predictions is None:
            continue
        right = {name: np.array(predictions[name]) == asked[name] for name in asked}
        correct = right[attribute]
        details[f"forget_accuracy_{when}"] = share(correct[forget])
        details[f"retain_accuracy_{when}"] = share(correct[retain])
        labels = {label: share(correct[truth == label]) for label in dict.fromkeys(truth[known])}
        details[f"per_{attribute}_{when}"] = labels
        per_label[when] = {label: counted["value"] for label, counted in labels.items()}
        for other in others:
            counted = ~forget & ~old & (asked[other] != np.array(None))
            details[f"{other}_accuracy_{when}"] = share(right[other][counted])
        if old.any():
            wrong = [~right[name][isin(asked[name], erased_before)] for name in asked]
            details[f"erased_before_unlearning_accuracy_{when}"] = share(np.concatenate(wrong))
        details["unlearning_accuracy"] = share(~correct[forget])  # what stays is "after"
    summary: dict[str, Any] = {"unlearning_accuracy": details["unlearning_accuracy"]["value"]}
    for when in per_label:
        summary[f"retain_accuracy_{when}"] = details[f"retain_accuracy_{when}"]["value"]
    for when, values in per_label.items():
        summary[f"per_{attribute}_{when}"] = values
    if predicted_before is not None:
        drop = summary["retain_accuracy_before"] - summary["retain_accuracy_after"]
        summary["retain_accuracy_drop"] = round(drop, 3)
    for name in [*(f"{other}_accuracy" for other in others), "erased_before_unlearning_accuracy"]:
        for when in ("before", "after"):
            if f"{name}_{when}" in details:
                summary[f"{name}_{when}"] = details[f"{name}_{when}"]["value"]
    return {**summary, "details": details}


def isin(labels: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
    """Which of the labels (N,) of type object, None among them, are one of `wanted`."""
    return np.array([label in set(wanted) for label in labels], dtype=bool)
