"""Sets of byte images: in memory, files of a folder, or a data set's column; counted, hashed and read in batches.

Shapes: N images of a set, B of a batch, H height, W width.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from barrier_diffusers.data.folders import announce, find_images
from barrier_diffusers.data.pixels import as_rgb, open_rgb
from barrier_diffusers.data.readers import unreadable_image


class ImageSet(ABC):
    """Images (3, H, W) in bytes, in a fixed order, each of its own size; may be read again and again."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Tensor]: ...

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over what the images are read from."""

    def array(self) -> np.ndarray:
        """All images, which have one size, as bytes (N, H, W, 3)."""
        return torch.stack(list(self)).permute(0, 2, 3, 1).numpy()

    def batches(self, size: int) -> Iterator[Tensor]:
        """Byte batches (B, 3, H, W) in order, B at most `size`; a batch ends early where the images' size changes."""
        chunk: list[Tensor] = []
        for image in self:
            if chunk and (len(chunk) == size or image.shape != chunk[0].shape):
                yield torch.stack(chunk)
                chunk = []
            chunk.append(image)
        if chunk:
            yield torch.stack(chunk)


class ByteImages(ImageSet):
    """Images that are in memory.

    Args:
        images: bytes (N, H, W, 3), (N, H, W, 1), (N, 3, H, W) or (N, 1, H, W); grey counts as three equal channels.

    Raises:
        ValueError: another type or shape. Floats are refused: what range they mean and how they are to be rounded is
            the caller's to say.
    """

    def __init__(self, images: Tensor | np.ndarray):
        tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
        if tensor.dtype != torch.uint8:
            raise ValueError(f"images must be bytes (uint8), but these are {tensor.dtype}")
        if tensor.ndim == 4 and tensor.shape[1] not in (1, 3) and tensor.shape[3] in (1, 3):
            tensor = tensor.permute(0, 3, 1, 2)
        if tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {tuple(tensor.shape)}; expected are (N, H, W, 3) or (N, 3, H, W)")
        self.images_NCHW = tensor.cpu().expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images_NCHW)

    def digest(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.images_NCHW.shape)).encode())
        for image in self.images_NCHW:
            digest.update(image.contiguous().numpy().tobytes())
        return digest.hexdigest()


class ImageFiles(ImageSet):
    """Image files of a folder, of the given names or all of them, subfolders included, sorted by path.

    Raises:
        ValueError: no such folder, no image in it, or a name that is not there.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] | None = None):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ValueError(f"image folder {str(folder)!r} does not exist")
        if names is None:
            content = find_images(self.folder)
            if not content.names:
                raise ValueError(f"image folder {str(folder)!r} holds no image: {content.report()}")
            announce(content.report())
            names = content.names
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"image folder {str(folder)!r} lacks {len(missing)} of {len(names)} images, {missing[0]} for one"
            )
        self.names = list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Tensor]:
        for name in self.names:
            yield _as_tensor(open_rgb(self.folder / name))

    def select(self, rows: Sequence[int]) -> ImageFiles:
        """The images with these numbers, in this order."""
        return ImageFiles(self.folder, [self.names[row] for row in rows])

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name in self.names:  # names, sizes and contents
            content = (self.folder / name).read_bytes()
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()


class ImageColumn(ImageSet):
    """The image column of a data set of `datasets`."""

    def __init__(self, rows: Dataset, column: str = "image"):
        self.rows, self.column = rows.select_columns([column]), column

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        for row in range(len(self.rows)):
            try:
                image = as_rgb(self.rows[row][self.column])
            except Exception as error:
                raise unreadable_image(self.rows, self.column, [row]) or error from error
            yield _as_tensor(image)

    def digest(self) -> str:
        digest = hashlib.sha256()
        for image in self:
            digest.update(repr(tuple(image.shape)).encode() + image.numpy().tobytes())
        return digest.hexdigest()


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


Images: TypeAlias = ImageSet | Tensor | np.ndarray | str | Path


def as_image_set(images: Images) -> ImageSet:
    """An array or tensor of bytes, or the path of a folder, as a set of images."""
    if isinstance(images, ImageSet):
        return images
    return ImageFiles(images) if isinstance(images, str | Path) else ByteImages(images)
