"""Forget, retain and test images, and the batches of each.

Shapes: B batch, N images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from barrier_diffusers.data.labelled_images import LabelledImages, LabelledSource, as_pixels, load_labelled
from classification_ext.settings import DataConfig, ForgetConfig

Batch = dict[str, Tensor]  # images (B, C, H, W) in bytes, labels (B,)


@dataclass(frozen=True)
class Splits:
    """What a run learns from, forgets and is tested on."""

    forget: LabelledImages
    retain: LabelledImages
    test: LabelledImages  # of the retained labels: all, for random data
    forget_test: LabelledImages  # test images of the labels that the forget images have: never seen, else alike
    forget_rows: Tensor  # indices of the forget images in the training split

    def digests(self) -> dict[str, str]:
        """SHA-256 of each part, for the manifest."""
        return {name: getattr(self, name).digest() for name in ("forget", "retain", "test")}


class Rows(Dataset):
    """Labelled images whose batches are read as a whole: an index per image would cost more than the image."""

    def __init__(self, images: LabelledImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Batch:
        return {"images": self.images.images[row], "labels": self.images.labels[row]}

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        chosen = torch.tensor(rows)
        return {"images": self.images.images[chosen], "labels": self.images.labels[chosen]}


def _as_read(batch: Any) -> Batch:
    return batch


def shuffled(images: LabelledImages, batch_size: int, seed: int, num_processes: int = 1) -> DataLoader:
    """Batches in an order that depends on the seed alone, all of one size.

    Raises:
        ValueError: fewer images than processes.
    """
    size = min(batch_size, len(images) // num_processes)
    if size == 0:
        raise ValueError(f"{len(images)} images cannot be shared between {num_processes} processes: use fewer")
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Rows(images), size, shuffle=True, drop_last=True, generator=generator, collate_fn=_as_read)


def in_order(images: LabelledImages, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """All images once, in order, on a device."""
    starts = range(0, len(images), batch_size)
    parts = [images[slice(start, start + batch_size)] for start in starts]
    return [{"images": part.images.to(device), "labels": part.labels.to(device)} for part in parts]


def augment(pixels: Tensor, flip: bool, shift: int) -> Tensor:
    """Mirror half of the images and shift each by up to `shift` pixels on black; (B, C, H, W) in [-1, 1]."""
    num, _, height, width = pixels.shape
    device = pixels.device
    if flip:
        pixels = torch.where(torch.rand(num, 1, 1, 1, device=device) < 0.5, pixels.flip(3), pixels)
    if shift:
        top, left = torch.randint(2 * shift + 1, (2, num, 1), device=device)
        rows = (top + torch.arange(height, device=device))[:, :, None]
        columns = (left + torch.arange(width, device=device))[:, None]
        padded = F.pad(pixels, (shift,) * 4, value=-1.0)
        images = torch.arange(num, device=device)[:, None, None]
        pixels = padded[images, :, rows, columns].permute(0, 3, 1, 2)
    return pixels


def pixels_of(batch: Batch) -> Tensor:
    """A batch's images in [-1, 1]."""
    return as_pixels(batch["images"])


@lru_cache(maxsize=4)  # a table's rows read the same data hundreds of times
def _load(source: LabelledSource, resolution: int, num_channels: int, names: tuple[str, ...] | None) -> LabelledImages:
    return load_labelled(source, resolution, num_channels, names)


def load_split(
    config: DataConfig, split: str, resolution: int, num_channels: int, names: Sequence[str] | None = None
) -> LabelledImages:
    """A split as a model reads it; with `names` its labels are in that order."""
    source = LabelledSource(
        source=config.train_data_dir,
        split=split,
        image_column=config.image_column,
        label_column=config.label_column,
        subset=config.dataset_subset,
    )
    return _load(source, resolution, num_channels, tuple(names) if names is not None else None)


def forget_rows(train: LabelledImages, config: ForgetConfig) -> Tensor:
    """Indices of the training images to be forgotten, ascending.

    Raises:
        ValueError: an unknown label, a label without images, or nothing left to retain or to forget.
    """
    if config.classes:
        found = {label: train.rows_of(label) for label in config.classes}
        for label, rows in found.items():
            if not len(rows):
                raise ValueError(f"the training data has no image of label {label!r}")
        chosen = torch.cat(list(found.values())).unique()
    else:
        count = config.forget_count or round((config.forget_fraction or 0) * len(train))
        if not 0 < count < len(train):
            raise ValueError(f"{count} of {len(train)} training images are to be forgotten: leave some of both kinds")
        generator = torch.Generator().manual_seed(config.forget_seed)
        chosen = torch.randperm(len(train), generator=generator)[:count].sort().values
    if len(chosen) == len(train):
        raise ValueError("every training image is to be forgotten: leave some to retain")
    return chosen


def make_splits(train: LabelledImages, test: LabelledImages, config: ForgetConfig) -> Splits:
    """Forget and retain images of the training data, and the test images that judge each."""
    rows = forget_rows(train, config)
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[rows] = False
    forget, retain = train[rows], train[kept.nonzero().flatten()]
    of_forgotten = torch.isin(test.labels, forget.labels.unique())
    alike = test[of_forgotten.nonzero().flatten()]
    retained_test = test[(~of_forgotten).nonzero().flatten()] if config.classes else test
    if not len(retained_test) or not len(alike):
        raise ValueError("the test data has no image of the retained labels, or none of the forgotten ones")
    return Splits(forget, retain, retained_test, alike, rows)
