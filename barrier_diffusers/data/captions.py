"""Which concept a caption names, and captions with the concept replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from barrier_diffusers.utils.words import find_names, replace_names


def labels_in_texts(texts: Sequence[str], labels: Sequence[str]) -> list[str | None]:
    """The label each text names first (the longest, if several begin there), None where it names none.

    Words are compared as `utils/words.py` says.
    """
    found = (find_names(text, labels) for text in texts)
    return [labels[matches[0][0]] if matches else None for matches in found]


def concepts_in_texts(texts: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[str | None]:
    """The concept each text names first, by any of its names; None where it names none.

    Args:
        names: concept -> its names.
    """
    owners = {name: concept for concept, own in names.items() for name in own}
    return [None if name is None else owners[name] for name in labels_in_texts(texts, list(owners))]


def swap_concept(caption: str, names: str | Sequence[str], replacement: str) -> str:
    """The caption with the concept's words replaced; a caption that does not name the concept is an error.

    Args:
        names: of the concept, one or several.

    >>> swap_concept("a photo of a red sneaker", "sneaker", "boot")
    'a photo of a red boot'
    """
    names = [names] if isinstance(names, str) else names
    swapped = replace_names(caption, names, replacement)
    if swapped is None:
        raise ValueError(
            f"caption {caption!r} does not name the concept {names[0]!r}, so no word of it can be exchanged: "
            "set objective.anchor_prompt, a whole prompt"
        )
    return swapped


def anchor_captions(
    captions: Sequence[str],
    names_of_rows: Sequence[Sequence[str]],
    anchor: str | None,
    anchor_prompt: str | None,
    labels: Sequence[str],
    seed: int,
) -> list[str]:
    """The prompt c' each forget row is steered to: `anchor_prompt` as it is, the concept's words replaced by `anchor`,
    or (both None) by another label drawn at random for each row.

    Args:
        names_of_rows: the names of the concept of each row.
    """
    if anchor_prompt is not None:
        return [anchor_prompt] * len(captions)
    if anchor is not None:
        replacements = [anchor] * len(captions)
    else:
        draw = torch.randint(len(labels), (len(captions),), generator=torch.Generator().manual_seed(seed))
        replacements = [labels[index] for index in draw.tolist()]
    return [swap_concept(*row) for row in zip(captions, names_of_rows, replacements, strict=True)]


def cycle(prompts: Sequence[str], count: int) -> list[str]:
    """`count` prompts, the list repeated in order."""
    return [prompts[index % len(prompts)] for index in range(count)] if prompts else []
