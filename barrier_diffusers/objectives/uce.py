"""Unified concept editing (UCE; Gandikota et al., arXiv 2308.14761): a closed-form edit of the keys and values that
cross-attention reads from the text. Several concepts at once; no training step.

Shapes: N forget tokens, M preserved tokens, L tokens of a padded prompt, D embedding features, O output features,
R free directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from barrier_diffusers.objectives.base import OBJECTIVES, Objective, PromptEdit
from barrier_diffusers.protection.targets import ProtectedMap
from barrier_diffusers.utils.checks import ABOVE_0, Checked, Range, at_least, rules

EXACT = 1e-12  # share of a squared length that is rounding error


@dataclass
class UceSettings(Checked):
    """Own settings of objective uce."""

    preserve_weight: float = 1.0  # >= 0; uce: of each token of a retain prompt, against 1 of a forget prompt
    ridge: float = 0.1  # > 0; uce: weight of ||W - W0||^2
    # uce: the weights may change only in directions that hold at most this share of the squared length of the retain
    # prompts' tokens (the null space of their second moment, as in AlphaEdit); None: in all directions
    null_space: float | None = None

    SECTION = "objective."
    RULES = rules(preserve_weight=at_least(0), ridge=ABOVE_0, null_space=Range(0, 1, without_high=True))


def ridge_edit(
    weight_OD: Tensor,
    forget_ND: Tensor,
    anchor_ND: Tensor,
    preserve_MD: Tensor,
    preserve_weight: float,
    ridge: float,
    free_DR: Tensor | None = None,
) -> Tensor:
    """The W_OD that minimises, in float64,

        sum_N ||W c - W0 c'||^2 + preserve_weight sum_M ||(W - W0) p||^2 + ridge ||W - W0||^2

    for forget tokens c, their anchors c' and preserved tokens p. Setting the gradient to 0 gives

        W = (sum W0 c' c^T + preserve_weight sum W0 p p^T + ridge W0) S^-1,
        S = sum c c^T + preserve_weight sum p p^T + ridge I,

    and W0 = W0 S S^-1 turns that into the form computed here, W = W0 + W0 sum (c' - c) c^T S^-1.

    With free directions U the minimum is sought among W = W0 + B U^T: the same with U^T c and U^T p for c and p.
    """
    weight, forget, anchor, preserve = (value.double() for value in (weight_OD, forget_ND, anchor_ND, preserve_MD))
    if free_DR is not None:
        wanted_OR = weight @ (anchor - forget).T @ (forget @ free_DR)
        forget, preserve = forget @ free_DR, preserve @ free_DR
        identity = torch.eye(free_DR.shape[1], dtype=torch.float64, device=forget.device)
        moment_RR = forget.T @ forget + preserve_weight * preserve.T @ preserve + ridge * identity
        return weight + torch.linalg.solve(moment_RR, wanted_OR.T).T @ free_DR.T
    identity = torch.eye(forget.shape[1], dtype=torch.float64, device=forget.device)
    moment_DD = forget.T @ forget + preserve_weight * preserve.T @ preserve + ridge * identity
    change_DD = torch.linalg.solve(moment_DD, forget.T @ (anchor - forget)).T
    return weight + weight @ change_DD


def free_directions(preserve_MD: Tensor, share: float) -> Tensor:
    """Orthonormal directions (D, R), in float64, that hold together at most a share of the squared length of the
    preserved tokens: those of the smallest eigenvalues of their second moment.

    An edit within them is W0 + B U^T: it answers a preserved token p with an error of ||B U^T p||, and U^T p is nearly
    0 (arXiv 2410.02355, with a share of the squared length where that has a threshold of eigenvalues).

    Raises:
        ValueError: there is no such direction.
    """
    tokens = preserve_MD.double()
    energies_D, vectors_DD = torch.linalg.eigh(tokens.T @ tokens)  # ascending
    held_D = energies_D.clamp(min=0).cumsum(0) / energies_D.clamp(min=0).sum()
    free = int((held_D <= max(share, EXACT)).sum())
    if free == 0:
        raise ValueError(
            f"no direction holds {share:g} of what the retain prompts' embeddings are or less: raise "
            "objective.null_space, or retain fewer prompts"
        )
    return vectors_DD[:, :free]


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
    free_DR = None
    if task.options.null_space is not None:
        if not preserve:
            raise ValueError("objective.null_space is that of retain prompts, and there is none: set retain_prompts")
        free_DR = free_directions(preserve_MD, task.options.null_space)
    for linear_map in task.maps:
        weight_OD = linear_map.layer.weight
        forget_ND, anchor_ND, preserve_MD = (rows.to(weight_OD.device) for rows in (forget_ND, anchor_ND, preserve_MD))
        edited = ridge_edit(
            weight_OD,
            forget_ND,
            anchor_ND,
            preserve_MD,
            preserve_weight=task.options.preserve_weight,
            ridge=task.options.ridge,
            free_DR=None if free_DR is None else free_DR.to(weight_OD.device),
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
