"""Whether prompts reach the model as meant: no name behind the token limit, no anchor that says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from barrier_diffusers.data.encoding import quiet_libraries
from barrier_diffusers.data.folders import announce
from barrier_diffusers.models.architectures import prompts_cut
from barrier_diffusers.utils.words import find_names


def require_names_within_limit(pipeline: Any, captions: Sequence[str], names: Sequence[Sequence[str]]) -> None:
    """Refuse forget captions none of whose words for the concept is among the tokens that the pipeline keeps.

    Args:
        names: of what each caption is to be forgotten for; captions that do not name it in words count for nothing.

    Raises:
        ValueError: every caption that names its concept does so behind the limit of every tokenizer. Where some do,
            one line says how many.
    """
    heads = {}  # caption -> its beginning, to the end of the first of these words
    for caption, own in zip(captions, names, strict=True):
        found = find_names(caption, own)
        if found:
            heads[caption] = caption[: found[0][2]]
    if not heads:
        return
    with quiet_libraries():
        cut = list(prompts_cut(pipeline, list(heads.values())).values())
    behind = [caption for index, caption in enumerate(heads) if all(column[index] for column in cut)]
    if not behind or not cut:
        return
    said = f"name the concept only behind the tokens that the pipeline reads, e.g. {behind[0][:60]!r}..."
    if len(behind) == len(heads):
        raise ValueError(f"all forget captions {said}: put the concept's words first")
    announce(f"{len(behind)} of {len(heads)} forget captions {said}")


def require_different_anchors(
    captions: Sequence[str], anchors: Sequence[str], embeddings: Mapping[str, Any], position: Mapping[str, int]
) -> None:
    """Refuse anchors that the text encoders do not tell from the captions: nothing would be trained.

    Args:
        embeddings: tensors, or `StoredRows`, with a row for each prompt.
        position: prompt -> its row there.

    Raises:
        ValueError: all are alike. Where some are, one line says how many.
    """
    pairs = list(zip(captions, anchors, strict=True))
    known = {
        pair: all(torch.equal(*(values[position[text]] for text in pair)) for values in embeddings.values())
        for pair in dict.fromkeys(pairs)
    }
    rows = [row for row, pair in enumerate(pairs) if known[pair]]
    if not rows:
        return
    said = f"the text encoders give {captions[rows[0]]!r} and its anchor {anchors[rows[0]]!r} the same embedding"
    if len(rows) == len(captions):
        raise ValueError(
            f"{said}: nothing would be forgotten; choose an anchor of other words, within the token limit"
        )
    announce(f"{len(rows)} of {len(captions)} forget captions cannot be told from their anchors: {said}")
