"""Read captioned images from a folder or the hub, and split them into forget and retain rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk


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
