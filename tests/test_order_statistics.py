"""The distribution-free bound: chosen on one part of the images, held against the other."""

import numpy as np
import pytest
import torch
from scipy import stats

from barrier_diffusers.protection.certificate import Certificate
from barrier_diffusers.protection.order_statistics import (
    Split,
    attainable_quantile,
    chance_of_exceedances,
    distribution_free,
    order_statistic,
    samples_needed,
)

LAWS = {
    "lognormal": stats.lognorm(2).ppf,
    "cauchy": stats.cauchy.ppf,
    "two values": lambda uniform: (uniform > 0.96) * 1.0,
    "uniform": lambda uniform: uniform,
}


@pytest.mark.parametrize(("quantile", "confidence", "n"), [(0.9, 0.95, 60), (0.95, 0.9, 200), (0.99, 0.95, 500)])
def test_order_statistic_covers_with_the_stated_confidence(quantile, confidence, n):
    rank = order_statistic(n, quantile, confidence)
    rng = np.random.default_rng(0)
    samples = np.sort(rng.uniform(size=(8000, n)), axis=1)  # the p-quantile of a uniform variable is p
    coverage = (samples[:, rank - 1] >= quantile).mean()
    assert coverage >= confidence - 0.01
    assert (samples[:, rank - 2] >= quantile).mean() < confidence + 0.01  # and no smaller rank does


def test_too_few_samples_are_said_to_be_too_few():
    assert samples_needed(0.99, 0.95) == 299
    assert order_statistic(298, 0.99, 0.95) is None and order_statistic(299, 0.99, 0.95) == 299
    few = distribution_free(torch.rand(10), 0.99, 0.95, Split())
    assert few.certified is None and few.coverage is None and few.tightness is None
    assert (few.num_calibration, few.num_test, few.chance) == (6, 4, None)
    with pytest.raises(ValueError, match="quantile must lie strictly between 0 and 1"):
        order_statistic(100, 1.0, 0.95)
    for count in (1, 7, 298, 299, 540):
        assert order_statistic(count, attainable_quantile(count, 0.95) - 1e-9, 0.95) is not None


@pytest.mark.parametrize("law", LAWS)
def test_what_the_calibration_images_choose_covers_whatever_the_distribution(law):
    rng, n, quantile, confidence, draws = np.random.default_rng(1), 150, 0.95, 0.9, 1500
    samples = torch.from_numpy(LAWS[law](rng.uniform(size=(draws, n))))
    truth = float(LAWS[law](np.array(quantile)))
    found = [distribution_free(sample, quantile, confidence, Split(seed=3)) for sample in samples]
    covered = np.mean([entry.certified >= truth - 1e-9 for entry in found])
    assert covered >= confidence - 3 * np.sqrt(confidence * (1 - confidence) / draws)
    kept = np.mean([entry.coverage for entry in found])  # by images that had no part in the choice
    assert kept >= quantile
    assert np.mean([entry.chance < 0.05 for entry in found]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / draws)


def test_test_images_have_no_part_in_the_choice():
    split, values = Split(0.6, seed=4), torch.arange(100.0)
    calibration, test = split.parts(100)
    assert len(calibration) == 60 and sorted(calibration + test) == list(range(100))
    assert split.parts(100) == (calibration, test) != Split(0.6, seed=5).parts(100)
    found = distribution_free(values, 0.9, 0.9, split)
    rank = order_statistic(60, 0.9, 0.9)
    assert found.certified == calibration[rank - 1] and found.largest_calibration == max(calibration)
    assert found.num_above == sum(value > found.certified for value in test)
    assert found.coverage == 1 - found.num_above / 40 and found.largest_test == max(test)
    assert found.tightness == found.certified / max(test) and found.mean == 49.5
    wild = values.clone()
    wild[test] = 1e6
    other = distribution_free(wild, 0.9, 0.9, split)
    assert other.certified == found.certified and other.coverage == 0.0
    assert other.chance < 1e-9 and found.chance > 0.01 and found.num_distinct == 100 and other.num_distinct == 61
    certificate = Certificate([], other, 0.9, 0.9, split, found)
    assert certificate.contradicted == ["network"] and certificate.to_dict()["contradicted"] == ["network"]


def test_the_chance_of_exceedances_by_simulation():
    rng = np.random.default_rng(2)
    values = rng.uniform(size=(40000, 50))
    for rank in (30, 28):
        bound = np.sort(values[:, :30], axis=1)[:, rank - 1]
        above = (values[:, 30:] > bound[:, None]).sum(1)
        for count in (0, 1, 3):
            assert chance_of_exceedances(count, 20, 30, rank) == pytest.approx((above >= count).mean(), abs=0.01)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_very_few_images(count):
    found = distribution_free(torch.arange(1.0, count + 1), 0.05, 0.5, Split(0.9))
    assert found.num_calibration == max(1, count - 1) and found.num_test == min(1, count - 1)
    assert (found.largest_test is None) == (found.coverage is None) == (count == 1)
    assert found.largest == count


@pytest.mark.parametrize("calibration", [0.0, 1.0, -1.0])
def test_a_part_must_be_a_part(calibration):
    with pytest.raises(ValueError, match="calibration must lie strictly between 0 and 1"):
        Split(calibration)
