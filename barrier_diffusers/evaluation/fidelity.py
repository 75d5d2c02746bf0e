"""FID and KID between two sets of byte images, by torchmetrics, named after their feature extractor.

Bytes go to the extractor as they are: no image is stretched to its own minimum and maximum. Features are computed once
for both metrics, and those of the reference set are cached.

Shapes: N images of a set, D features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from barrier_diffusers.data.encoding import cached_tensors
from barrier_diffusers.data.images import Images, ImageSet, as_image_set
from barrier_diffusers.evaluation.extractors import Extractor, split_spec
from barrier_diffusers.utils.checks import EXTRACTOR, FOLDER, OUTPUT, SEED, at_least, check_settings, rules
from barrier_diffusers.utils.run_records import fingerprint


@dataclass
class FidelityConfig:
    """How generated images are compared with a reference set."""

    extractors: list[str] = field(default_factory=list)  # NAME or NAME=PATH of extractors.py; empty: not compared
    reference_dir: str | None = None  # folder of images; None: the images of the evaluation split
    batch_size: int = 64  # images in the extractor at once
    kid_subsets: int = 100  # random subsets that KID's mean and standard deviation are taken over
    kid_subset_size: int = 1000  # images of a subset; the smaller set, if it has fewer
    seed: int = 0  # draws the subsets
    cache_dir: str | None = None  # of the reference's features; None: none

    SECTION = "fidelity."
    RULES = rules(
        extractors=EXTRACTOR,
        reference_dir=FOLDER,
        batch_size=at_least(1),
        kid_subsets=at_least(1),
        kid_subset_size=at_least(2),
        seed=SEED,
        cache_dir=OUTPUT,
    )

    def __post_init__(self) -> None:
        names = [split_spec(spec)[0] for spec in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(f"fidelity.extractors names one twice, but names the metric: {', '.join(names)}")
        check_settings(self)


class Given(nn.Module):
    """The extractor that torchmetrics sees: features (N, D) that are known already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features, unchanged."""
        return features


def frechet_distance(reference_ND: Tensor, features_ND: Tensor) -> float:
    """FID of two sets of features, in double precision."""
    metric = FrechetInceptionDistance(Given(features_ND.shape[1]))
    metric.update(reference_ND.double(), real=True)
    metric.update(features_ND.double(), real=False)
    return float(metric.compute())


def kernel_distance(
    reference_ND: Tensor, features_ND: Tensor, subsets: int, subset_size: int, seed: int
) -> dict[str, float]:
    """Mean and standard deviation over random subsets of KID, whose expectation for equal distributions is 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which are here anyway
        metric = KernelInceptionDistance(Given(features_ND.shape[1]), subsets, subset_size)
    metric.update(reference_ND.double(), real=True)
    metric.update(features_ND.double(), real=False)
    with torch.random.fork_rng():  # torchmetrics draws the subsets from the global generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return {"mean": round(float(mean), 8), "std": round(float(std), 8)}


def reference_features(reference: ImageSet, extractor: Extractor, batch_size: int, cache: Path | None) -> Tensor:
    """Features (N, D) of the reference set, read from the cache where the same images and extractor left them."""
    if cache is None:
        return extractor.features(reference, batch_size)
    device = next(extractor.parameters()).device.type
    key = fingerprint(reference.digest(), extractor.facts(), batch_size, device)
    path = cache / f"features-{extractor.name}-{key}.safetensors"
    return cached_tensors(path, lambda: {"features": extractor.features(reference, batch_size)})["features"]


def fidelity(
    reference: Images,
    images: Images,
    extractor: Extractor,
    options: FidelityConfig | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """FID and KID of `images` against `reference`; lower is nearer.

    Args:
        reference, images: byte images (N, H, W, 3) or (N, 3, H, W), a folder, or an ImageSet; sizes may differ, as
            the extractor resamples.
        extractor: of `get_extractor`, or an `Extractor` of one's own.
        options: batch size and KID's subsets.
        cache: folder that keeps the reference's features, under a hash of images and extractor.

    Returns:
        `fid_<extractor>`, `kid_<extractor>` {mean, std}, and under `details` both counts, the extractor's facts (name,
        preprocessing, hash of weights), KID's subsets and `warnings` about what the counts cannot carry.

    Raises:
        ValueError: fewer than two images in a set.
        FloatingPointError: non-finite features.
    """
    options = options or FidelityConfig()
    reference, images = as_image_set(reference), as_image_set(images)
    require_two(len(reference), len(images))
    reference_ND = reference_features(reference, extractor, batch_size=options.batch_size, cache=cache)
    return compare_features(
        reference_ND, extractor.features(images, options.batch_size), extractor=extractor, options=options
    )


def require_two(num_reference_images: int, num_images: int) -> dict[str, int]:
    """Both counts by name.

    Raises:
        ValueError: one is below two.
    """
    counts = {"num_reference_images": num_reference_images, "num_images": num_images}
    for what, count in counts.items():
        if count < 2:
            raise ValueError(f"FID and KID need at least two images in each set, but {what} is {count}")
    return counts


def compare_features(
    reference_ND: Tensor, features_ND: Tensor, extractor: Extractor, options: FidelityConfig
) -> dict[str, Any]:
    """What `fidelity` returns, from features that are at hand.

    Raises:
        ValueError: fewer than two images in a set.
    """
    counts = require_two(len(reference_ND), len(features_ND))
    smaller = min(counts.values())
    size = min(options.kid_subset_size, smaller)
    notes = []
    if smaller <= extractor.num_features:
        notes.append(
            f"FID: {smaller} images do not determine the covariance of {extractor.num_features} features (its rank is "
            f"at most {smaller - 1}), so the number is biased upwards; compare it at equal counts only, or use KID"
        )
    if size == smaller:
        notes.append(f"KID: a subset holds all {smaller} images of the smaller set, so its std says too little")
    name, subsets = extractor.name, {"kid_subsets": options.kid_subsets, "kid_subset_size": size, "seed": options.seed}
    facts = {**counts, **extractor.facts(), "batch_size": options.batch_size, **subsets, "warnings": notes}
    return {
        f"fid_{name}": round(frechet_distance(reference_ND, features_ND), 6),
        f"kid_{name}": kernel_distance(
            reference_ND, features_ND, subsets=options.kid_subsets, subset_size=size, seed=options.seed
        ),
        "details": facts,
    }


def fidelity_by(
    extractors: Sequence[Extractor], reference: Images, images: Images, options: FidelityConfig, cache: Path | None
) -> dict[str, Any]:
    """`fidelity` by several extractors, `details` by their names."""
    metrics: dict[str, Any] = {}
    details = {}
    for extractor in extractors:
        found = fidelity(reference, images, extractor=extractor, options=options, cache=cache)
        details[extractor.name] = found.pop("details")
        metrics |= found
    return {**metrics, "details": details}
