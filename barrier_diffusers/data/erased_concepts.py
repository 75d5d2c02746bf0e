"""What earlier runs erased from a pipeline: written beside its weights, and kept erased by the next run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from barrier_diffusers.data.captions import labels_in_texts
from barrier_diffusers.utils.words import as_compared

ERASED_NAME = "erased_concepts.json"


@dataclass(frozen=True)
class ErasedConcepts:
    """What one unlearning run erased from a pipeline."""

    concepts: list[str]
    captions: list[str]  # distinct ones that were to be forgotten
    synonyms: list[str] = field(default_factory=list)  # other names of the concepts

    def is_named_by(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is one of the captions or names one of the concepts."""
        known, named = set(map(as_compared, self.captions)), labels_in_texts(texts, [*self.concepts, *self.synonyms])
        return [as_compared(text) in known or concept is not None for text, concept in zip(texts, named, strict=True)]


def read_erased(pipeline: str, revision: str | None = None) -> list[ErasedConcepts]:
    """What was erased from a pipeline folder or hub repository so far, oldest first; empty if it says nothing.

    Raises:
        ValueError: a file that does not hold what `as_json` gives.
    """
    path = Path(pipeline).expanduser() / ERASED_NAME
    if not path.parent.exists():
        try:
            path = Path(hf_hub_download(pipeline, ERASED_NAME, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError):
            return []
    if not path.is_file():
        return []
    try:
        return [ErasedConcepts(**erasure) for erasure in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def as_json(erased: Sequence[ErasedConcepts]) -> list[dict[str, list[str]]]:
    """Plain values, as they stand in the file; without synonyms where there are none, as earlier versions read it."""
    return [{key: value for key, value in asdict(erasure).items() if value or key != "synonyms"} for erasure in erased]


def captions_of(erased: Sequence[ErasedConcepts], now: ErasedConcepts | None = None) -> list[str]:
    """All distinct captions, without those about what is to be forgotten `now`."""
    captions = list(dict.fromkeys(caption for erasure in erased for caption in erasure.captions))
    return captions if now is None else [captions[row] for row in rows_about_others(captions, [now])]


def rows_about_others(captions: Sequence[str], erased: Sequence[ErasedConcepts]) -> list[int]:
    """Numbers of the rows that are about nothing erased."""
    about = [erasure.is_named_by(captions) for erasure in erased]
    return [index for index in range(len(captions)) if not any(column[index] for column in about)]
