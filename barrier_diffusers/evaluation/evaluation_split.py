"""The rows of a data set that are evaluated on: captions to ask, images that nothing was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from datasets import Dataset

from barrier_diffusers.data.concepts import ConceptConfig, load_concept_rows
from barrier_diffusers.data.erased_concepts import ErasedConcepts, rows_about_others
from barrier_diffusers.data.pixels import as_rgb
from barrier_diffusers.data.readers import split_concepts


def load_rows(config: ConceptConfig, split: str) -> Dataset:
    """The rows of a split of the concepts' data set.

    Raises:
        ValueError: no such split or column.
    """
    return load_concept_rows(config, split)


def retained_rows(loaded: Dataset, config: ConceptConfig, erased: Sequence[ErasedConcepts] = ()) -> Dataset:
    """The rows that are about none of the concepts and nothing `erased` before."""
    _, others = split_concepts(loaded, config.concept_column, concepts=config.concepts)
    return others.select(rows_about_others(list(others[config.caption_column]), erased))


def image_text(rows: Dataset, config: ConceptConfig) -> Dataset:
    """The rows with two columns, image and text, whatever the data calls them."""
    columns = {config.image_column: "image", config.caption_column: "text"}
    rows = rows.select_columns(list(columns))
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def images_hash(images: Dataset) -> str:
    """SHA-256 over the pixels and captions of (image, text) rows."""
    digest = hashlib.sha256()
    for row in images:
        digest.update(row["text"].encode())
        digest.update(as_rgb(row["image"]).tobytes())
    return digest.hexdigest()
