"""What to label next, and how much more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.errors import FeedbackError
from palate.feedback.label_plan import human_agreement, learning_curve, model_limit
from palate.feedback.selection import choose, ensemble_disagreement, expected_information
from palate.feedback.votes import Vote

# -- selection -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 60), st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0]), st.integers(0, 5))
def test_every_beginning_holds_the_random_share_and_nothing_comes_twice(n, share, seed):
    rng = np.random.default_rng(seed)
    found = choose(rng.normal(size=n), rng.integers(0, 7, size=n).tolist(), random_share=share, seed=seed)
    assert sorted(found.order.tolist()) == list(range(n))
    for k in range(n + 1):
        assert found.random[:k].sum() == math.floor(k * share + 1e-9)


def test_the_random_share_is_a_random_sample_whatever_the_values():
    """One in ten of 50 candidates, 2,000 seeds: each is drawn 200 times, +- 5 sd of sqrt(2000 * 0.1 * 0.9) = 13.4."""
    value, drawn = np.arange(50.0), np.zeros(50)
    for seed in range(2000):
        found = choose(value, list(range(50)), count=25, random_share=0.2, seed=seed)
        drawn[found.order[found.random]] += 1
    assert np.abs(drawn - 200).max() < 67


def test_prompts_take_turns():
    """Prompt a holds the three best pairs; without turns it would come three times first."""
    found = choose([9, 8, 7, 3, 2, 1], ["a", "a", "a", "b", "b", "c"], random_share=0.0)
    assert found.order.tolist() == [0, 3, 5, 1, 4, 2]


def test_what_is_not_eligible_is_never_asked():
    eligible = np.array([True, False, True, False, True])
    found = choose([1, 9, 2, 9, 3], list("abcde"), eligible=eligible)
    assert sorted(found.order.tolist()) == [0, 2, 4]
    assert len(choose([1, 9, 2, 9, 3], list("abcde"), eligible=eligible, count=2).order) == 2
    assert len(choose([1.0], ["a"], eligible=[False]).order) == 0


def test_same_seed_same_order_and_another_seed_another():
    value, prompts = np.ones(40), list(range(40))
    assert choose(value, prompts, seed=1).order.tolist() == choose(value, prompts, seed=1).order.tolist()
    assert choose(value, prompts, seed=1).order.tolist() != choose(value, prompts, seed=2).order.tolist()


def test_disagreement_by_hand():
    """Margins 1, 1, -2: variance (1 + 1 + 4) / 2 = 3; votes 2 : 1. Equal margins: nothing."""
    margins = [[1.0, 2.0], [1.0, 2.0], [-2.0, 2.0]]
    assert ensemble_disagreement(margins).tolist() == pytest.approx([3.0, 0.0])
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert ensemble_disagreement(margins, "vote_entropy").tolist() == pytest.approx([entropy, 0.0])


def test_expected_information_against_a_slow_integral():
    """H(E p) - E H(p) by a fine sum over the normal density."""
    for mean, sd in [(0.0, 1.0), (1.5, 0.5), (-2.0, 2.0)]:
        x = np.linspace(mean - 9 * sd, mean + 9 * sd, 200_001)
        weight = np.exp(-(((x - mean) / sd) ** 2) / 2)
        weight /= weight.sum()
        p = 1 / (1 + np.exp(-x))

        def entropy(q):
            return -(q * np.log(q) + (1 - q) * np.log(1 - q))

        wanted = entropy((p * weight).sum()) - (entropy(p) * weight).sum()
        assert expected_information([mean], [sd])[0] == pytest.approx(wanted, abs=1e-4)


def test_a_known_difference_teaches_nothing_and_an_unknown_one_the_most():
    """Known and even (people differ): 0. The same mean, ever less known: ever more. Known by far: little."""
    found = expected_information([0.0, 0.0, 0.0, 8.0], [0.0, 1.0, 3.0, 1.0])
    assert found[0] == pytest.approx(0, abs=1e-12)
    assert found[0] < found[1] < found[2] < math.log(2)
    assert found[3] < 0.01


def test_selection_refuses_what_does_not_fit():
    with pytest.raises(FeedbackError, match="finite"):
        choose([math.nan], ["a"])
    with pytest.raises(FeedbackError, match="share"):
        choose([1.0], ["a"], random_share=1.5)
    with pytest.raises(FeedbackError, match="two models"):
        ensemble_disagreement([[1.0, 2.0]])
    with pytest.raises(FeedbackError, match="sd >= 0"):
        expected_information([0.0], [-1.0])


# -- label plan ------------------------------------------------------------------------------------------------------

SIZES = [100, 200, 400, 800, 1600, 3200, 6400]


def curve(n, ceiling=0.8, a=1.6, b=0.5):
    return ceiling - a * np.asarray(n, dtype=float) ** -b


def held_out(sizes, pairs, seed=0, **shape):
    """The same pairs for each size: a pair is right where its own uniform number is below the accuracy."""
    luck = np.random.default_rng(seed).random(pairs)
    return (luck < curve(sizes, **shape)[:, None]).astype(float)


def test_a_planted_curve_is_found():
    """Evenly spread luck instead of random: accuracies are exact to 1/40,000, so the fit has to be near too."""
    luck = (np.arange(40_000) + 0.5) / 40_000
    outcomes = (luck < curve(SIZES)[:, None]).astype(float)
    found = learning_curve(SIZES, outcomes, resamples=200)
    assert not found.why_not
    assert found.ceiling.estimate == pytest.approx(0.8, abs=0.003)
    assert found.exponent.estimate == pytest.approx(0.5, abs=0.03)
    assert found.accuracy_at(20_000).estimate == pytest.approx(float(curve(20_000)), abs=0.003)
    assert found.gain(6400).estimate == pytest.approx(float(curve(12_800) - curve(6400)), abs=0.002)
    # 0.79 = 0.8 - 1.6 n^-1/2 at n = 160^2
    assert found.labels_for(0.79).estimate == pytest.approx(25_600, rel=0.25)


def test_its_interval_covers_the_truth_outside_the_measured():
    """20 sets of held-out pairs; the truth at twice the labels must be inside in 15 or more."""
    hits = 0
    for seed in range(20):
        found = learning_curve(SIZES, held_out(SIZES, 4000, seed), ceiling=0.8, resamples=200, seed=seed)
        if found.why_not:
            continue
        interval = found.accuracy_at(12_800)
        hits += interval.low <= float(curve(12_800)) <= interval.high
    assert hits >= 15


def test_no_extrapolation_without_a_rise():
    flat = held_out(SIZES, 500, a=0.0)
    found = learning_curve(SIZES, flat, resamples=200)
    assert any("rise" in reason for reason in found.why_not)
    with pytest.raises(FeedbackError, match="beyond the measured 6400"):
        found.accuracy_at(12_800)
    with pytest.raises(FeedbackError, match="beyond the measured"):
        found.gain(1000)


def test_no_extrapolation_from_three_sizes_or_a_short_span():
    for sizes in ([100, 1000, 10_000], [100, 150, 200, 300, 400]):
        found = learning_curve(sizes, held_out(sizes, 4000), resamples=200)
        assert any("span a factor" in reason for reason in found.why_not)


def test_a_straight_line_in_the_logarithm_has_no_ceiling_to_find():
    """0.5 + 0.04 log n: the fit wants an exponent at zero, or a ceiling at one, and says so."""
    luck = (np.arange(20_000) + 0.5) / 20_000
    outcomes = (luck < (0.4 + 0.04 * np.log(SIZES))[:, None]).astype(float)
    found = learning_curve(SIZES, outcomes, resamples=200)
    assert any("end of its range" in reason or "ceiling is 1" in reason for reason in found.why_not)


def test_far_away_and_out_of_reach_are_refused():
    luck = (np.arange(40_000) + 0.5) / 40_000
    found = learning_curve(SIZES, (luck < curve(SIZES)[:, None]).astype(float), resamples=200)
    with pytest.raises(FeedbackError, match="10 times"):
        found.accuracy_at(100_000)
    with pytest.raises(FeedbackError, match="no number reaches it"):
        found.labels_for(0.9)
    with pytest.raises(FeedbackError, match="measured from 100"):
        found.accuracy_at(10)


def test_copies_of_held_out_pairs_do_not_narrow_the_interval():
    outcomes = held_out(SIZES, 400)
    once = learning_curve(SIZES, outcomes, list(range(400)), ceiling=0.8, resamples=300)
    copied = learning_curve(
        SIZES, np.repeat(outcomes, 5, axis=1), np.repeat(range(400), 5).tolist(), ceiling=0.8, resamples=300
    )
    assert copied.rise == pytest.approx(once.rise)


def test_human_agreement_by_hand():
    """Pair one: left x, left x (shown turned), other: agreeing pairs 1 of 3. Pair two: 1 of 1; ties do not count. 2/4."""
    votes = [
        Vote("p", "x", "y", "left", "anna"),
        Vote("p", "y", "x", "right", "bo"),
        Vote("p", "x", "y", "right", "cy"),
        Vote("q", "x", "y", "left", "anna"),
        Vote("q", "x", "y", "left", "bo"),
        Vote("q", "x", "y", "tie", "cy"),
    ]
    assert human_agreement(votes).estimate == pytest.approx(0.5)
    with pytest.raises(FeedbackError, match="two people"):
        human_agreement(votes[:1])


@given(st.lists(st.floats(0.5, 1.0), min_size=1, max_size=20))
def test_no_model_exceeds_the_limit_that_agreement_sets(shares):
    """Pairs with shares p: agreement is the mean of p^2 + (1 - p)^2, the best accuracy the mean of p."""
    p = np.array(shares)
    assert p.mean() <= model_limit(min(1.0, max(0.5, float((p**2 + (1 - p) ** 2).mean())))) + 1e-9
