"""Simulated annotators do exactly what their formulas say."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from palate.data.records import Prompt
from palate.errors import FeedbackError
from palate.feedback.simulated import (
    SimulatedAnnotator,
    annotate,
    bayes_accuracy,
    gold_accuracy,
    preference_probability,
    rank,
)

TEXTS = ("good answer", "fair answer", "poor answer")


def ranks(annotator, gold, texts=TEXTS, n=6000, seed=0):
    rng = np.random.default_rng(seed)
    return Counter(rank(annotator, gold, texts, rng) for _ in range(n))


def test_rankings_follow_plackett_luce():
    """P(order) = prod of softmax over those left, written out for every order of three; 4 standard errors allowed."""
    gold, temperature, n = (1.0, 0.3, -0.5), 0.7, 6000
    counts = ranks(SimulatedAnnotator(temperature=temperature), gold, n=n)
    for order in permutations(range(3)):
        p, left = 1.0, list(order)
        while left:
            p *= math.exp(gold[left[0]] / temperature) / sum(math.exp(gold[i] / temperature) for i in left)
            left.pop(0)
        place = tuple(1 + order.index(i) for i in range(3))
        assert counts[place] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_pairs_of_a_ranking_are_bradley_terry_with_every_bias():
    """Measured share of 'first text above second' equals preference_probability, biases and carelessness included."""
    annotator = SimulatedAnnotator(temperature=0.8, reliability=0.7, length_bias=0.2, position_bias=0.9)
    texts, gold, n = ("one two three four", "one", "one two"), (0.1, 0.6, 0.0), 12000
    above = sum(c for r, c in ranks(annotator, gold, texts, n=n).items() if r[0] < r[1]) / n
    p = float(preference_probability(annotator, 0.1 - 0.6, 4 - 1, shown=3))
    assert above == pytest.approx(p, abs=4 * math.sqrt(0.25 / n))


def test_preference_probability_by_hand():
    """Two shown, position bias 1, temperature 1, equal gold: half the time +1, half the time -1, so exactly 1/2.

    Gold difference log 3, no bias: 3/4; half reliable: 3/4 / 2 + 1/4. Length bias 0.5 over 4 words against gold -2: 1/2.
    """
    assert preference_probability(SimulatedAnnotator(position_bias=1.0), 0.0) == pytest.approx(0.5)
    assert preference_probability(SimulatedAnnotator(), math.log(3)) == pytest.approx(0.75)
    assert preference_probability(SimulatedAnnotator(reliability=0.5), math.log(3)) == pytest.approx(0.625)
    assert preference_probability(SimulatedAnnotator(length_bias=0.5), -2.0, 4) == pytest.approx(0.5)
    assert preference_probability(SimulatedAnnotator(temperature=2.0), 2 * math.log(3)) == pytest.approx(0.75)


def test_no_noise_means_the_order_of_gold():
    """At temperature 0, also with equal gold: competition ranks."""
    assert set(ranks(SimulatedAnnotator(temperature=0), (1, 3, 2), n=20)) == {(3, 1, 2)}
    assert set(ranks(SimulatedAnnotator(temperature=0), (1, 3, 3), n=20)) == {(3, 1, 1)}
    assert preference_probability(SimulatedAnnotator(temperature=0), [-1.0, 0.0, 2.0]).tolist() == [0, 0.5, 1]


def test_who_does_not_look_ranks_at_random():
    counts = ranks(SimulatedAnnotator(reliability=0.0, temperature=0), (3, 2, 1), n=6000)
    assert len(counts) == 6
    assert all(c / 6000 == pytest.approx(1 / 6, abs=0.02) for c in counts.values())


def test_equal_responses_share_a_rank():
    texts = ("same words", "other words", "same words")
    for r in ranks(SimulatedAnnotator(), (0.5, 0.2, 0.5), texts, n=50):
        assert r[0] == r[2] != r[1]


def test_bayes_accuracy_by_hand():
    """Prompt 1: one pair, gold difference log 3 -> 3/4. Prompt 2: three texts, differences log 3, log 9, log 3 ->
    3/4, 9/10, 3/4. Mean of four pairs."""
    gold = [[math.log(3), 0.0], [math.log(9), math.log(3), 0.0]]
    texts = [["a a", "b b"], ["a a", "b b", "c c"]]
    assert bayes_accuracy(gold, texts, [SimulatedAnnotator()]) == pytest.approx((0.75 * 3 + 0.9) / 4)
    assert gold_accuracy(gold, texts, [SimulatedAnnotator()]) == pytest.approx((0.75 * 3 + 0.9) / 4)


def test_labels_of_several_annotators_average_before_the_better_side_is_taken():
    """One reads gold (3/4), one is random (1/2): the label of either agrees with gold 5/8 of the time."""
    team = [SimulatedAnnotator("a"), SimulatedAnnotator("b", reliability=0.0)]
    assert bayes_accuracy([[math.log(3), 0.0]], [["a a", "b b"]], team) == pytest.approx(0.625)


def test_knowing_the_length_bias_beats_gold_at_predicting_labels():
    """Gold -log 3, bias log 3 a word on two more words: labels go the other way with probability 3/4."""
    annotator = SimulatedAnnotator(length_bias=math.log(3))
    gold, texts = [[-math.log(3), 0.0]], [["a b c", "a"]]
    assert bayes_accuracy(gold, texts, [annotator]) == pytest.approx(0.75)
    assert gold_accuracy(gold, texts, [annotator]) == pytest.approx(0.25)


def test_the_ceiling_is_reached_by_the_best_predictor_and_never_passed():
    """Labels of 3000 prompts: the likelier side is right as often as bayes_accuracy says; no threshold does better."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3000, 2))
    prompts = [Prompt(f"question {i}") for i in range(3000)]
    texts = [["long answer with words", "short"]] * 3000
    annotator = SimulatedAnnotator(temperature=0.8, reliability=0.9, length_bias=0.2)
    labels = annotate(prompts, texts, values.tolist(), [annotator], seed=1)
    first = np.array([r.ranks[0] < r.ranks[1] for r in labels])
    difference = values[:, 0] - values[:, 1]
    ceiling = bayes_accuracy(values.tolist(), texts, [annotator])
    assert ((difference + 0.2 * 3 > 0) == first).mean() == pytest.approx(ceiling, abs=0.03)
    assert max(((difference + shift > 0) == first).mean() for shift in np.linspace(-2, 2, 41)) < ceiling + 0.03


def test_labels_repeat_with_the_seed_and_do_not_depend_on_other_tasks():
    prompts = [Prompt(f"question {i}") for i in range(40)]
    texts, gold = [list(TEXTS)] * 40, [[0.3, 0.2, 0.1]] * 40
    team = [SimulatedAnnotator("ann"), SimulatedAnnotator("ben", length_bias=0.1)]
    labels = annotate(prompts, texts, gold, team, seed=5)
    assert labels == annotate(prompts, texts, gold, team, seed=5)
    assert labels != annotate(prompts, texts, gold, team, seed=6)
    assert labels[:10] == annotate(prompts[:10], texts[:10], gold[:10], team, seed=5)
    assert [r.annotator for r in labels[:4]] == ["ann", "ben", "ann", "ben"]
    both = annotate(prompts, texts, gold, team, seed=5, per_prompt=2)
    assert len(both) == 80
    assert both[0] == labels[0]


def test_prompts_with_one_answer_only_say_nothing():
    labels = annotate([Prompt("a"), Prompt("b")], [["x", "x"], ["x", "y"]], [[1, 1], [1, 0]], [SimulatedAnnotator()])
    assert [r.prompt for r in labels] == ["b"]


def test_contradictions_are_refused():
    one = SimulatedAnnotator("ann")
    with pytest.raises(FeedbackError, match="reliability in"):
        SimulatedAnnotator(reliability=1.5)
    with pytest.raises(FeedbackError, match="different names"):
        annotate([], [], [], [one, one])
    with pytest.raises(FeedbackError, match="1 prompts, 0 lists"):
        annotate([Prompt("a")], [], [], [one])
    with pytest.raises(FeedbackError, match="one number each"):
        annotate([Prompt("a")], [["x", "y"]], [[1.0, math.nan]], [one])
    with pytest.raises(FeedbackError, match="nothing to compare"):
        bayes_accuracy([[1.0, 1.0]], [["x", "x"]], [one])
