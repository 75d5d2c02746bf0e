"""Which part of a network is protected: its transformer blocks, by number in forward order or by dotted name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn

STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}  # forward order; UNets register the middle last
TRANSFORMER_BLOCK = re.compile(r"(^|\.)(single_)?transformer_blocks\.\d+$")
ATTENTION = re.compile(r"(^|\.)attentions\.\d+$")  # of a UNet without transformer blocks, such as a DDPM's


def numbered_blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """Names of the blocks that a number counts, in forward order.

    In a UNet these are its transformer blocks from the first down block over the middle to the last up block
    (Stable Diffusion 1.x has 16), or its attentions where it has no transformer blocks. In a transformer they are
    `transformer_blocks`, so that a number is the index there; `single_transformer_blocks` continue the count.

    Args:
        prefix: start of every module path, left out of the names.
    """
    names = [path.removeprefix(prefix) for path, _ in model.named_modules()]
    found = [name for name in names if TRANSFORMER_BLOCK.search(name)]
    found = found or [name for name in names if ATTENTION.search(name)]
    return sorted(found, key=lambda name: STAGES.get(name.partition(".")[0], 0))


def is_inside(name: str, block: str) -> bool:
    """Whether the whole dotted parts of `block` occur in `name`, one after the other, before its last part.

    >>> is_inside("single_transformer_blocks.12.attn.to_q", "transformer_blocks.12")
    False
    """
    return f".{block}." in f".{name}"


def named_blocks(model: nn.Module, blocks: Sequence[int | str], prefix: str = "") -> list[str]:
    """The dotted name of every entry of `blocks`, numbers (also written as strings) looked up by `numbered_blocks`.

    Raises:
        ValueError: a number or name that the model does not have; the message lists what it has.
    """
    numbered = numbered_blocks(model, prefix)
    paths = [path.removeprefix(prefix) for path, module in model.named_modules() if next(module.children(), None)]
    chosen = []
    for block in blocks:
        if str(block).isdecimal() and int(block) < len(numbered):
            chosen.append(numbered[int(block)])
        elif any(f".{path}".endswith(f".{block}") for path in paths):
            chosen.append(str(block))
        else:
            raise ValueError(f"no block {block!r}; the {type(model).__name__} has {_listed(numbered, paths)}")
    return chosen


def _listed(numbered: Sequence[str], paths: Iterable[str]) -> str:
    counted = [f"{index} = {name}" for index, name in enumerate(numbered)]
    if len(counted) > 20:
        counted = [*counted[:10], "...", *counted[-9:]]
    stages = [path for path in paths if re.fullmatch(r"[a-z_]*blocks?(\.\d+)?", path)]
    others = [path for path in stages if path not in numbered]
    return ", ".join(counted or ["no numbered block"]) + (f"; and by name {', '.join(others)}" if others else "")
