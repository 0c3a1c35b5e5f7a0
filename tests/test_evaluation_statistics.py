"""Intervals: closed forms where they exist, invariances where they do not."""

import math

import numpy as np
import pytest

from palate.evaluation.statistics import Interval, cluster_bootstrap, paired_difference, wilson, win_rate


def test_wilson_equals_the_root_of_its_defining_equation():
    """The bounds p solve (share - p)^2 = z^2 p (1 - p) / n, by definition of the score interval."""
    for successes, n in [(0, 7), (3, 10), (8, 10), (25, 25), (12.5, 40)]:
        estimate, low, high = wilson(successes, n)
        assert estimate == successes / n
        for bound in (low, high):
            assert (estimate - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, abs=1e-7)
        assert 0 <= low <= estimate <= high <= 1


def test_wilson_at_a_known_value():
    """8 of 10: Agresti and Coull's textbook interval (0.490, 0.943)."""
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=5e-5)


def test_wilson_refuses_nothing_and_too_much():
    with pytest.raises(ValueError, match="n > 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


def test_bootstrap_of_two_clusters_takes_the_extremes_that_it_can():
    """Clusters A = {1, 1}, B = {0}. Resamples: AA -> 1 (1/4), AB -> 2/3 (1/2), BB -> 0 (1/4); so 2.5 % is 0, 97.5 % is 1.

    With a 40 % interval both bounds are the middle one, 2/3 (ratio of sums, not mean of means, which would be 1/2).
    """
    values, clusters = [1.0, 1.0, 0.0], ["a", "a", "b"]
    assert cluster_bootstrap(values, clusters) == pytest.approx((2 / 3, 0.0, 1.0))
    assert cluster_bootstrap(values, clusters, confidence=0.4) == pytest.approx((2 / 3, 2 / 3, 2 / 3))


def test_bootstrap_width_agrees_with_the_normal_approximation():
    """400 independent values, half of them 1: s.e. = sqrt(1/4/400) = 0.025, so the interval is 0.5 +- 1.96 * 0.025."""
    interval = cluster_bootstrap([0.0, 1.0] * 200, resamples=4000)
    assert interval.estimate == 0.5
    assert interval.low == pytest.approx(0.5 - 0.049, abs=0.004)
    assert interval.high == pytest.approx(0.5 + 0.049, abs=0.004)


def test_copies_within_a_prompt_are_no_further_evidence():
    """Each value four times in its own cluster: the same interval. As independent rows it would be half as wide."""
    values = np.random.default_rng(1).normal(size=60)
    once = cluster_bootstrap(values, list(range(60)))
    copied = cluster_bootstrap(np.repeat(values, 4), np.repeat(np.arange(60), 4).tolist())
    naive = cluster_bootstrap(np.repeat(values, 4))
    assert copied == pytest.approx(once)
    assert naive.high - naive.low == pytest.approx((once.high - once.low) / 2, rel=0.15)


def test_bootstrap_repeats_with_its_seed_and_weights_are_copies():
    values = [0.0, 1.0, 5.0, 2.0, 2.0]
    assert cluster_bootstrap(values, seed=3) == cluster_bootstrap(values, seed=3)
    weighted = cluster_bootstrap([1.0, 3.0], ["a", "b"], weights=[3.0, 1.0])
    assert weighted == pytest.approx(cluster_bootstrap([1.0, 1.0, 1.0, 3.0], ["a", "a", "a", "b"]))
    assert weighted.estimate == pytest.approx(6 / 4)


def test_bootstrap_refuses_what_it_cannot_average():
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        cluster_bootstrap([1.0, math.nan])
    with pytest.raises(ValueError, match="n > 0"):
        cluster_bootstrap([])
    with pytest.raises(ValueError, match="per row"):
        cluster_bootstrap([1.0, 2.0], ["a"])


def test_win_rate_counts_a_tie_as_half():
    """Wins 2, ties 1, losses 1 of 4: (2 + 1/2) / 4; with ties up to 1 wide: win, tie, loss, win -> the same count."""
    assert win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0]).estimate == 2.5 / 4
    assert win_rate([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0], tie=1.0).estimate == (1 + 2 * 0.5) / 4


def test_win_rates_of_the_two_sides_add_to_one():
    a, b = np.random.default_rng(0).integers(0, 3, size=(2, 50))
    ours, theirs = win_rate(a, b), win_rate(b, a)
    assert ours.estimate + theirs.estimate == pytest.approx(1)
    assert ours.low == pytest.approx(1 - theirs.high, abs=0.02)


def test_paired_difference_removes_the_difficulty_of_prompts():
    """Prompts differ by 100s, ours is better by exactly 1 on each: the interval has no width."""
    theirs = np.arange(20) * 100.0
    assert paired_difference(theirs + 1, theirs) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="one of each a row"):
        paired_difference([1.0], [1.0, 2.0])


def test_intervals_print_for_people():
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert Interval(0.713, 0.66, 0.761).percent() == "71.3 % [66.0, 76.1]"
