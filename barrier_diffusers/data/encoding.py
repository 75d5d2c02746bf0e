"""Captioned images as VAE latents and text embeddings, each computed once and cached."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from barrier_diffusers.data.pixels import as_rgb
from barrier_diffusers.data.readers import unreadable_image
from barrier_diffusers.data.stored_rows import HASH, StoredRows, padded
from barrier_diffusers.models.architectures import count_cut, get_architecture
from barrier_diffusers.models.autoencoders import posterior_parameters
from barrier_diffusers.models.denoiser import Denoiser
from barrier_diffusers.models.generation import fitting_batch
from barrier_diffusers.objectives.base import Condition
from barrier_diffusers.utils.files import written_whole


def to_pixels(images: Sequence[Any], resolution: int) -> Tensor:
    """PIL images -> (N, 3, resolution, resolution) in [-1, 1]; other sizes are scaled and centre-cropped."""
    rgb = [as_rgb(image) for image in images]
    if all(image.size == (resolution, resolution) for image in rgb):
        return torch.from_numpy(np.stack([np.asarray(image) for image in rgb])).permute(0, 3, 1, 2) / 127.5 - 1
    processor = VaeImageProcessor(vae_scale_factor=1, resample="bilinear")
    return processor.preprocess(rgb, height=resolution, width=resolution, resize_mode="crop")


def image_batches(dataset: Dataset, image_column: str, resolution: int) -> Dataset:
    """The data set as rows {"pixels": (3, H, W)}; decoding happens when a row is read, so memory stays flat."""

    def transform(rows: dict[str, list]) -> dict[str, list]:
        return {"pixels": list(to_pixels(rows[image_column], resolution))}

    return dataset.select_columns([image_column]).with_transform(transform)


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from `path`, or compute them once and write them there with their hash, whole or not at all.

    A file of an earlier version, which has no hash, is computed anew.

    Raises:
        ValueError: the file is not as it was written.
    """
    try:
        found = _read_cached(path) if path.is_file() else None
    except SafetensorError as error:
        raise ValueError(f"cache file {str(path)!r} is damaged ({error}): delete it") from error
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in compute().items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={HASH: tensors_hash(tensors)})
    return tensors


def _read_cached(path: Path) -> dict[str, Tensor] | None:
    with safe_open(path, "pt") as file:
        digest = (file.metadata() or {}).get(HASH)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if digest is None:
        print(f"cache file {str(path)!r} has no hash, as an earlier version left it: computed anew")
        return None
    if tensors_hash(tensors) != digest:
        raise ValueError(f"cache file {str(path)!r} is damaged, it is not as it was written: delete it")
    return tensors


def read_pixels(dataset: Dataset, image_column: str, resolution: int, rows: range) -> Tensor:
    """These rows' images as `to_pixels` gives them.

    Raises:
        ValueError: an image that cannot be read; the message names the row and its file.
    """
    try:
        return to_pixels(dataset.select_columns([image_column])[list(rows)][image_column], resolution)
    except Exception as error:
        raise unreadable_image(dataset, image_column, rows) or error from error


def encode_moments(
    vae: Any, dataset: Dataset, image_column: str, resolution: int, batch_size: int | None = None
) -> Tensor:
    """VAE posterior of every image: (N, 2 c, h, w), mean and log-variance, so that each epoch can draw anew.

    Args:
        batch_size: images at once; None: 64, fewer of large images.
    """
    return torch.cat(list(moment_batches(vae, dataset, image_column, resolution, batch_size)))


def moment_batches(
    vae: Any, dataset: Dataset, image_column: str, resolution: int, batch_size: int | None = None
) -> Iterator[Tensor]:
    """`encode_moments`, batch by batch."""
    batch_size = batch_size or fitting_batch(resolution, 64)
    starts = tqdm(range(0, len(dataset), batch_size), desc="VAE latents", leave=False)
    batches = (range(start, min(start + batch_size, len(dataset))) for start in starts)
    yield from posterior_batches(vae, (read_pixels(dataset, image_column, resolution, rows) for rows in batches))


@torch.no_grad()
def posterior_batches(vae: Any, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """`posteriors`, batch by batch."""
    upcast = vae.dtype == torch.float16 and vae.config.get(
        "force_upcast", False
    )  # its activations overflow, as SDXL's do
    if upcast:
        vae.to(torch.float32)
    try:
        for pixels in batches:
            # in one order of memory, whatever the reader's: another one is computed with other roundings
            yield posterior_parameters(vae, pixels.to(vae.device, vae.dtype).contiguous()).float().cpu()
    finally:
        if upcast:
            vae.to(torch.float16)


def posteriors(vae: Any, batches: Iterable[Tensor]) -> Tensor:
    """VAE posteriors (N, 2 c, h, w) in float32 of batches of pixels (B, 3, H, W) in [-1, 1]."""
    return torch.cat(list(posterior_batches(vae, batches)))


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Captions -> (N, L) token ids, padded and cut to the tokenizer's length as the pipeline does."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the warnings of diffusers and transformers, which would come once per batch of prompts."""
    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    try:
        for library, _ in levels:
            library.set_verbosity_error()
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)


def encode_prompts(pipeline: Any, prompts: Sequence[str], batch_size: int = 64) -> Condition:
    """The condition of every prompt, float32 tensors (N, ...), as the pipeline itself computes them.

    Prompts longer than a tokenizer's length are cut, as the pipeline cuts them, and one warning counts them.
    """
    chunks = list(prompt_batches(pipeline, prompts, batch_size))
    return {key: cat_padded([chunk[key] for chunk in chunks]) for key in chunks[0]}


def prompt_batches(pipeline: Any, prompts: Sequence[str], batch_size: int = 64) -> Iterator[Condition]:
    """`encode_prompts`, batch by batch."""
    architecture = get_architecture(type(pipeline).__name__)
    with quiet_libraries():
        cut = [f"{name} keeps {kept} tokens and cuts {n}" for name, (n, kept) in count_cut(pipeline, prompts).items()]
    if cut:
        warnings.warn(f"of {len(prompts)} prompts, some are too long: {', '.join(cut)}", stacklevel=3)
    for start in range(0, len(prompts), batch_size):
        with quiet_libraries(), torch.no_grad():
            encoded = architecture.encode(pipeline, list(prompts[start : start + batch_size]))
            chunk = {key: value.float().cpu() for key, value in encoded.items()}
        yield chunk


def cat_padded(chunks: Sequence[Tensor]) -> Tensor:
    """Tensors (P_i, L_i, ...) one after the other, (P, L, ...), with zeros where one has fewer tokens than another."""
    longest = max((chunk.shape[1] for chunk in chunks if chunk.ndim > 1), default=0)
    return torch.cat([padded(chunk, longest) for chunk in chunks])


@dataclass
class EncodedImages(TorchDataset):
    """Captioned images with everything frozen already computed: a training batch is looked up, not encoded.

    What is large may stay on the disk, of which rows are read as they are asked for.
    """

    moments: Tensor | StoredRows | None  # VAE posteriors (N, 2 c, h, w); None for rows that are prompts only
    caption_ids: Tensor  # row of `embeddings` for each image's caption (N,)
    anchor_ids: Tensor | None  # row of `embeddings` for each image's anchor prompt (N,); None: no anchors
    embeddings: Mapping[str, Tensor | StoredRows]  # one row per distinct prompt in every tensor (P, ...)
    empty_id: int | None = None  # row of `embeddings` for the empty prompt, where one is needed

    def __len__(self) -> int:
        return len(self.caption_ids)

    def condition(self, row: Tensor | int) -> Condition:
        """The condition of one distinct prompt."""
        return {key: value[row] for key, value in self.embeddings.items()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "index": torch.tensor(index),
            "condition": self.condition(self.caption_ids[index]),
        }
        if self.anchor_ids is not None:
            row["anchor"] = self.condition(self.anchor_ids[index])
        if self.moments is not None:
            row["moments"] = self.moments[index]
        if self.empty_id is not None:
            row["unconditional"] = self.condition(self.empty_id)
        return row


def encode_images(
    pipeline: Any, images: Sequence[Any], captions: Sequence[str], anchors: Sequence[str] | None = None
) -> EncodedImages:
    """PIL images with a caption each (and an anchor prompt each, for objectives that take one), all in memory.

    Images of any mode are read as people see them (`data/pixels.py`), scaled and cropped to the side of the first one.
    The script's own way, `encode_concepts`, keeps a cache.

    Raises:
        ValueError: not as many captions (or anchors) as images, none at all, or an image that cannot be read.
    """
    for name, texts in {"captions": captions, "anchors": anchors}.items():
        if texts is not None and len(texts) != len(images):
            raise ValueError(f"{len(images)} images, but {len(texts)} {name}: give each image one")
    if not len(images):
        raise ValueError("no image to encode")
    resolution = as_rgb(images[0]).width
    size = fitting_batch(resolution, 64)
    starts = range(0, len(images), size)
    moments = posteriors(pipeline.vae, (to_pixels(images[start : start + size], resolution) for start in starts))
    prompts = sorted({*captions, *(anchors or [])})
    position = {text: index for index, text in enumerate(prompts)}
    ids = [torch.tensor([position[text] for text in texts]) for texts in (captions, anchors or [])]
    return EncodedImages(moments, ids[0], ids[1] if anchors else None, encode_prompts(pipeline, prompts))


@dataclass
class NoisedBatches:
    """Re-iterable batches of noised latents for recording: the same noise and timesteps at every pass.

    Each process of a distributed run records its own share of the rows.
    """

    images: Any  # EncodedImages, or another data set with rows of the same keys
    denoiser: Denoiser
    batch_size: int
    seed: int
    device: torch.device | str = "cpu"
    process_index: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(self.seed)
        share = slice(self.process_index, None, self.num_processes)
        for start in range(0, len(self.images), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.images)))
            batch = default_collate([self.images[index] for index in rows])
            drawn = self.denoiser.noised(batch["moments"], generator)
            if self.process_index < len(rows):
                yield {
                    "noisy": drawn.noisy[share].to(self.device),
                    "timesteps": drawn.timesteps[share].to(self.device),
                    "condition": {key: value[share].to(self.device) for key, value in batch["condition"].items()},
                }
