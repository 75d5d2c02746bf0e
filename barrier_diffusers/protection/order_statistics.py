"""The distribution-free bound (docs/method.md section 6): chosen on some held-out images, checked on the rest.

A bound that is an order statistic of some drifts says nothing when it is held against the largest of the same drifts;
so the calibration images choose it, and only the test images, which had no part in that, show whether it is kept and
how tight it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import binom, binomtest, nhypergeom
from torch import Tensor


def order_statistic(num_samples: int, quantile: float, confidence: float) -> int | None:
    """The smallest r such that the r-th smallest of `num_samples` independent values is at least their distribution's
    `quantile` with probability `confidence` (exact binomial); None if there are too few samples.

    Raises:
        ValueError: quantile or confidence outside (0, 1).
    """
    for name, value in (("quantile", quantile), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, not {value}")
    rank = int(binom.ppf(confidence, num_samples, quantile)) + 1
    return rank if rank <= num_samples else None


def samples_needed(quantile: float, confidence: float) -> int:
    """The fewest samples for which `order_statistic` finds a rank: quantile^n <= 1 - confidence."""
    return math.ceil(math.log(1 - confidence) / math.log(quantile))


def attainable_quantile(num_samples: int, confidence: float) -> float:
    """The largest quantile for which `order_statistic` finds a rank among so few samples."""
    return (1 - confidence) ** (1 / num_samples)


def chance_of_exceedances(num_above: int, num_test: int, num_calibration: int, rank: int) -> float:
    """Probability that at least `num_above` of `num_test` values lie above the `rank`-th smallest of `num_calibration`
    others, if all are drawn from one distribution (negative hypergeometric; ties make it smaller)."""
    above_it = num_calibration - rank + 1  # calibration values down to that one, seen from the top
    return float(nhypergeom(num_test + num_calibration, num_test, above_it).sf(num_above - 1))


@dataclass(frozen=True)
class Split:
    """Which held-out images choose the distribution-free bound; the others check it."""

    calibration: float = 0.6  # share of the images that choose it, in (0, 1)
    seed: int = 0  # of the draw

    def __post_init__(self) -> None:
        if not 0 < self.calibration < 1:
            raise ValueError(f"calibration must lie strictly between 0 and 1, not {self.calibration}")

    def num_calibration(self, num_images: int) -> int:
        """How many of the images choose the bound: at least one, and of two or more not all."""
        return max(1, min(round(self.calibration * num_images), num_images - 1))

    def parts(self, num_images: int) -> tuple[list[int], list[int]]:
        """(calibration, test): row numbers, in order."""
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(self.seed)).tolist()
        count = self.num_calibration(num_images)
        return sorted(order[:count]), sorted(order[count:])


@dataclass(frozen=True)
class RelativeDrift:
    """With `confidence`, a new image's drift stays below `certified` with probability at least the quantile."""

    certified: float | None  # order statistic of the calibration images; None: too few
    num_calibration: int
    largest_calibration: float
    num_test: int
    largest_test: float | None  # None: no test image
    num_above: int  # test images above `certified`
    coverage: float | None  # share of the test images that are not
    coverage_interval_95: tuple[float, float] | None  # exact (Clopper-Pearson)
    chance: float | None  # `chance_of_exceedances`: tiny where calibration and test images are not alike
    tightness: float | None  # certified / largest_test
    mean: float  # of all images, as the next two
    largest: float
    num_images: int
    num_distinct: int  # different drifts among them: few where a map reads nothing but the prompt


def distribution_free(values: Tensor, quantile: float, confidence: float, split: Split) -> RelativeDrift:
    """Certify the order statistic of the calibration images' drifts, and hold it against the test images' (images are
    independent, the rows of one image are not).

    Args:
        values: one drift per image (N,).
    """
    chosen, others = split.parts(len(values))
    calibration, test = values[chosen], values[others]
    rank = order_statistic(len(calibration), quantile, confidence)
    certified = None if rank is None else float(calibration.sort().values[rank - 1])
    above, coverage, interval, chance = 0, None, None, None
    if rank is not None and certified is not None and len(test):
        above = int((test > certified).sum())
        ends = binomtest(len(test) - above, len(test)).proportion_ci(0.95, method="exact")
        coverage, interval = 1 - above / len(test), (float(ends.low), float(ends.high))
        chance = chance_of_exceedances(above, len(test), len(calibration), rank)
    largest_test = float(test.max()) if len(test) else None
    return RelativeDrift(
        certified=certified,
        num_calibration=len(calibration),
        largest_calibration=float(calibration.max()),
        num_test=len(test),
        largest_test=largest_test,
        num_above=above,
        coverage=coverage,
        coverage_interval_95=interval,
        chance=chance,
        tightness=certified / largest_test if certified is not None and largest_test else None,
        mean=float(values.mean()),
        largest=float(values.max()),
        num_images=len(values),
        num_distinct=len(values.unique()),
    )
