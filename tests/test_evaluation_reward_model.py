"""Reward model figures against numbers derived by hand."""

import json
import math

import numpy as np
import pytest

from palate.evaluation.reward_model import (
    evaluate_reward_model,
    expected_calibration_error,
    length_correlation,
    negative_log_likelihood,
    pair_accuracy,
    reliability,
    swap_test,
)


def test_accuracy_gives_a_tie_one_half():
    assert pair_accuracy([1.0, 2.0, 0.0], [0.0, 2.0, 5.0]).tolist() == [1.0, 0.5, 0.0]


def test_nll_of_knowing_nothing_is_log_two_and_of_log_odds_is_their_log_probability():
    """d = log 3 is a probability of 3/4: -log(3/4); d = -log 3 gives -log(1/4)."""
    assert negative_log_likelihood([0.0, 0.0]) == pytest.approx(math.log(2))
    assert negative_log_likelihood([math.log(3), -math.log(3)]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert negative_log_likelihood([-2000.0]) == pytest.approx(2000.0)


def test_calibration_error_by_hand():
    """d = log 3 four times (confidence 3/4, right 3 of 4 -> error 0) and d = log 9 twice (confidence 0.9, right 1 of 2
    -> error 0.4): ECE = 2/6 * 0.4."""
    d = [math.log(3)] * 3 + [-math.log(3)] + [math.log(9), -math.log(9)]
    diagram = reliability(d, bins=10)
    assert [b.pairs for b in diagram] == [4, 2]
    assert [b.confidence for b in diagram] == pytest.approx([0.75, 0.9])
    assert [b.accuracy for b in diagram] == pytest.approx([0.75, 0.5])
    assert expected_calibration_error(diagram) == pytest.approx(2 / 6 * 0.4)


def test_a_tie_lies_in_the_first_bin_and_is_half_right_and_certainty_in_the_last():
    tie, sure = reliability([0.0, 100.0], bins=5)
    assert (tie.low, tie.confidence, tie.accuracy) == (0.5, 0.5, 0.5)
    assert sure.high == pytest.approx(1.0)
    assert sure.accuracy == 1.0


def test_forecasts_that_mean_what_they_say_have_a_small_calibration_error():
    """Outcomes drawn from sigmoid(d) itself; doubling d afterwards is over-confident and must show."""
    rng = np.random.default_rng(0)
    d = rng.normal(scale=1.5, size=20_000)
    outcome = np.where(rng.random(20_000) < 1 / (1 + np.exp(-d)), d, -d)
    assert expected_calibration_error(reliability(outcome)) < 0.015
    assert expected_calibration_error(reliability(2 * outcome)) > 0.06


def test_a_model_that_only_counts_words_is_found_out():
    """Scores = lengths; three of four pairs chose the longer one: it is right exactly there, and nowhere else."""
    report = evaluate_reward_model(
        [5, 6, 7, 2], [1, 2, 3, 9], chosen_length=[5, 6, 7, 2], rejected_length=[1, 2, 3, 9], prompts=list("aabb")
    )
    assert report.accuracy.estimate == report.length.longer_wins.estimate == 0.75
    assert report.length.accuracy_longer_chosen.estimate == 1.0
    assert report.length.accuracy_shorter_chosen.estimate == 0.0
    assert report.length.correlation == pytest.approx(1.0)
    assert report.length.correlation_within == pytest.approx(1.0)
    assert report.margin == (4 + 4 + 4 - 7) / 4
    assert json.loads(json.dumps(report.as_dict()))["accuracy"]["estimate"] == 0.75


def test_length_correlation_within_ignores_what_differs_between_prompts():
    """Prompt b's answers are long and score high; within each pair the shorter one scores higher: -1 within."""
    report = evaluate_reward_model(
        [1.0, 11.0], [0.0, 10.0], chosen_length=[5, 50], rejected_length=[6, 51], prompts=["a", "b"]
    )
    assert report.length.correlation > 0.9
    assert report.length.correlation_within == pytest.approx(-1.0)
    assert report.length.accuracy_longer_chosen is None


def test_length_correlation_of_constants_is_zero():
    assert length_correlation([1.0, 1.0], [3, 4]) == 0.0
    assert length_correlation([1.0, 2.0, 3.0], [3, 2, 1]) == pytest.approx(-1.0)


def test_without_lengths_nothing_is_claimed_about_them():
    report = evaluate_reward_model([1.0], [0.0])
    assert report.pairs == 1
    assert report.length is None


def test_swap_test_finds_a_judge_that_prefers_the_first():
    """Pair 1: a both times (0.8; then b first has 0.2): consistent. Pair 2: the first one both times: not. Pair 3: tie
    both times: consistent. First wins: yes, no | yes, yes | half, half = 4/6. Deviations 0, 0.4, 0."""
    report = swap_test([0.8, 0.7, 0.5], [0.2, 0.7, 0.5])
    assert report.consistent == pytest.approx(2 / 3)
    assert report.first_wins == pytest.approx(4 / 6)
    assert report.deviation == pytest.approx(0.4 / 3)


def test_bad_input_says_what_it_found():
    with pytest.raises(ValueError, match="P > 0"):
        evaluate_reward_model([], [])
    with pytest.raises(ValueError, match="NaN"):
        evaluate_reward_model([math.nan], [0.0])
    with pytest.raises(ValueError, match="one per response"):
        evaluate_reward_model([1.0, 2.0], [0.0, 0.0], chosen_length=[1], rejected_length=[1])
