"""The judge: what says what an image shows.

Shapes: N images, H height, W width, J labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from torch import Tensor

from barrier_diffusers.data.images import ByteImages
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.extractors import Extractor, get_extractor

Rendering = Literal["plain", "ink"]


class Judge:
    """One attribute of a classifier that is shown images.

    Args:
        source: of the classifier.
        labels: that it must know.
        attribute: its name; None: the attribute that has the labels.
        rendering: how images are shown to it. plain: as they are; ink: a bright photo on black as black ink on white
            paper, padded (not scaled) to the judge's side.

    Raises:
        ValueError: no such classifier or attribute, or one that does not know every label.
    """

    def __init__(
        self,
        source: ClassifierSource,
        labels: Sequence[str],
        attribute: str | None = None,
        rendering: Rendering = "plain",
    ):
        self.source, self.rendering = source, rendering
        self.attribute = check_judge(source, labels, attribute)
        self.classifier = source.load(labels)
        self.labels = self.classifier.attributes[self.attribute]

    @cached_property
    def extractor(self) -> Extractor:
        """The features that all of an AttributeClassifier's heads read.

        Raises:
            ValueError: another kind of classifier.
        """
        return get_extractor(f"classifier={self.source.name}")

    def render(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Byte images (N, H, W, 1 or 3) as the judge is shown them, bytes (N, H', W', 3)."""
        colour = as_rgb(images_NHWC)
        if self.rendering == "plain":
            return colour
        margin = max(0, self.classifier.resolution - colour.shape[1])
        sides = (margin // 2, margin - margin // 2)
        return 255 - np.pad(colour, ((0, 0), sides, sides, (0, 0)))

    def probabilities(self, rendered_NHWC: np.ndarray) -> Tensor:
        """Probability of each label, (N, J), for images that `render` returned."""
        return self.classifier.probabilities_of(ByteImages(rendered_NHWC))[self.attribute]

    def recognise(self, probabilities_NJ: Tensor) -> list[str]:
        """The most likely label of each image."""
        return [self.labels[index] for index in probabilities_NJ.argmax(1).tolist()]

    def shows(self, images_NHWC: np.ndarray, label: str) -> list[bool]:
        """Whether each byte image (N, H, W, 1 or 3) is recognised as the label."""
        return [found == label for found in self.recognise(self.probabilities(self.render(images_NHWC)))]


def as_rgb(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey images (N, H, W, 1) with three equal channels; those in colour as they are."""
    return np.repeat(images_NHWC, 3, axis=-1) if images_NHWC.shape[-1] == 1 else images_NHWC


def check_judge(source: ClassifierSource, labels: Sequence[str], attribute: str | None = None) -> str:
    """The attribute of a classifier that has the labels; its weights are not loaded.

    Args:
        attribute: its name; None: the one that has the labels.

    Raises:
        ValueError: no such classifier, no such attribute, or one that does not know every label.
    """
    known = source.attributes(labels)
    if attribute is None:
        return attribute_of(known, labels)
    if attribute not in known:
        raise ValueError(f"the judge has no head {attribute!r}; it has {', '.join(known)}")
    unknown = sorted(set(labels) - set(known[attribute]))
    if unknown:
        raise ValueError(f"the judge does not know {', '.join(unknown)}; it knows {shortened(known[attribute])}")
    return attribute


def shortened(labels: Sequence[str], most: int = 40) -> str:
    """The labels in a row, of a long list the first ones."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def attribute_of(attributes: Mapping[str, Sequence[str]], labels: Sequence[str]) -> str:
    """The first of a classifier's attributes that has all of the labels.

    Raises:
        ValueError: none has.
    """
    for name, known in attributes.items():
        if set(labels) <= set(known):
            return name
    what = "; ".join(f"{name}: {shortened(known)}" for name, known in attributes.items())
    raise ValueError(f"the evaluation classifier cannot recognise {', '.join(labels)}; it knows {what}")
