"""Statistics of people's answers that came out wrong or not at all; each test is named after what went wrong."""

import json
import math
from itertools import pairwise

import pytest

from feedback_stores import make_store
from palate.evaluation.statistics import win_rate
from palate.feedback import queue
from palate.feedback.agreement import krippendorff_alpha
from palate.feedback.dawid_skene import dawid_skene
from palate.feedback.exchange import export_file, import_file, read_file
from palate.feedback.items import Candidate
from palate.feedback.store import Store
from palate.feedback.summary import summary
from palate.feedback.task import task_of


def imported(folder, *rows):
    (folder / "votes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    import_file(folder / "feedback.db", folder / "votes.jsonl", "jsonl")
    return Store.open(folder / "feedback.db")


def test_alpha_of_small_numbers_is_that_of_large_ones():
    """The interval distance has a unit, alpha has none: in millionths it was "every answer is the same"."""
    table = [[1, 1], [1, 2], [3, 3], [2, None], [5, 2]]
    wanted = krippendorff_alpha(table, "interval")
    for unit in (1e-9, 1e9):
        scaled = [[None if x is None else x * unit for x in row] for row in table]
        found = krippendorff_alpha(scaled, "interval")
        assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert krippendorff_alpha([[2.0, 2.0]], "interval").value is None


@pytest.mark.parametrize("scores", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0]])
def test_a_score_that_is_no_number_is_not_a_lost_comparison(scores):
    """NaN is not above anything, so it counted as a loss; infinity against infinity too."""
    with pytest.raises(ValueError, match="1 of 3"):
        win_rate(scores, [math.inf, 0.0, 0.0])


def test_rankings_of_different_numbers_of_responses_have_an_agreement_each(tmp_path):
    """One distance of all of them is not defined: the page of the project was an error."""
    candidates = [Candidate(f"p{i}", tuple(f"good {i} {j}" for j in range(2 + i % 2))) for i in range(6)]
    task = task_of({"questions": [{"id": "order", "type": "rank"}], "distribution": {"overlap": 2}})
    store, people = make_store(tmp_path, task, candidates)
    with store:
        for who in people:
            while not isinstance(shown := queue.next_item(store, who), queue.Nothing):
                order = [[key] for key, _ in sorted(shown.responses, key=lambda pair: pair[1])]
                queue.answer(store, who, f"{who}{shown.id}", shown.id, {"order": order})
        found = summary(store)["agreement"]
    assert [(row["question"], row["items"], row["ratings"]) for row in found] == [
        ("order (2 responses)", 3, 6),
        ("order (3 responses)", 3, 6),
    ]


def test_the_agreement_of_what_is_no_ranking_is_one_row(tmp_path):
    task = task_of({"questions": [{"id": "good", "type": "accept"}], "distribution": {"overlap": 2}})
    store, people = make_store(tmp_path, task, [Candidate("p", ("a", "b")), Candidate("q", ("c", "d", "e"))])
    with store:
        for who in people:
            while not isinstance(shown := queue.next_item(store, who), queue.Nothing):
                good = {key: text in "ac" for key, text in shown.responses}
                queue.answer(store, who, f"{who}{shown.id}", shown.id, {"good": good})
        (row,) = summary(store)["agreement"]
    assert (row["question"], row["alpha"], row["items"]) == ("good", 1.0, 5)


def test_no_smoothing_is_no_smoothing_as_a_whole_number_too():
    """smoothing=0 made the counts whole numbers: shares of an answer were cut to nothing."""
    said = [("i", "a", "x"), ("i", "b", "y"), ("j", "a", "x"), ("j", "b", "x"), ("k", "b", "y"), ("k", "a", "y")]
    whole, real = dawid_skene(said, smoothing=0), dawid_skene(said, smoothing=0.0)
    assert whole.confusion.tolist() == real.confusion.tolist()
    assert all(after >= before - 1e-12 for before, after in pairwise(whole.objective))
    assert whole.confusion[0].tolist() != [[0.5, 0.5], [0.5, 0.5]]


def test_a_ranking_of_equals_comes_back_from_label_studio_as_one(tmp_path):
    """Its one bucket was read as a list, best first: two tied responses became a preference."""
    task = task_of({"questions": [{"id": "order", "type": "rank"}]})
    store, (who, *_) = make_store(tmp_path, task, 1)
    with store:
        shown = queue.next_item(store, who)
        queue.answer(store, who, "key", shown.id, {"order": [[key for key, _ in shown.responses]]})
        export_file(store, "label_studio", tmp_path / "out.json")
    (found,) = read_file(tmp_path / "out.json", "label_studio").judged
    assert found.values == {"order": [[0, 1]]}


def test_votes_without_names_have_a_summary(tmp_path):
    """Two people said the same of one pair, the file names nobody: "unknown" answered twice, and the page was an error."""
    vote = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with imported(tmp_path, vote, vote, {"prompt": "r", "chosen": "a", "rejected": "b"}) as store:
        (row,) = summary(store)["agreement"]
    assert (row["alpha"], row["why"]) == (None, "no item has two answers")


def test_of_imported_votes_no_side_is_known(tmp_path):
    """Their order is drawn at the import, and was told as somebody's habit."""
    votes = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "annotator": f"p{i % 2}"} for i in range(40)]
    with imported(tmp_path, *votes) as store:
        found = summary(store)
    assert [row["left_bias"] for row in found["model"]] == [None, None]
    assert [row["first"] for row in found["annotators"]] == [{"share": None, "of": 0}] * 2
