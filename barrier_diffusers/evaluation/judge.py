"""What says what an image shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from barrier_diffusers.evaluation.accuracy import recognise
from barrier_diffusers.evaluation.classifier import AttributeClassifier


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


def forgotten_attribute(attributes: Mapping[str, Sequence[str]], forgotten: Sequence[str]) -> str:
    """The classifier's attribute whose labels include all forgotten concepts."""
    for name, labels in attributes.items():
        if set(forgotten) <= set(labels):
            return name
    known = "; ".join(f"{name}: {', '.join(labels)}" for name, labels in attributes.items())
    raise ValueError(f"the evaluation classifier cannot recognise {', '.join(forgotten)}; it knows {known}")
