"""Forget and retain data: captioned images, their VAE latents and text embeddings, each computed once and cached.

Shapes: N rows, C channels, H height, W width (h, w in latent space), L tokens, D embedding features.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import default_collate
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from barrier_diffusers.architectures import count_cut, get_architecture
from barrier_diffusers.denoising import Denoising
from barrier_diffusers.files import written_whole
from barrier_diffusers.objectives.base import Condition


def load_image_text(
    source: str,
    split: str,
    image_column: str = "image",
    caption_column: str | None = "text",
    subset: str | None = None,
) -> Dataset:
    """Captioned images from an image folder with a metadata file, a folder of parquet or Arrow files, or a hub name.

    With caption_column None images are enough. `subset` names one of a hub data set's configurations.

    Raises:
        ValueError: a folder path that does not exist, an unknown split, or a column that is missing.
    """
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    folder = Path(source).expanduser()
    if not folder.is_dir() and looks_like_path and source.count("/") > 0:
        raise ValueError(f"data folder {source!r} does not exist")
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = load_from_disk(str(folder))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{source!r} has no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
    else:
        try:
            dataset = load_dataset(str(folder) if folder.is_dir() else source, subset, split=split)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"cannot read split {split!r} of {source!r}: {error}") from error
    for column in (image_column, caption_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{source!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")
    return dataset


def to_pixels(images: Sequence[Any], resolution: int) -> Tensor:
    """PIL images -> (N, 3, resolution, resolution) in [-1, 1]; other sizes are scaled and centre-cropped."""
    rgb = [image.convert("RGB") for image in images]
    if all(image.size == (resolution, resolution) for image in rgb):
        return torch.from_numpy(np.stack([np.asarray(image) for image in rgb])).permute(0, 3, 1, 2) / 127.5 - 1
    processor = VaeImageProcessor(vae_scale_factor=1, resample="bilinear")
    return processor.preprocess(rgb, height=resolution, width=resolution, resize_mode="crop")


def image_batches(dataset: Dataset, image_column: str, resolution: int) -> Dataset:
    """The data set as rows {"pixels": (3, H, W)}; decoding happens when a row is read, so memory stays flat."""

    def transform(rows: dict[str, list]) -> dict[str, list]:
        return {"pixels": list(to_pixels(rows[image_column], resolution))}

    return dataset.select_columns([image_column]).with_transform(transform)


def fingerprint(*parts: Any) -> str:
    """A short stable hash of settings (anything json can write)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def cached_tensors(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Read tensors from `path`, or compute them once and write them there, whole or not at all.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in compute().items()}
        with written_whole(path) as temporary:
            save_file(tensors, temporary)
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"cache file {str(path)!r} is damaged ({error}): delete it") from error


def unreadable_image(dataset: Dataset, image_column: str, rows: Iterable[int]) -> ValueError | None:
    """The error that names the first of these rows, and its file, whose image cannot be decoded; None if all can."""
    undecoded = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    for row in rows:
        try:
            dataset[row][image_column].load()
        except Exception as error:
            path = undecoded[row][image_column]["path"]
            number = row if dataset._indices is None else dataset._indices.column(0)[row].as_py()
            name = f"{number} ({path})" if path else number
            return ValueError(f"the image of row {name} cannot be read: {error}. Replace it or leave the row out")
    return None


@torch.no_grad()
def encode_moments(vae: Any, dataset: Dataset, image_column: str, resolution: int, batch_size: int = 64) -> Tensor:
    """VAE posterior of every image: (N, 2 c, h, w), mean and log-variance, so that each epoch can draw anew."""
    rows = image_batches(dataset, image_column, resolution)
    upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # its activations overflow, as SDXL's do
    if upcast:
        vae.to(torch.float32)
    chunks = []
    for start in tqdm(range(0, len(rows), batch_size), desc="VAE latents", leave=False):
        stop = min(start + batch_size, len(rows))
        try:
            pixels = default_collate(rows.__getitems__(list(range(start, stop))))["pixels"]
        except Exception as error:
            raise unreadable_image(dataset, image_column, range(start, stop)) or error from error
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        chunks.append(posterior.parameters.float().cpu())
    if upcast:
        vae.to(torch.float16)
    return torch.cat(chunks)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Captions -> (N, L) token ids, padded and cut to the tokenizer's length as the pipeline does."""
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def split_concepts(
    dataset: Dataset, column: str, concepts: Sequence[str], role: str = "forget"
) -> tuple[Dataset, Dataset]:
    """(rows whose `column` is one of `concepts`, which are the `role` rows; all others).

    Raises:
        ValueError: a missing column, or a concept no row has (zero forget images).
    """
    if column not in dataset.column_names:
        raise ValueError(f"the data has no column {column!r}; it has {', '.join(dataset.column_names)}")
    values = dataset[column]
    known = sorted(set(values))
    for concept in concepts:
        if concept not in known:
            raise ValueError(f"zero {role} images: no row has {column} = {concept!r}; known are {', '.join(known)}")
    wanted = set(concepts)
    forget = [index for index, value in enumerate(values) if value in wanted]
    retain = [index for index, value in enumerate(values) if value not in wanted]
    return dataset.select(forget), dataset.select(retain)


def take_evenly(rows: Sequence[int], count: int | None, seed: int) -> list[int]:
    """At most `count` of the row numbers, drawn without replacement, in order; all of them for None."""
    if count is None or count >= len(rows):
        return list(rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[index] for index in sorted(order[:count].tolist())]


def labels_in_texts(texts: Sequence[str], labels: Sequence[str]) -> list[str | None]:
    """The label each text names as whole words (the longest, if several match), None where it names none."""
    if not labels:
        return [None] * len(texts)
    ordered = sorted(labels, key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, ordered))})(?![\w-])", re.IGNORECASE)
    known = {label.lower(): label for label in labels}
    found = (pattern.search(text) for text in texts)
    return [known[match.group(1).lower()] if match else None for match in found]


def swap_concept(caption: str, concept: str, replacement: str) -> str:
    """The caption with the concept's words replaced; a caption that does not name the concept is an error.

    >>> swap_concept("a photo of a red sneaker", "sneaker", "boot")
    'a photo of a red boot'
    """
    swapped, count = re.subn(
        rf"(?<![\w-]){re.escape(concept)}(?![\w-])", lambda _: replacement, caption, flags=re.IGNORECASE
    )
    if count == 0:
        raise ValueError(
            f"caption {caption!r} does not name the concept {concept!r}, so no word of it can be exchanged: "
            "set objective.anchor_prompt, a whole prompt"
        )
    return swapped


def anchor_captions(
    captions: Sequence[str],
    concepts_of_rows: Sequence[str],
    anchor: str | None,
    anchor_prompt: str | None,
    labels: Sequence[str],
    seed: int,
) -> list[str]:
    """The prompt c' each forget row is steered to: `anchor_prompt` as it is, the concept's words replaced by `anchor`,
    or (both None) by another label drawn at random for each row."""
    if anchor_prompt is not None:
        return [anchor_prompt] * len(captions)
    if anchor is not None:
        replacements = [anchor] * len(captions)
    else:
        draw = torch.randint(len(labels), (len(captions),), generator=torch.Generator().manual_seed(seed))
        replacements = [labels[index] for index in draw.tolist()]
    return [swap_concept(*row) for row in zip(captions, concepts_of_rows, replacements, strict=True)]


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


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Sequence[str], batch_size: int = 64) -> Condition:
    """The condition of every prompt, float32 tensors (N, ...), as the pipeline itself computes them.

    Prompts longer than a tokenizer's length are cut, as the pipeline cuts them, and one warning counts them.
    """
    architecture = get_architecture(type(pipeline).__name__)
    chunks: list[Condition] = []
    with quiet_libraries():
        cut = [f"{name} keeps {kept} tokens and cuts {n}" for name, (n, kept) in count_cut(pipeline, prompts).items()]
        for start in range(0, len(prompts), batch_size):
            encoded = architecture.encode(pipeline, list(prompts[start : start + batch_size]))
            chunks.append({key: value.float().cpu() for key, value in encoded.items()})
    if cut:
        warnings.warn(f"of {len(prompts)} prompts, some are too long: {', '.join(cut)}", stacklevel=2)
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


@dataclass
class EncodedImages(TorchDataset):
    """Captioned images with everything frozen already computed: a training batch is looked up, not encoded."""

    moments: Tensor | None  # VAE posteriors (N, 2 c, h, w); None for rows that are prompts only
    caption_ids: Tensor  # row of `embeddings` for each image's caption (N,)
    anchor_ids: Tensor | None  # row of `embeddings` for each image's anchor prompt (N,); None: no anchors
    embeddings: Condition  # one row per distinct prompt in every tensor (P, ...)
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

    Images are scaled and cropped to the side of the first one. The script's own way, `encode_concepts`, keeps a cache.
    """
    rows = Dataset.from_dict({"image": list(images)})
    moments = encode_moments(pipeline.vae, rows, "image", images[0].width)
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
    diffusion: Denoising
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
            drawn = self.diffusion.noised(batch["moments"], generator)
            if self.process_index < len(rows):
                yield {
                    "noisy": drawn.noisy[share].to(self.device),
                    "timesteps": drawn.timesteps[share].to(self.device),
                    "condition": {key: value[share].to(self.device) for key, value in batch["condition"].items()},
                }
