"""Unified concept editing (UCE; Gandikota et al., arXiv 2308.14761): a closed-form edit of the keys and values that
cross-attention reads from the text. Several concepts at once; no training step.

Shapes: N forget tokens, M preserved tokens, L tokens of a padded prompt, D embedding features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from barrier_diffusers.objectives.base import OBJECTIVES, Objective, PromptEdit
from barrier_diffusers.protection.targets import ProtectedMap
from barrier_diffusers.utils.checks import ABOVE_0, Checked, at_least, rules


@dataclass
class UceSettings(Checked):
    """Own settings of objective uce."""

    preserve_weight: float = 1.0  # >= 0; uce: of each token of a retain prompt, against 1 of a forget prompt
    ridge: float = 0.1  # > 0; uce: weight of ||W - W0||^2

    SECTION = "objective."
    RULES = rules(preserve_weight=at_least(0), ridge=ABOVE_0)


def ridge_edit(
    weight_OD: Tensor, forget_ND: Tensor, anchor_ND: Tensor, preserve_MD: Tensor, preserve_weight: float, ridge: float
) -> Tensor:
    """The W_OD that minimises, in float64,

        sum_N ||W c - W0 c'||^2 + preserve_weight sum_M ||(W - W0) p||^2 + ridge ||W - W0||^2

    for forget tokens c, their anchors c' and preserved tokens p. Setting the gradient to 0 gives

        W = (sum W0 c' c^T + preserve_weight sum W0 p p^T + ridge W0) S^-1,
        S = sum c c^T + preserve_weight sum p p^T + ridge I,

    and W0 = W0 S S^-1 turns that into the form computed here, W = W0 + W0 sum (c' - c) c^T S^-1.
    """
    weight, forget, anchor, preserve = (value.double() for value in (weight_OD, forget_ND, anchor_ND, preserve_MD))
    identity = torch.eye(forget.shape[1], dtype=torch.float64, device=forget.device)
    moment_DD = forget.T @ forget + preserve_weight * preserve.T @ preserve + ridge * identity
    change_DD = torch.linalg.solve(moment_DD, forget.T @ (anchor - forget)).T
    return weight + weight @ change_DD


def aligned_tokens(forget: Sequence[int], anchor: Sequence[int], length: int) -> list[int]:
    """For each of the `length` positions of the padded forget prompt, the position of the anchor prompt it maps to.

    All positions take part, as a causal text encoder carries the concept on into the end token and the padding. What
    both prompts begin with maps to itself; from the first different token on, positions are counted from the end
    token, so that end maps to end, padding to padding, and surplus tokens of the concept to the anchor's first
    different one.

    >>> aligned_tokens([0, 5, 6, 7, 9], [0, 5, 8, 9], 7)  # "a red boot" -> "a sandal", 0 and 9 start and end
    [0, 1, 2, 2, 3, 4, 5]
    """
    common = 0
    while common < min(len(forget), len(anchor)) and forget[common] == anchor[common]:
        common += 1
    shift = len(forget) - len(anchor)
    return [i if i < common else min(max(i - shift, common), length - 1) for i in range(length)]


def check_maps(maps: Sequence[ProtectedMap]) -> None:
    """Refuse maps that do not read the text.

    Raises:
        ValueError: a map that is no to_k or to_v of a cross-attention, or that carries an adapter.
    """
    for linear_map in maps:
        parent, _, leaf = linear_map.path.rpartition(".")
        attention = linear_map.model.get_submodule(parent)
        reads_text = isinstance(attention, Attention) and attention.is_cross_attention
        if leaf not in ("to_k", "to_v") or not reads_text:
            raise ValueError(
                f"objective 'uce' edits the keys and values of cross-attention only, not {linear_map.name}: "
                "set barrier.targets to [attn2.to_k, attn2.to_v]"
            )
        if linear_map.has_adapter:
            raise ValueError(f"objective 'uce' edits full weights, but {linear_map.name} carries an adapter")


@torch.no_grad()
def edit_keys_and_values(task: PromptEdit) -> None:
    """Each map then answers the forget prompts as it answered their anchors, and the retain prompts as before.

    Raises:
        ValueError: maps that `check_maps` refuses, or anchors that the text encoder does not tell from the captions.
    """
    check_maps(task.maps)
    pairs, preserve = sorted(set(task.pairs)), sorted(set(task.preserve))
    prompts = sorted({prompt for pair in pairs for prompt in pair} | set(preserve))
    embeddings = dict(zip(prompts, task.embed(prompts), strict=True))
    forget, anchor = [], []
    for prompt, target in pairs:
        positions = aligned_tokens(task.tokenize(prompt), task.tokenize(target), len(embeddings[prompt]))
        forget.append(embeddings[prompt])
        anchor.append(embeddings[target][positions])
    forget_ND, anchor_ND = torch.cat(forget), torch.cat(anchor)
    if torch.equal(forget_ND, anchor_ND):
        raise ValueError(
            f"the text encoder gives {pairs[0][0]!r} and its anchor {pairs[0][1]!r} the same embedding: nothing would "
            "be forgotten; choose other words, within the token limit"
        )
    preserve_MD = torch.cat([embeddings[prompt] for prompt in preserve] or [forget_ND[:0]])
    for linear_map in task.maps:
        weight_OD = linear_map.layer.weight
        forget_ND, anchor_ND, preserve_MD = (rows.to(weight_OD.device) for rows in (forget_ND, anchor_ND, preserve_MD))
        edited = ridge_edit(
            weight_OD, forget_ND, anchor_ND, preserve_MD, task.options.preserve_weight, task.options.ridge
        )
        weight_OD.copy_(edited)


OBJECTIVES.register(
    Objective(
        "uce",
        edit=edit_keys_and_values,
        check_maps=check_maps,
        needs=("anchor",),
        settings=UceSettings,
    )
)
