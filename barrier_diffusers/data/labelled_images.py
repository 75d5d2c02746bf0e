"""Labelled images held as bytes: what the image classifiers and the class-conditional diffusion models learn from.

Shapes: N images, C channels (1 or 3), H height, W width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor

from barrier_diffusers.data.columns import texts_of
from barrier_diffusers.data.pixels import as_rgb, reason
from barrier_diffusers.data.readers import read_rows


@dataclass(frozen=True)
class LabelledImages:
    """Images (N, C, H, W) in bytes, labels (N,) as indices into `names`."""

    images: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | Sequence[int] | slice) -> LabelledImages:
        return LabelledImages(self.images[rows], self.labels[rows], self.names)

    def rows_of(self, label: str) -> Tensor:
        """Indices of the label's rows.

        Raises:
            ValueError: no such label; the message lists the known ones.
        """
        return (self.labels == self.index_of(label)).nonzero().flatten()

    def index_of(self, label: str) -> int:
        """Position of the label in `names`; a ValueError that lists the known ones if there is none."""
        if label not in self.names:
            raise ValueError(f"no label {label!r}; the data has {', '.join(self.names)}")
        return self.names.index(label)

    def digest(self) -> str:
        """SHA-256 over pixels, labels and names, for manifests."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.names)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def as_pixels(images: Tensor) -> Tensor:
    """Bytes (N, C, H, W) -> floats in [-1, 1]."""
    return images.float() / 127.5 - 1


@dataclass(frozen=True)
class LabelledSource:
    """Where labelled images are read from."""

    source: str  # folder (parquet, Arrow, image folder) or hub name of `datasets`
    split: str
    image_column: str = "image"
    label_column: str = "label"
    subset: str | None = None  # one of a hub data set's configurations, e.g. cropped_digits of SVHN


def load_labelled(
    data: LabelledSource, resolution: int = 32, num_channels: int = 3, names: Sequence[str] | None = None
) -> LabelledImages:
    """A split of a labelled data set.

    Images of another size are scaled (bilinear) and cropped at the centre; with one channel colours become grey.

    Args:
        names: the labels in order, e.g. those of the training split; None: the data's own, sorted if they are plain
            values rather than a ClassLabel.

    Raises:
        ValueError: a source, split or column that does not exist, a damaged image (the row is named), or a label that
            is not in `names`.
    """
    rows = read_rows(data.source, data.split, data.image_column, (data.label_column,), subset=data.subset)
    known, labels = _labels(rows, data.label_column, names)
    images = np.empty((len(rows), resolution, resolution, num_channels), np.uint8)
    column = rows.select_columns([data.image_column])
    for index in range(len(rows)):
        try:
            images[index] = _to_bytes(column[index][data.image_column], resolution, num_channels)
        except Exception as error:  # Pillow's decoders raise whatever they meet
            raise ValueError(
                f"row {index} of split {data.split!r} of {data.source!r} holds no readable image: {reason(error)}"
            ) from error
    return LabelledImages(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels), known)


def _labels(rows: Dataset, column: str, names: Sequence[str] | None) -> tuple[list[str], list[int]]:
    feature, values = rows.features[column], texts_of(rows, column)
    own = feature.names if isinstance(feature, ClassLabel) else sorted(set(values))
    known = list(names) if names is not None else list(own)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"the data has labels {', '.join(unknown)}; expected are {', '.join(known)}")
    position = {name: index for index, name in enumerate(known)}
    return known, [position[value] for value in values]


def _to_bytes(image: Any, resolution: int, num_channels: int) -> np.ndarray:
    image = as_rgb(image)
    if num_channels == 1:
        image = image.convert("L")  # grey stays as it is
    if image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        size = [max(resolution, round(side * scale)) for side in image.size]
        image = image.resize(size, 2)  # bilinear
        left, top = ((side - resolution) // 2 for side in size)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image).reshape(resolution, resolution, num_channels)
