"""Membership inference on a generator: does its denoising loss tell images that it learned from held-out ones?

The loss-threshold attack (arXiv 1709.01604): an image counts as a member if its loss is below a threshold. Its
power is the area under the ROC curve, and the share of members that it finds at a low false positive rate
(arXiv 2112.03570), here with every image under the same noises at the same timesteps.

Shapes: N images, M members, H held-out images, R draws of noise and timestep, c latent channels, h and w latent side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from barrier_diffusers.architectures import Diffusion
from barrier_diffusers.concepts import ConceptConfig
from barrier_diffusers.data import encode_moments, encode_prompts, split_concepts, take_evenly
from barrier_diffusers.erased import ErasedConcepts
from barrier_diffusers.evaluation.accuracy import share
from barrier_diffusers.evaluation.erasure import EvaluationConfig, image_text, load_rows, retained_rows
from barrier_diffusers.evaluation.post_attack import images_hash
from barrier_diffusers.generation import autocast_denoiser


@dataclass
class MembershipConfig:
    """Membership inference with the denoising loss."""

    enabled: bool = False
    split: str = "train"  # of the data: what the pipeline learned from; evaluation.split is what it did not
    num_images: int = 100  # of each of the four groups at most, drawn once
    num_timesteps: int = 10  # evenly over the schedule, without its ends
    num_noises: int = 2  # at each of them
    false_positive_rate: float = 0.05  # at which found members are counted
    num_resamples: int = 2000  # of the bootstrap that gives the interval of the area
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_images", "num_timesteps", "num_noises", "num_resamples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"membership.{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.false_positive_rate < 1:
            rate = self.false_positive_rate
            raise ValueError(f"membership.false_positive_rate is {rate}, but must be between 0 and 1")


def membership_images(
    options: MembershipConfig, evaluation: EvaluationConfig, concepts: ConceptConfig, erased: list[ErasedConcepts]
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
        loaded = load_rows(replace(evaluation, split=split), concepts)
        mine, _ = split_concepts(loaded, concepts.concept_column, concepts.concepts)
        for role, rows in (("forget", mine), ("retain", retained_rows(loaded, concepts, erased))):
            if len(rows) == 0:
                raise ValueError(f"membership: split {split!r} has no {role} image")
            chosen = take_evenly(range(len(rows)), options.num_images, options.seed)
            groups[role][side] = image_text(rows.select(chosen), concepts)
    return groups


@torch.no_grad()
def denoising_losses(pipeline: Any, images: Dataset, resolution: int, options: MembershipConfig) -> Tensor:
    """Mean denoising loss of each image under its caption, (N,), on the CPU: the same R noises at the same timesteps
    for every image and every pipeline, the latents at their posterior's mean.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    diffusion = Diffusion(pipeline)
    device = next(diffusion.denoiser.parameters()).device
    mean, _ = encode_moments(pipeline.vae, images, "image", resolution).chunk(2, dim=1)
    latents = (mean - diffusion.shift.cpu()) * diffusion.scale.cpu()
    captions = list(images["text"])
    distinct = sorted(set(captions))
    ids_N = torch.tensor([distinct.index(caption) for caption in captions])
    conditions = encode_prompts(pipeline, distinct)
    steps = (torch.arange(options.num_timesteps) + 0.5) / options.num_timesteps
    places_R = (steps * diffusion.noising.num_places).long().repeat(options.num_noises)
    generator = torch.Generator().manual_seed(options.seed)
    noises_R = torch.randn(len(places_R), *latents.shape[1:], generator=generator)
    losses_N = torch.zeros(len(images), dtype=torch.float64)
    with autocast_denoiser(pipeline):
        for rows in tqdm(torch.arange(len(images)).split(options.batch_size), desc="denoising losses", leave=False):
            condition = {key: value[ids_N[rows]].to(device) for key, value in conditions.items()}
            for noise, place in zip(noises_R, places_R, strict=True):
                drawn = diffusion.noising.at(latents[rows], noise.expand_as(latents[rows]), place.expand(len(rows)))
                inputs = (drawn.noisy.to(device), drawn.timesteps.to(device), condition)
                error = diffusion.predict(diffusion.denoiser, *inputs).float().cpu() - drawn.target
                losses_N[rows] += error.square().flatten(1).mean(1).double() / len(places_R)
    if not torch.isfinite(losses_N).all():
        raise FloatingPointError("membership: a denoising loss is not finite: the pipeline's weights are damaged")
    return losses_N


def area_under_roc(members_M: np.ndarray, held_out_H: np.ndarray, num_resamples: int, seed: int) -> dict[str, Any]:
    """Probability that a member's loss is below a held-out image's, ties half, with its 95 % bootstrap interval."""
    below_MH = (members_M[:, None] < held_out_H) + 0.5 * (members_M[:, None] == held_out_H)
    random = np.random.default_rng(seed)
    areas = []
    for _ in range(num_resamples):  # members and held-out images each with replacement
        weights = [random.multinomial(size, np.full(size, 1 / size)) / size for size in below_MH.shape]
        areas.append(weights[0] @ below_MH @ weights[1])
    interval = [round(float(end), 4) for end in np.quantile(areas, [0.025, 0.975])]
    return {"value": round(float(below_MH.mean()), 4), "interval_95": interval}


def found_at(members_M: np.ndarray, held_out_H: np.ndarray, false_positive_rate: float) -> dict[str, Any]:
    """Share of members below the largest threshold that at most this share of held-out images is below, in percent
    with a 95 % Wilson interval; the threshold is taken as it is."""
    allowed = int(false_positive_rate * len(held_out_H) + 1e-9)
    threshold = np.sort(held_out_H)[allowed]
    wrong = int((held_out_H < threshold).sum())
    return {**share(members_M < threshold), "false_positives": wrong, "num_held_out": len(held_out_H)}


def attack(members: Tensor, held_out: Tensor, options: MembershipConfig) -> dict[str, Any]:
    """What the losses of members (M,) and held-out images (H,) give away."""
    sides = (members.numpy(), held_out.numpy())
    return {
        "auc": area_under_roc(*sides, options.num_resamples, options.seed),
        "true_positive_rate": found_at(*sides, options.false_positive_rate),
        "loss_members": float(members.mean()),
        "loss_held_out": float(held_out.mean()),
    }


def membership(
    pipelines: Mapping[str, Any],
    images: Mapping[str, Mapping[str, Dataset]],
    resolution: int,
    options: MembershipConfig,
    device: torch.device | str,
) -> dict[str, Any]:
    """The attack on each pipeline, "before" (if known) and "after", for forget and retain images.

    Args:
        images: of `membership_images`.
    """
    found: dict[str, Any] = {}
    for when, pipeline in pipelines.items():
        pipeline.to(device)
        found[when] = {}
        for role, sides in images.items():
            losses = {side: denoising_losses(pipeline, rows, resolution, options) for side, rows in sides.items()}
            found[when][role] = attack(losses["members"], losses["held_out"], options)
        pipeline.to("cpu")
    counts = {role: {side: len(rows) for side, rows in sides.items()} for role, sides in images.items()}
    hashes = {f"{role} {side}": images_hash(rows) for role, sides in images.items() for side, rows in sides.items()}
    rate = {"false_positive_rate": options.false_positive_rate}
    return {**found, "details": {"num_images": counts, "images": hashes, **rate}}
