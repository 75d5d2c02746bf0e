"""Checks and small forms of settings, shared by every settings dataclass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

RUN_COUNTS = (  # settings of a training run that are whole numbers from 1 on, or None
    *("resolution", "train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps"),
    *("validation_steps", "checkpointing_steps", "checkpoints_total_limit"),
)


def require_positive(config: object, names: Sequence[str] = RUN_COUNTS, label: str = "{}") -> None:
    """A ValueError if one of these whole-number settings is there, is not None, and is below 1.

    Args:
        label: how the message calls a setting, e.g. `fidelity.{}`.
    """
    for name in names:
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise ValueError(f"{label.format(name)} is {value}, but must be at least 1")


def as_list(words: str | list[str] | None) -> list[str]:
    """The words of a setting that takes one or several."""
    return [words] if isinstance(words, str) else list(words or ())


def flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested mappings; a list is a leaf, an empty mapping too."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from flat(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, values
