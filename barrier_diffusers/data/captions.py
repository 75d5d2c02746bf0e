"""Which concept a caption names, and captions with the concept replaced."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch


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
