"""The judge: what says what an image shows.

Shapes: N images, H height, W width, J labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from barrier_diffusers.data.images import ByteImages
from barrier_diffusers.evaluation.classifier import AttributeClassifier, known_attributes
from barrier_diffusers.evaluation.extractors import Extractor, get_extractor

Rendering = Literal["plain", "ink"]


class Judge:
    """One head of an AttributeClassifier that is shown images.

    Args:
        folder: of a saved AttributeClassifier.
        labels: that it must know.
        attribute: the head's name; None: the head that knows the labels.
        rendering: how images are shown to it. plain: as they are; ink: a bright photo on black as black ink on white
            paper, padded (not scaled) to the judge's side.

    Raises:
        ValueError: no such head, or one that does not know every label.
    """

    def __init__(
        self, folder: str, labels: Sequence[str], attribute: str | None = None, rendering: Rendering = "plain"
    ):
        self.folder, self.rendering = folder, rendering
        self.attribute = check_judge(folder, labels, attribute)
        with torch.random.fork_rng():  # building the network draws its first weights
            self.classifier = AttributeClassifier.from_pretrained(folder).eval()
        self.labels = self.classifier.attributes[self.attribute]

    @cached_property
    def extractor(self) -> Extractor:
        """The features that all of the classifier's heads read."""
        return get_extractor(f"classifier={self.folder}")

    def render(self, images_NHWC: np.ndarray) -> np.ndarray:
        """Byte images (N, H, W, 1 or 3) as the judge is shown them, bytes (N, H', W', 3)."""
        colour = as_rgb(images_NHWC)
        if self.rendering == "plain":
            return colour
        margin = max(0, self.classifier.resolution - colour.shape[1])
        sides = (margin // 2, margin - margin // 2)
        return 255 - np.pad(colour, ((0, 0), sides, sides, (0, 0)))

    @torch.no_grad()
    def probabilities(self, rendered_NHWC: np.ndarray) -> Tensor:
        """Probability of each label, (N, J), for images that `render` returned."""
        network: Any = self.classifier
        parts = []
        for batch in ByteImages(rendered_NHWC).batches(256):
            logits = network(network.pixels(batch))[self.attribute]
            parts.append(logits.float().softmax(1))
        return torch.cat(parts)

    def recognise(self, probabilities_NJ: Tensor) -> list[str]:
        """The most likely label of each image."""
        return [self.labels[index] for index in probabilities_NJ.argmax(1).tolist()]

    def shows(self, images_NHWC: np.ndarray, label: str) -> list[bool]:
        """Whether each byte image (N, H, W, 1 or 3) is recognised as the label."""
        return [found == label for found in self.recognise(self.probabilities(self.render(images_NHWC)))]


def as_rgb(images_NHWC: np.ndarray) -> np.ndarray:
    """Grey images (N, H, W, 1) with three equal channels; those in colour as they are."""
    return np.repeat(images_NHWC, 3, axis=-1) if images_NHWC.shape[-1] == 1 else images_NHWC


def check_judge(folder: str, labels: Sequence[str], attribute: str | None = None, setting: str = "judge") -> str:
    """The head of a saved AttributeClassifier that knows the labels; the classifier itself is not loaded.

    Args:
        attribute: the head's name; None: the one that knows the labels.
        setting: that names the folder, for messages.

    Raises:
        ValueError: no such folder, no such head, or one that does not know every label.
    """
    heads = known_attributes(folder, setting)
    if attribute is None:
        return attribute_of(heads, labels)
    if attribute not in heads:
        raise ValueError(f"the judge has no head {attribute!r}; it has {', '.join(heads)}")
    unknown = sorted(set(labels) - set(heads[attribute]))
    if unknown:
        raise ValueError(f"the judge does not know {', '.join(unknown)}; it knows {', '.join(heads[attribute])}")
    return attribute


def attribute_of(attributes: Mapping[str, Sequence[str]], labels: Sequence[str]) -> str:
    """The first of a classifier's attributes that has all of the labels.

    Raises:
        ValueError: none has.
    """
    for name, known in attributes.items():
        if set(labels) <= set(known):
            return name
    what = "; ".join(f"{name}: {', '.join(known)}" for name, known in attributes.items())
    raise ValueError(f"the evaluation classifier cannot recognise {', '.join(labels)}; it knows {what}")
