"""Membership inference on a generator: does its denoising loss tell images that it learned from held-out ones?

The loss-threshold attack (arXiv 1709.01604): an image counts as a member if its loss is below a threshold. Its
power is the area under the ROC curve, and the share of members that it finds at a low false positive rate
(arXiv 2112.03570), here with every image under the same noises at the same timesteps.

Shapes: N images, M members, H held-out images, R draws of noise and timestep, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.encoding import encode_moments, encode_prompts
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.data.readers import split_concepts, take_evenly
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.evaluation.evaluation_split import image_text, images_hash, load_rows, retained_rows
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import autocast_denoiser
from barrier_diffusers.utils.checks import INNER_SHARE, SEED, at_least, check_settings, rules

SIDES = ("members", "held_out")
Sides: TypeAlias = tuple[Tensor, Tensor]  # losses of members (M,) and of held-out images (H,)


@dataclass
class MembershipConfig:
    """Membership inference with the denoising loss."""

    enabled: bool = False  # whether it is tried
    split: str = "train"  # of the data: what the pipeline learned from; evaluation.split is what it did not
    num_images: int = 100  # of each of the four groups at most, drawn once
    num_timesteps: int = 10  # evenly over the schedule, without its ends
    num_noises: int = 2  # at each of them
    false_positive_rate: float = 0.05  # at which found members are counted
    num_resamples: int = 2000  # of the bootstrap that gives the interval of the area
    batch_size: int = 64  # samples in the network at once
    seed: int = 0  # of images, noises and resamples

    SECTION = "membership."
    RULES = rules(
        num_images=at_least(1),
        num_timesteps=at_least(1),
        num_noises=at_least(1),
        false_positive_rate=INNER_SHARE,
        num_resamples=at_least(1),
        batch_size=at_least(1),
        seed=SEED,
    )

    def __post_init__(self) -> None:
        check_settings(self)


def membership_images(
    options: MembershipConfig, evaluation: ImageEvaluationConfig, concepts: ConceptConfig, erased: list[ErasedConcepts]
) -> dict[str, dict[str, Dataset]]:
    """Of "forget" and "retain": the "members" and the "held_out" images, as (image, text) rows.

    Raises:
        ValueError: no data set, no such split, one split for both, or a group without an image.
    """
    if concepts.source is None:
        raise ValueError("membership compares images of two splits: set train_data_dir or dataset_name")
    if options.split == evaluation.split:
        raise ValueError(f"membership.split and evaluation.split are both {options.split!r}: nothing is held out")
    groups: dict[str, dict[str, Dataset]] = {"forget": {}, "retain": {}}
    for side, split in (("members", options.split), ("held_out", evaluation.split)):
        loaded = load_rows(concepts, split)
        mine, _ = split_concepts(loaded, concepts.concept_column, concepts=concepts.concepts)
        for role, rows in (("forget", mine), ("retain", retained_rows(loaded, concepts, erased=erased))):
            if len(rows) == 0:
                raise ValueError(f"membership: split {split!r} has no {role} image")
            chosen = take_evenly(range(len(rows)), options.num_images, seed=options.seed)
            groups[role][side] = image_text(rows.select(chosen), concepts)
    return groups


@torch.no_grad()
def denoising_losses(pipeline: Any, images: Dataset, resolution: int, options: MembershipConfig) -> Tensor:
    """Mean denoising loss of each image under its caption, (N,), on the CPU: the same R noises at the same timesteps
    for every image and every pipeline, the latents at their posterior's mean.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    denoiser = PipelineDenoiser(pipeline)
    device = next(denoiser.network.parameters()).device
    mean, _ = encode_moments(pipeline.vae, images, image_column="image", resolution=resolution).chunk(2, dim=1)
    latents = (mean - denoiser.shift.cpu()) * denoiser.scale.cpu()
    captions = list(images["text"])
    distinct = sorted(set(captions))
    ids_N = torch.tensor([distinct.index(caption) for caption in captions])
    conditions = encode_prompts(pipeline, distinct)
    steps = (torch.arange(options.num_timesteps) + 0.5) / options.num_timesteps
    positions_R = (steps * denoiser.noising.num_train_timesteps).long().repeat(options.num_noises)
    generator = torch.Generator().manual_seed(options.seed)
    noises_R = torch.randn(len(positions_R), *latents.shape[1:], generator=generator)
    losses_N = torch.zeros(len(images), dtype=torch.float64)
    with autocast_denoiser(pipeline):
        for rows in tqdm(torch.arange(len(images)).split(options.batch_size), desc="denoising losses", leave=False):
            condition = {key: value[ids_N[rows]].to(device) for key, value in conditions.items()}
            for noise, position in zip(noises_R, positions_R, strict=True):
                drawn = denoiser.noising.at(latents[rows], noise.expand_as(latents[rows]), position.expand(len(rows)))
                inputs = (drawn.noisy.to(device), drawn.timesteps.to(device), condition)
                error = denoiser.predict(denoiser.network, *inputs).float().cpu() - drawn.target
                losses_N[rows] += error.square().flatten(1).mean(1).double() / len(positions_R)
    if not torch.isfinite(losses_N).all():
        raise FloatingPointError("membership: a denoising loss is not finite: the pipeline's weights are damaged")
    return losses_N


def member_below(members_M: np.ndarray, held_out_H: np.ndarray) -> np.ndarray:
    """Whether each member's loss is below each held-out image's, (M, H), ties half. Its mean is the area under ROC."""
    return (members_M[:, None] < held_out_H) + 0.5 * (members_M[:, None] == held_out_H)


def resample(below_MH: np.ndarray, options: MembershipConfig) -> np.ndarray:
    """Bootstrap of the area, (R,): members and held-out images each drawn with replacement, the same draws for every
    pipeline, so that what two of them give away can be compared pair by pair."""
    random = np.random.default_rng(options.seed)
    draws = [random.multinomial(n, np.full(n, 1 / n), options.num_resamples) / n for n in below_MH.shape]
    return ((draws[0] @ below_MH) * draws[1]).sum(1)


def with_interval(value: float, drawn_R: np.ndarray) -> dict[str, Any]:
    """A value with its 95 % bootstrap interval (percentiles); where all resamples agree it has no width, and says too
    little."""
    return {
        "value": round(float(value), 4),
        "interval_95": [round(float(end), 4) for end in np.quantile(drawn_R, [0.025, 0.975])],
    }


def found_at(members_M: np.ndarray, held_out_H: np.ndarray, false_positive_rate: float) -> dict[str, Any]:
    """Share of members below the largest threshold that at most this share of held-out images is below, in percent
    with a 95 % Wilson interval; the threshold is taken as it is."""
    allowed = int(false_positive_rate * len(held_out_H) + 1e-9)
    threshold = np.sort(held_out_H)[allowed]
    wrong = int((held_out_H < threshold).sum())
    return {**share(members_M < threshold), "false_positives": wrong, "num_held_out": len(held_out_H)}


def attack(losses: Mapping[str, Sides], options: MembershipConfig) -> dict[str, dict[str, Any]]:
    """What the losses of members (M,) and held-out images (H,) give away, by pipeline; under "change", where there are
    "before" and "after", by how much the area moved, with the interval of the paired difference."""
    found: dict[str, dict[str, Any]] = {}
    areas: dict[str, tuple[float, np.ndarray]] = {}
    for when, (members, held_out) in losses.items():
        sides = (members.numpy(), held_out.numpy())
        below_MH = member_below(*sides)
        areas[when] = (float(below_MH.mean()), resample(below_MH, options))
        found[when] = {
            "auc": with_interval(*areas[when]),
            "true_positive_rate": found_at(*sides, options.false_positive_rate),
            "loss_members": float(members.mean()),
            "loss_held_out": float(held_out.mean()),
        }
    if {"before", "after"} <= areas.keys():
        now, then = areas["after"], areas["before"]
        found["change"] = {"auc": with_interval(now[0] - then[0], now[1] - then[1])}
    return found


def membership(
    pipelines: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Dataset]],
    resolution: int,
    options: MembershipConfig,
    device: torch.device | str,
) -> dict[str, Any]:
    """The attack on each pipeline, "before" (if known) and "after", and its "change", for forget and retain images.

    Members and held-out images have to be drawn alike, or the loss tells the two splits apart without any membership:
    `details` says how many captions each group has and how many are in both; what the base gives away is in "before"
    and taken off in "change".

    Args:
        images: of `membership_images`.
    """
    losses: dict[str, dict[str, Sides]] = {role: {} for role in images}
    for when, pipeline in pipelines.items():
        pipeline.to(device)
        for role, sides in images.items():
            members, held_out = (
                denoising_losses(pipeline, sides[side], resolution=resolution, options=options) for side in SIDES
            )
            losses[role][when] = (members, held_out)
        pipeline.to("cpu")
    by_role = {role: attack(by_pipeline, options) for role, by_pipeline in losses.items()}
    whens = next(iter(by_role.values()))
    found = {when: {role: results[when] for role, results in by_role.items()} for when in whens}
    counts = {role: {side: len(rows) for side, rows in sides.items()} for role, sides in images.items()}
    hashes = {f"{role} {side}": images_hash(rows) for role, sides in images.items() for side, rows in sides.items()}
    captions = {role: caption_counts(sides) for role, sides in images.items()}
    rate = {"false_positive_rate": options.false_positive_rate}
    return {**found, "details": {"num_images": counts, "num_captions": captions, "images": hashes, **rate}}


def caption_counts(sides: Mapping[str, Dataset]) -> dict[str, int]:
    """Different captions of members, of held-out images, and of both."""
    captions = {side: set(rows["text"]) for side, rows in sides.items()}
    return {side: len(texts) for side, texts in captions.items()} | {"both": len(set.intersection(*captions.values()))}
