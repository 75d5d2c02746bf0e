"""The attack gap between an erased model and a control, and which attackers survive a grid's first round, by hand."""

import numpy as np
import pytest

from barrier_diffusers.evaluation.attack_gap import attack_gap, gap_between, paired_interval, steps_to_half
from barrier_diffusers.evaluation.attacks.cells import CellResult, Seen
from barrier_diffusers.evaluation.attacks.running import AttackResults, clearly_beaten, is_broken, survivors


def seen(steps, shown, num=20, retained=None):
    """`shown` of `num` images show the concept."""
    right = None if retained is None else [True] * retained + [False] * (10 - retained)
    return Seen(steps, [True] * shown + [False] * (num - shown), 0.9, right, None if right is None else 0.8)


def result(variant, *marks):
    return CellResult("erased", "relearning", "sneaker", variant, {}, 1.0, marks=list(marks))


def test_half_of_the_images():
    assert steps_to_half({10: 0.0, 40: 100.0}) == 20.0  # half way in the logarithm
    assert steps_to_half({5: 60.0, 10: 90.0}) == 5.0
    assert steps_to_half({5: 10.0, 10: 49.9}) is None
    assert steps_to_half({10: 25.0, 5: 0.0, 20: 75.0}) == pytest.approx(10 * 2**0.5, abs=0.01)


def test_the_difference_of_two_shares_has_newcombes_interval():
    """Newcombe's own example (1998, table II, method 10): 56 of 70 against 48 of 80, 0.2 (0.0524, 0.3339)."""
    found = gap_between(seen(1, 56, 70), seen(1, 48, 80))
    assert found["gap"]["value"] == 20.0
    assert found["gap"]["interval_95"] == pytest.approx([5.24, 33.39], abs=0.01)


def test_the_paired_interval():
    assert paired_interval(np.ones(5)) == [100.0, 100.0] and paired_interval(np.ones(1)) is None
    differences = np.array([1.0, 0.0] * 50)
    low, high = paired_interval(differences)
    half = 1.96 * 100 * differences.std() / 10  # of the mean of a hundred, in points
    assert (low, high) == pytest.approx((50 - half, 50 + half), abs=2)


def test_the_gap_is_between_the_strongest_of_each_side():
    erased = AttackResults([result("a", seen(5, 4), seen(40, 12)), result("b", seen(5, 8), seen(40, 10))], [])
    control = AttackResults([result("a", seen(5, 2), seen(40, 2)), result("b", seen(5, 0), seen(40, 6))], [])
    found = attack_gap(erased, control, 0, 0)
    assert found["strongest"]["erased"]["value"] == 60.0 and found["strongest"]["control"]["value"] == 30.0
    assert found["strongest"]["erased_attacker"] == "a, 40 steps"
    assert found["strongest"]["control_attacker"] == "b, 40 steps"
    assert {steps: at["gap"]["value"] for steps, at in found["marks"].items()} == {"5": 30.0, "40": 30.0}
    assert found["mean_strongest"]["value"] == 30.0
    assert found["mean_attackers"]["value"] == pytest.approx((10 + 50 + 40 + 20) / 4)  # the same attacker, each mark
    half = found["half"]  # erased: 40 % after 5 steps, 60 % after 40; the control never
    assert half["erased"] == pytest.approx((5 * 40) ** 0.5, abs=0.01) and half["control"] is None
    assert half["bound"] == "at_most" and half["ratio"] == pytest.approx(half["erased"] / 40, abs=0.001)


def test_marks_beyond_the_early_ones_do_not_count_for_the_mean():
    erased = AttackResults([result("a", seen(5, 4), seen(200, 20))], [])
    control = AttackResults([result("a", seen(5, 2), seen(200, 0))], [])
    found = attack_gap(erased, control, 0, 0)
    assert found["mean_strongest"]["marks"] == [5] and found["mean_strongest"]["value"] == 10.0


def test_a_model_that_an_attacker_breaks_has_not_resisted():
    broken, whole = seen(5, 0, retained=1), seen(5, 10, retained=9)
    assert is_broken(broken, 45) and not is_broken(whole, 45) and not is_broken(seen(5, 0), 45)
    erased = AttackResults([result("a", broken), result("b", whole)], [])
    control = AttackResults([result("a", whole), result("b", whole)], [])
    found = attack_gap(erased, control, 45, 45)
    assert found["mean_attackers"]["value"] == 0.0  # without a, in which the control would have won
    assert (found["mean_attackers"]["num_pairs"], found["mean_attackers"]["num_broken"]) == (1, 1)


def test_a_side_whose_attackers_all_failed_has_no_gap():
    nothing, something = AttackResults([result("a")], []), AttackResults([result("a", seen(5, 1))], [])
    assert attack_gap(nothing, something, 0, 0) == {"failed": ["erased"]}


def test_the_strongest_is_among_those_with_all_images():
    few, many = result("few", seen(5, 10, 10)), result("many", seen(5, 12, 20))
    results = AttackResults([few], [many])
    assert results.strongest == (many, many.marks[0]) and results.whole == [many]


def test_who_survives_the_first_round():
    cells = [
        result("slow", seen(5, 0), seen(40, 19)),
        result("fast", seen(5, 12), seen(40, 10)),
        result("beaten", seen(5, 0), seen(40, 0)),
        result("failed"),
        result("second", seen(5, 10), seen(40, 18)),
    ]
    assert clearly_beaten(cells[2].marks[1], cells[0].marks[1])
    assert not clearly_beaten(cells[4].marks[0], cells[1].marks[0])
    assert survivors(cells, 10) == [0, 1, 4]  # neither the beaten nor the failed, though there is room
    assert survivors(cells, 2) == [0, 1]  # the best at each mark
    assert survivors(cells, 0) == []
