"""Columns of a data set as words: class names and captions, whatever type the data have."""

from __future__ import annotations

import math
from typing import Any

from datasets import ClassLabel, Dataset, Value


def texts_of(rows: Dataset, column: str, lists: bool = False) -> list[str]:
    """The words of every row: names of a ClassLabel, text as it is, whole numbers as they are written.

    Args:
        lists: of a list of texts, as some data sets have several captions an image, take the first.

    Raises:
        ValueError: a row that is empty (null, or a label below 0), or whose value is no word; it says row and column.
    """
    feature, texts = rows.features[column], []
    for row, value in enumerate(rows[column]):
        if lists and isinstance(value, list | tuple) and value:
            value = value[0]
        problem, text = _word(value, feature)
        if problem:
            raise ValueError(f"row {row} of column {column!r} {problem}")
        texts.append(text)
    return texts


def _word(value: Any, feature: Any) -> tuple[str, str]:
    """(what is wrong with a value, "" if nothing is; its words)."""
    if isinstance(value, float) and value.is_integer():  # whole numbers beside gaps
        value = int(value)
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        value = feature.names[value] if 0 <= value < len(feature.names) else None
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    ):
        return "is empty: give it a value, or leave the row out", ""
    if isinstance(value, str):
        return "", value
    if isinstance(value, int):
        return "", str(value)
    return f"is {str(value)[:40]!r} ({type(value).__name__}), but must be words", ""


def with_texts(rows: Dataset, column: str, lists: bool = False) -> Dataset:
    """The rows with this column as words; see `texts_of`. A column of texts stays as it is."""
    texts, feature = texts_of(rows, column, lists), rows.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return rows
    return rows.remove_columns([column]).add_column(column, texts)
