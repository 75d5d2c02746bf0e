"""Read captioned images from a folder or the hub, and split them into forget and retain rows."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.config import HF_DATASETS_CACHE

from barrier_diffusers.data.columns import texts_of, with_texts
from barrier_diffusers.data.folders import METADATA_NAMES, find_images, read_image_folder
from barrier_diffusers.data.pixels import as_rgb, reason
from barrier_diffusers.utils.hub import require_on_hub
from barrier_diffusers.utils.words import as_compared


def read_rows(
    source: str,
    split: str,
    image_column: str = "image",
    columns: Sequence[str] = (),
    caption_column: str = "text",
    subset: str | None = None,
    hint: str = "",
) -> Dataset:
    """Rows with images from an image folder, a folder of parquet or Arrow files, or a hub name.

    Args:
        columns: others that every row must have.
        caption_column: what captions are called that an image folder has in text files beside the images.
        subset: one of a hub data set's configurations.
        hint: what to do where a column is missing; else the message lists the columns.

    Raises:
        ValueError: a folder that does not exist, an unknown split, or a column that is missing.
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
    elif folder.is_dir() and not _data_files(folder):
        dataset = read_image_folder(folder, split, image_column, caption_column, columns)
    else:
        if not folder.is_dir() and not (Path(HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir():
            require_on_hub(source, "dataset")
        try:
            dataset = _load_files(folder, split) if folder.is_dir() else load_dataset(source, subset, split=split)
        except Exception as error:  # of the library, of what it reads with, or of the connection
            raise ValueError(f"cannot read split {split!r} of {source!r}: {error}") from error
    for column in (image_column, *columns):
        if column not in dataset.column_names:
            rest = hint or f"; it has {', '.join(dataset.column_names)}"
            raise ValueError(f"{source!r} has no column {column!r}{rest}")
    return dataset


def load_image_text(
    source: str,
    split: str,
    image_column: str = "image",
    caption_column: str | None = "text",
    subset: str | None = None,
) -> Dataset:
    """Captioned images, see `read_rows`; the captions are texts, the first one where a row has a list.

    With caption_column None images are enough.

    Raises:
        ValueError: see `read_rows`, or a row without a caption.
    """
    if caption_column is None:
        return read_rows(source, split, image_column, subset=subset)
    rows = read_rows(source, split, image_column, (caption_column,), caption_column, subset)
    return with_texts(rows, caption_column, lists=True)


DATA_FILES = {".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".tar": ""}


def _data_files(folder: Path) -> list[Path]:
    """Files of tables, of which `datasets` makes rows; none in a folder that holds pictures beside its metadata."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in (*DATA_FILES, ".zip", ".webdataset")
        and path.name not in METADATA_NAMES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    return files if files and not find_images(folder).names else []


def _load_files(folder: Path, split: str) -> Dataset:
    path = str(folder)
    if glob.escape(path) == path:
        return load_dataset(path, split=split)
    kind = next(filter(None, (DATA_FILES.get(file.suffix.lower()) for file in _data_files(folder))), None)
    if kind is None:
        raise ValueError("its path has characters ([ ] * ?) that its kind of files cannot be read with: rename it")
    return load_dataset(kind, data_dir=glob.escape(path), split=split)


def unreadable_image(dataset: Dataset, image_column: str, rows: Iterable[int]) -> ValueError | None:
    """The error that names the first of these rows, and its file, whose image cannot be decoded; None if all can."""
    undecoded = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    for row in rows:
        try:
            as_rgb(dataset[row][image_column])
        except Exception as error:
            path = undecoded[row][image_column]["path"]
            number = row if dataset._indices is None else dataset._indices.column(0)[row].as_py()
            name = f"{number} ({path})" if path else number
            return ValueError(
                f"the image of row {name} cannot be read: {reason(error)}. Replace it or leave the row out"
            )
    return None


def rows_hash(rows: Dataset, columns: Sequence[str]) -> str:
    """SHA-256 over these columns of all rows, in order; of an image over its file, which is not decoded."""
    images = [column for column in columns if isinstance(rows.features[column], Image)]
    rows = rows.select_columns(list(columns))
    for column in images:
        rows = rows.cast_column(column, Image(decode=False))
    digest = hashlib.sha256()
    for row in rows:
        for column in columns:
            value = row[column]
            if column in images and value is not None:
                content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
            else:
                content = repr(value).encode()
            digest.update(f"{column} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def split_concepts(
    dataset: Dataset, column: str, concepts: Sequence[str], role: str = "forget"
) -> tuple[Dataset, Dataset]:
    """(rows whose `column` is one of `concepts`, which are the `role` rows; all others).

    Raises:
        ValueError: a missing column, a concept no row has (zero forget images), or rows whose value is another
            spelling of it, which would be retained.
    """
    if column not in dataset.column_names:
        raise ValueError(f"the data has no column {column!r}; it has {', '.join(dataset.column_names)}")
    values = texts_of(dataset, column)
    known = sorted(set(values))
    for concept in concepts:
        if concept not in known:
            listed = ", ".join(known[:50]) + (f" and {len(known) - 50} more" if len(known) > 50 else "")
            near = [value for value in known if as_compared(value) == as_compared(concept)]
            hint = f"; the data write it {near[0]!r}" if near else ""
            raise ValueError(f"zero {role} images: no row has {column} = {concept!r}; known are {listed}{hint}")
        same = [value for value in known if value not in concepts and as_compared(value) == as_compared(concept)]
        if same:
            raise ValueError(
                f"rows have {column} = {same[0]!r} beside {concept!r}: make them one value, or name both, as all that "
                "is not named is something else"
            )
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
