"""Kappa, alpha, their distances, and Dawid-Skene: by hand, against slow definitions, and on real answers."""

from __future__ import annotations

import gzip
import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.errors import FeedbackError
from palate.feedback.agreement import (
    cohen_kappa,
    fleiss_kappa,
    kendall_distance,
    krippendorff_alpha,
    masi_distance,
    pairwise_kappa,
    rating_table,
    span_distance,
)
from palate.feedback.annotator_model import fit_annotators
from palate.feedback.dawid_skene import dawid_skene
from palate.feedback.votes import ranking_votes

RANKS = st.lists(st.integers(1, 4), min_size=4, max_size=4)
SETS = st.frozensets(st.sampled_from("abcd"))
SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)).map(lambda x: (x[0], x[0] + x[1])), max_size=4)


def slow_alpha(rows, distance):
    """1 - D_o / D_e from all ordered pairs of answers, written as the definition says."""
    rows = [[v for v in row if v is not None] for row in rows]
    rows = [row for row in rows if len(row) > 1]
    pool = [v for row in rows for v in row]
    observed = sum(sum(distance(a, b) for a, b in permutations(row, 2)) / (len(row) - 1) for row in rows) / len(pool)
    expected = sum(distance(a, b) for a, b in permutations(pool, 2)) / (len(pool) * (len(pool) - 1))
    return 1 - observed / expected


def load(folder, name):
    path = folder / "annotation" / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} here")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# -- kappa -----------------------------------------------------------------------------------------------------------


def test_cohens_kappa_by_hand():
    """50 items, 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second)
    assert (found.value, found.observed, found.expected) == pytest.approx((0.4, 0.7, 0.5))
    assert found.low < 0.4 < found.high
    assert (found.items, found.missing) == (50, 0)


def test_weighted_kappa_by_hand():
    """Answers (1,1), (2,3), (3,3), of categories 1..3; margins 1/3 each against 1/3, 0, 2/3.

    Linear: observed 1/3 * 1; expected = 1/3 [ (0 + 2*2) + (1 + 1*2) + (2 + 0) ] / 3 = 1. kappa = 2/3.
    Quadratic: observed 1/3; expected = 1/9 [ (0 + 4*2) + (1 + 1*2) + (4 + 0) ] = 15/9. kappa = 1 - 1/5.
    """
    settings = {"categories": [1, 2, 3], "resamples": 10}
    assert cohen_kappa([1, 2, 3], [1, 3, 3], weights="linear", **settings).value == pytest.approx(2 / 3)
    assert cohen_kappa([1, 2, 3], [1, 3, 3], weights="quadratic", **settings).value == pytest.approx(0.8)


def test_kappa_is_undefined_where_chance_always_agrees():
    for found in (cohen_kappa("aaaa", "aaaa"), fleiss_kappa([["a", "a"]] * 4), krippendorff_alpha([["a", "a"]] * 4)):
        assert found.value is None and found.low is None and found.why
        assert "undefined" in str(found)
    assert cohen_kappa([None, "a"], ["a", None]).items == 0


def test_kappa_of_one_constant_rater_is_zero():
    """One always says a: p_o = p_e whatever the other does."""
    assert cohen_kappa("aaaa", "aabb").value == pytest.approx(0.0)


def test_fleiss_kappa_by_hand():
    """Three raters; rows aaa, aab, bbb, abb: P_i = 1, 1/3, 1, 1/3; p_a = 6/12; kappa = (2/3 - 1/2) / (1/2) = 1/3."""
    assert fleiss_kappa(["aaa", "aab", "bbb", "abb"]).value == pytest.approx(1 / 3)


def test_fleiss_kappa_refuses_rows_of_different_lengths():
    with pytest.raises(FeedbackError, match="krippendorff_alpha"):
        fleiss_kappa([["a", "b", None], ["a", "b", "a"]])


def test_ordered_weights_need_their_categories():
    with pytest.raises(FeedbackError, match="categories"):
        cohen_kappa([1, 2], [1, 2], weights="linear")
    with pytest.raises(FeedbackError, match="not among the categories"):
        cohen_kappa([1, 2], [1, 5], weights="linear", categories=[1, 2, 3])


def test_missing_answers_are_counted_and_left_out():
    found = cohen_kappa(["a", None, "b", "b"], ["a", "a", float("nan"), "b"])
    assert (found.items, found.ratings, found.value) == (2, 4, 1.0)
    assert found.missing == pytest.approx(2 / 8)


def test_perfect_agreement_of_few_items_is_no_certainty():
    """Resamples of agreeing items all agree; Wilson's lower bound for 5 of 5 is 0.566."""
    found = krippendorff_alpha([["a", "a"], ["b", "b"], ["a", "a"], ["b", "b"], ["c", "c"]])
    assert found.value == 1.0 and found.low < 0.9


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30))
def test_kappa_is_symmetric_and_names_of_categories_do_not_matter(pairs):
    first, second = zip(*pairs, strict=True)
    one = cohen_kappa(first, second, resamples=0).value
    assert cohen_kappa(second, first, resamples=0).value == pytest.approx(one, nan_ok=True)
    renamed = cohen_kappa(["xyz"[v] for v in first], ["xyz"[v] for v in second], resamples=0).value
    assert renamed == pytest.approx(one, nan_ok=True)


# -- alpha -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_the_reference_package(level):
    reference = pytest.importorskip("krippendorff")
    rng = np.random.default_rng(0)
    for _ in range(40):
        answers = rng.integers(0, 5, size=(4, 20)).astype(float)
        answers[rng.random(answers.shape) < 0.4] = np.nan
        wanted = reference.alpha(answers, level_of_measurement=level)
        assert krippendorff_alpha(answers.T.tolist(), level, resamples=0).value == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "distance", "values"),
    [
        ("ranking", kendall_distance, [(1, 2, 3), (1, 2, 2), (3, 2, 1), (2, 1, 3)]),
        ("set", masi_distance, [frozenset("ab"), frozenset("a"), frozenset(), frozenset("bc")]),
        ("span", span_distance, [((0, 4),), ((2, 6),), (), ((0, 2), (5, 9))]),
        ("nominal", lambda a, b: float(a != b), ["a", "b", "c"]),
        ("interval", lambda a, b: (a - b) ** 2, [1.0, 2.0, 5.0]),
    ],
)
def test_alpha_equals_its_slow_definition(name, distance, values):
    rng = np.random.default_rng(1)
    for _ in range(10):
        rows = [
            [values[rng.integers(len(values))] if rng.random() < 0.8 else None for _ in range(3)] for _ in range(12)
        ]
        assert krippendorff_alpha(rows, name, resamples=0).value == pytest.approx(slow_alpha(rows, distance))


def test_alpha_of_random_answers_is_near_zero_and_of_equal_ones_is_one():
    rng = np.random.default_rng(0)
    found = krippendorff_alpha(rng.integers(0, 3, size=(500, 3)).tolist())
    assert found.low < 0 < found.high
    assert krippendorff_alpha([[i % 3] * 3 for i in range(20)], "ordinal").value == 1.0


def test_ordinal_alpha_sees_order_only():
    rows = [[1, 2], [2, 2], [3, 1], [3, 3], [2, None], [1, 1]]
    stretched = [[None if v is None else 10.0**v for v in row] for row in rows]
    assert krippendorff_alpha(rows, "ordinal").value == pytest.approx(krippendorff_alpha(stretched, "ordinal").value)
    assert krippendorff_alpha(rows, "interval").value != pytest.approx(krippendorff_alpha(stretched, "interval").value)


def test_alphas_interval_covers_its_limit():
    """Two raters copy a fair coin with probability 0.6 and else toss their own: agreement 0.68, limit of alpha 0.36.

    60 sets of 60 items; a 95 % interval that missed more than 9 of them would be an event of one in 1,000.
    """
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(60):
        coin, own = rng.integers(0, 2, size=(60, 1)), rng.integers(0, 2, size=(60, 2))
        # each copies with probability 0.6, so both do with 0.36 and agree by chance otherwise
        rows = np.where(rng.random((60, 2)) < 0.6, coin, own)
        found = krippendorff_alpha(rows.tolist(), resamples=300, seed=seed)
        hits += found.low <= 0.36 <= found.high
    assert hits >= 51


def test_same_seed_same_interval():
    rows = [[1, 2], [2, 2], [3, 1], [3, 3]]
    assert krippendorff_alpha(rows, seed=4) == krippendorff_alpha(rows, seed=4)


def test_alpha_refuses_what_does_not_fit():
    with pytest.raises(FeedbackError, match="unknown"):
        krippendorff_alpha([[1, 2]], "euclid")
    with pytest.raises(FeedbackError, match="does not fit"):
        krippendorff_alpha([["good", "bad"]], "interval")
    with pytest.raises(FeedbackError, match="twice"):
        rating_table([("i", "anna", 1), ("i", "anna", 2)])


# -- distances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distance", "values"), [(kendall_distance, RANKS), (masi_distance, SETS), (span_distance, SPANS)]
)
@given(data=st.data())
def test_distances_are_symmetric_bounded_and_zero_for_equals(distance, values, data):
    a, b = data.draw(values), data.draw(values)
    assert 0 <= distance(a, b) <= 1
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert distance(a, a) == 0


@given(RANKS, RANKS, RANKS)
def test_kendalls_distance_with_half_a_point_for_ties_is_a_metric(a, b, c):
    assert kendall_distance(a, c) <= kendall_distance(a, b) + kendall_distance(b, c) + 1e-12


@given(SPANS, SPANS)
def test_span_distance_counts_characters(a, b):
    x, y = ({i for s, e in spans for i in range(s, e)} for spans in (a, b))
    wanted = 1 - len(x & y) / len(x | y) if x | y else 0.0
    assert span_distance(a, b) == pytest.approx(wanted)


def test_distances_by_hand():
    """Kendall: of three pairs one is turned, so 1/3. MASI: J = 1/3, overlap without inclusion 1/3, so 1 - 1/9."""
    assert kendall_distance((1, 2, 3), (1, 3, 2)) == pytest.approx(1 / 3)
    assert masi_distance({"a", "b"}, {"b", "c"}) == pytest.approx(8 / 9)
    assert masi_distance(set(), {"a"}) == 1.0
    with pytest.raises(FeedbackError, match="each K"):
        kendall_distance((1, 2), (1, 2, 3))


# -- Dawid and Skene -------------------------------------------------------------------------------------------------


def planted(items=600, seed=0):
    """Three classes; annotators that are good, that call class 2 class 1, and that answer at random."""
    rng = np.random.default_rng(seed)
    confusion = np.array(
        [
            [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]],
            [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
            [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.85, 0.1]],
            [[1 / 3] * 3] * 3,
            [[0.85, 0.1, 0.05], [0.1, 0.85, 0.05], [0.05, 0.1, 0.85]],
        ]
    )
    truth = rng.choice(3, size=items, p=[0.5, 0.3, 0.2])
    answers = [(i, k, int(rng.choice(3, p=confusion[k, truth[i]]))) for i in range(items) for k in range(5)]
    return truth, confusion, answers


def test_dawid_skene_recovers_planted_confusion_matrices():
    """Rows have at least about 0.2 * 600 = 120 answers: 4 standard errors are 4 sqrt(0.25 / 120) = 0.18."""
    truth, confusion, answers = planted()
    found = dawid_skene(answers, classes=[0, 1, 2])
    assert found.converged
    assert np.abs(found.confusion - confusion).max() < 0.18
    assert np.abs(found.prevalence - [0.5, 0.3, 0.2]).max() < 0.08
    votes = np.zeros((len(truth), 3))
    for i, _, label in answers:
        votes[i, label] += 1
    assert np.mean(np.array(found.labels()) == truth) > np.mean(votes.argmax(axis=1) == truth)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_the_objective_of_dawid_skene_never_falls(smoothing):
    for seed in range(5):
        _, _, answers = planted(items=40, seed=seed)
        found = dawid_skene(answers[::2], smoothing=smoothing, tolerance=1e-9)
        assert len(found.objective) > 2
        assert np.diff(found.objective).min() > -1e-8
        assert np.allclose(found.confusion.sum(axis=2), 1) and np.allclose(found.probabilities.sum(axis=1), 1)


def test_dawid_skenes_e_step_is_bayes_rule():
    """T_ij of the converged fit equals p_j prod pi^k_jl, multiplied out, at the parameters that it reports."""
    _, _, answers = planted(items=30)
    found = dawid_skene(answers, classes=[0, 1, 2])
    for i in range(30):
        p = found.prevalence.copy()
        for item, k, label in answers:
            if item == i:
                p = p * found.confusion[k, :, label]
        assert found.probabilities[i] == pytest.approx(p / p.sum())


def test_dawid_skene_stays_finite_with_thousands_of_answers_to_an_item():
    """0.5^5000 is zero in floats; in log space it is not. (The same annotator answering again and again.)"""
    answers = [("i", "anna", "yes"), ("i", "anna", "no")] * 2500 + [("j", "anna", "yes")] * 10
    found = dawid_skene(answers)
    assert np.isfinite(found.probabilities).all() and np.isfinite(found.objective).all()


# -- real answers ----------------------------------------------------------------------------------------------------


@pytest.mark.shared_data
def test_pandalms_three_annotators_agree_as_published(shared_data):
    """The README of PandaLM gives 0.85, 0.88 and 0.86 on its test set of 999; here are 766 of it, answers 1 / 2 / tie."""
    rows = load(shared_data, "pandalm_3annotators")
    table = rating_table((r["id"], name, said) for r in rows for name, said in r["annotators"].items())
    found = pairwise_kappa(table.ratings, table.raters)
    published = {("a1", "a2"): 0.85, ("a1", "a3"): 0.88, ("a2", "a3"): 0.86}
    assert len(rows) == 766 and set(found) == set(published)
    for pair, kappa in published.items():
        assert found[pair].low <= kappa <= found[pair].high
        assert found[pair].high - found[pair].low < 0.08


@pytest.mark.shared_data
def test_squality_prefers_people_to_models_and_retrieval_to_none(shared_data):
    """Rankings of three summaries by three of four workers each; systems in place of responses, one prompt."""
    votes, ratings = [], {}
    for r in load(shared_data, "squality_human_eval"):
        systems = [x["system"] for x in r["responses"]]
        by_worker = {}
        for review in r["reviews"]:
            by_worker.setdefault(review["worker"], {})[review["response_index"]] = review["ranks"]["overall"]
            name = systems[review["response_index"]]
            ratings.setdefault(name, []).append(review["ratings"]["overall"])
        for worker, ranks in by_worker.items():
            order = sorted(ranks)
            votes += ranking_votes("all", [systems[i] for i in order], [ranks[i] for i in order], worker)
    fit = fit_annotators(votes)
    by_score = sorted(fit.items, key=lambda item: fit.scores[fit.index()[item]])
    assert [system for _, system in by_score] == ["bart", "bart-dpr", "human"]
    assert sorted(ratings, key=lambda s: np.mean(ratings[s])) == ["bart", "bart-dpr", "human"]


@pytest.mark.shared_data
def test_vsr_validators_agree_though_most_answers_are_missing(shared_data):
    """Who said both true and false of a statement is left out there; repeats of one answer count once."""
    answers, contradicting = {}, set()
    for r in load(shared_data, "vsr_validator_votes"):
        for said in (True, False):
            for who in r["votes_true" if said else "votes_false"]:
                if answers.setdefault((r["id"], who), said) != said:
                    contradicting.add((r["id"], who))
    table = rating_table((item, who, said) for (item, who), said in answers.items() if (item, who) not in contradicting)
    found = krippendorff_alpha(table.ratings, resamples=300)
    assert len(contradicting) == 3
    assert found.missing > 0.8
    assert 0 < found.low < found.value < found.high < 1


def test_pairs_of_raters_are_all_there():
    rows = [["a", "a", None], ["b", "a", "b"], ["a", "b", "b"]]
    found = pairwise_kappa(rows, ["x", "y", "z"], resamples=10)
    assert set(found) == set(combinations("xyz", 2))
    assert found["x", "z"].items == 2
    assert not any(math.isnan(f.missing) for f in found.values())
