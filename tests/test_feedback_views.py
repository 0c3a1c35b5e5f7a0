"""From answers to records: every kind, with nothing lost unsaid, and the summary of a project."""

from __future__ import annotations

import csv
import io
import json

import pytest

from feedback_stores import answer_all, compare_task, make_store, prefer_bad, prefer_good
from palate.data.records import read_records
from palate.errors import ConfigError
from palate.feedback import people, queue, summary, views
from palate.feedback.export import csv_cell, export
from palate.feedback.items import Candidate, add_items, read_candidates
from palate.feedback.store import Store, chain
from palate.feedback.task import task_of, template


def said(**values):
    """Answers by text: {question: {text: value}} or tiers of texts, whatever order they are shown in."""

    def answer(shown: queue.Presentation):
        ids = {text: key for key, text in shown.responses}
        return {
            name: [[ids[text] for text in tier] for tier in value]
            if isinstance(value, list)
            else {ids[text]: each for text, each in value.items()}
            for name, value in values.items()
        }

    return answer


def test_comparisons_have_the_chosen_side_whatever_the_order(tmp_path) -> None:
    """40 items in random order, all answered for "good"; margins 1/3, 2/3, 1 by strength 2 -> 2/3."""
    store, (anna, _) = make_store(tmp_path, compare_task(), items=40)
    answer_all(store, anna)
    made = views.comparisons(views.labels(store), store.task, margins=(1 / 3, 2 / 3, 1))
    assert len(made.records) == 40 and not made.left_out
    for record in made.records:
        assert (record.chosen[:4], record.rejected[:3], record.margin) == ("good", "bad", 2 / 3)
        assert record.chosen[5:] == record.rejected[4:] == record.prompt[7:]
        assert record.annotator == anna and record.source.startswith("feedback.db:")


def test_ties_are_left_out_with_a_count_or_half(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=3)
    answers = iter(["tie", "both_bad", "good"])

    def choose(shown):
        choice = next(answers)
        return prefer_good(shown) if choice == "good" else {"better": {"choice": choice}}

    answer_all(store, anna, choose)
    given = views.labels(store)
    dropped = views.comparisons(given, store.task)
    assert (len(dropped.records), dropped.left_out) == (1, {"pairs without preference": 2})
    half = views.comparisons(given, store.task, ties="half")
    assert sorted(r.probability or 1 for r in half.records) == [0.5, 1] and half.left_out == {
        "pairs without preference": 1
    }


def test_a_ranking_gives_ranks_with_ties_and_its_pairs(tmp_path) -> None:
    """c first, a and b second: ranks (2, 2, 1); pairs c > a, c > b, one tie."""
    store, (anna,) = make_store(tmp_path, template("rank"), items=[Candidate("p", ("a", "b", "c"))], annotators=1)
    answer_all(store, anna, said(order=[["c"], ["b", "a"]]))
    (ranking,) = views.rankings(views.labels(store), store.task).records
    assert (ranking.responses, ranking.ranks, ranking.annotator) == (("a", "b", "c"), (2, 2, 1), anna)
    made = views.comparisons(views.labels(store), store.task)
    assert {(r.chosen, r.rejected) for r in made.records} == {("c", "a"), ("c", "b")}
    assert made.left_out == {"pairs without preference": 1}


def test_majority_is_a_share_of_annotators_with_ties_half(tmp_path) -> None:
    """good, good, tie: (1 + 1 + 1/2) / 3 = 5/6. bad, bad, good: 2/3 for bad. good, bad, tie: even, left out."""
    store, names = make_store(tmp_path, compare_task(overlap=3), items=3, annotators=3)
    plan = {"0": ["good", "good", "tie"], "1": ["bad", "bad", "good"], "2": ["good", "bad", "tie"]}
    for number, name in enumerate(names):

        def choose(shown, number=number):
            choice = plan[shown.responses[0][1][-1]][number]
            if choice == "tie":
                return {"better": {"choice": "tie"}}
            return prefer_good(shown) if choice == "good" else prefer_bad(shown)

        answer_all(store, name, choose)
    made = views.majority(views.labels(store), store.task)
    assert {r.chosen: r.probability for r in made.records} == pytest.approx({"good 0": 5 / 6, "bad 1": 2 / 3})
    assert made.left_out == {"even pairs": 1}


def test_a_decision_stands_in_place_of_the_answers(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2), items=1)
    carl = people.add_person(store, "carl", "adjudicator").pseudonym
    answer_all(store, anna, prefer_good), answer_all(store, ben, prefer_bad)
    shown, _ = queue.next_contested(store, carl)
    queue.adjudicate(store, carl, "d", shown.id, prefer_bad(shown))
    decided = views.comparisons(views.labels(store), store.task).records
    assert [(r.chosen, r.annotator) for r in decided] == [("bad 0", carl)]
    every = views.comparisons(views.labels(store, decided=False), store.task).records
    assert {(r.chosen, r.annotator) for r in every} == {("good 0", anna), ("bad 0", ben)}
    queue.undo(store, carl, "u", shown.id)
    assert len(views.labels(store)) == 2


def test_undone_late_and_test_answers_are_no_labels(tmp_path) -> None:
    known = {"better": {"choice": 0, "strength": 1}}
    gold = [Candidate(f"gold {i}", ("good", "bad"), kind="gold", gold=known) for i in range(9)]
    items = [Candidate(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(9)]
    store, (anna,) = make_store(tmp_path, compare_task(gold_share=0.4), items=[*items, *gold], annotators=1)
    shown = answer_all(store, anna)
    assert len(shown) > 9
    last = next(each for each in reversed(shown) if each.purpose == "task")
    queue.undo(store, anna, "u", last.id)
    assert len(views.labels(store)) == 8
    assert len(views.answers(store, ("gold",))) == len(shown) - 9


def test_judgements_come_from_accepting_or_from_flags(tmp_path) -> None:
    asked = {
        "questions": [
            {"id": "ok", "type": "accept"},
            {"id": "flags", "type": "flags", "options": [{"id": "rude", "label": "Rude"}]},
        ]
    }
    store, (anna,) = make_store(tmp_path, task_of(asked), items=[Candidate("p", ("a", "b"))], annotators=1)
    answer_all(store, anna, said(ok={"a": True, "b": False}, flags={"a": ["rude"]}))
    given = views.labels(store)
    accepted = views.judgements(given, store.task).records
    assert [(r.response, r.desirable) for r in accepted] == [("a", True), ("b", False)]
    flagged = views.judgements(given, store.task, question="flags").records
    assert [(r.response, r.desirable) for r in flagged] == [("a", False), ("b", True)]
    with pytest.raises(ConfigError, match=r"rewrite in this task\. It asks: ok \(accept\)"):
        views.demonstrations(given, store.task)


def test_a_rewrite_is_a_demonstration_and_a_correction(tmp_path) -> None:
    items = [Candidate("p", ("a red cat",)), Candidate("q", ("fine",))]
    store, (anna,) = make_store(tmp_path, template("rewrite"), items=items, annotators=1)

    def rewrite(shown):
        return {"correction": {shown.responses[0][0]: shown.responses[0][1].replace("red ", "")}}

    answer_all(store, anna, rewrite)
    given = views.labels(store)
    made = views.demonstrations(given, store.task)
    assert [(r.prompt, r.response) for r in made.records] == [("p", "a cat")]
    assert made.left_out == {"responses left as they were": 1}
    (pair,) = views.corrections(given, store.task).records
    assert (pair.chosen, pair.rejected, pair.annotator) == ("a cat", "a red cat", anna)


@pytest.mark.parametrize("kind", ["comparisons", "rankings"])
def test_what_is_exported_is_read_back_by_training(tmp_path, kind: str) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=5)
    answer_all(store, anna)
    out = tmp_path / "out.jsonl"
    about = export(store, kind, out)
    assert len(read_records(out, kind)) == 5 == about["records"]
    saved = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert saved["last_hash"] == store.last()[1] and saved["annotators"] == {anna: 5}
    with pytest.raises(Exception, match="exists"):
        export(store, kind, out)


def test_exported_events_hold_the_chain_and_no_names(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    answer_all(store, anna)
    export(store, "events", tmp_path / "events.jsonl")
    text = (tmp_path / "events.jsonl").read_text()
    previous = "0" * 64
    for line in map(json.loads, text.splitlines()):
        body = json.dumps(line["body"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        previous = chain(previous, line["seq"], line["id"], line["time"], line["kind"], line["actor"], body)
        assert line["hash"] == previous
    assert previous == store.last()[1] and '"n0"' not in text


def test_answers_are_exported_with_the_order_in_which_they_were_shown(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=10)
    shown = answer_all(store, anna)
    export(store, "answers", tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [[line["responses"][i] for i in line["shown"]] for line in lines] == [
        [text for _, text in each.responses] for each in shown
    ]


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "\uff1d1"])
def test_no_cell_of_a_table_is_a_formula(tmp_path, text: str) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=[Candidate(text, ("good", "bad"))])
    answer_all(store, anna)
    export(store, "csv", tmp_path / "answers.csv")
    with open(tmp_path / "answers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(io.StringIO(file.read(), newline="")))
    prompt = rows[1][rows[0].index("prompt")]
    assert prompt == "'" + text
    assert not any(cell.lstrip()[:1] in tuple("=+-@\uff1d") for row in rows for cell in row if cell.strip())


def test_numbers_in_a_table_stay_numbers() -> None:
    assert [csv_cell(value) for value in (-1, 0.5, None, "a", "a=b")] == [-1, 0.5, None, "a", "a=b"]


def test_candidates_are_read_from_everything_the_pipeline_writes(tmp_path) -> None:
    lines = {
        "responses": [{"prompt": "p", "responses": ["a", "b", "c"]}],
        "sampled": [{"prompt": "p", "response": r, "finished": True} for r in "abc"],
        "rankings": [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}],
        "comparisons": [{"prompt": "p", "chosen": "a", "rejected": "b"}],
    }
    for name, objects in lines.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in objects))
        (found,) = read_candidates(str(path))
        assert (found.prompt, found.responses[:2]) == ("p", ("a", "b")) and found.gold is None
        assert found.meta["source"].endswith(":1")
    (gold,) = read_candidates(str(tmp_path / "comparisons.jsonl"), kind="gold")
    with Store.create(tmp_path / "f.db", compare_task()) as store:
        add_items(store, [gold])
        with store.read() as tx:
            assert json.loads(tx.one("SELECT gold FROM item")[0]) == {"better": {"choice": 0, "strength": 1}}
    with pytest.raises(Exception, match="no known answer"):
        read_candidates(str(tmp_path / "responses.jsonl"), kind="gold")


def test_the_summary_names_who_fails_tests_and_who_clicks_left(tmp_path) -> None:
    """Anna answers for "good" (as gold says), Ben always takes the response shown first."""
    known = {"better": {"choice": 0, "strength": 3}}
    gold = [Candidate(f"gold {i}", ("good", "bad"), kind="gold", gold=known) for i in range(40)]
    items = [Candidate(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(40)]
    task = compare_task(overlap=2, gold_share=0.3, repeat_share=0.2, repeat_after=2)
    store, (anna, ben) = make_store(tmp_path, task, items=[*items, *gold])
    answer_all(store, anna)
    answer_all(store, ben, lambda shown: {"better": {"choice": shown.responses[0][0], "strength": 1}})
    found = summary.summary(store)
    rows = {row["annotator"]: row for row in found["annotators"]}
    assert rows[anna]["gold"]["share"] == 1 and rows[anna]["repeat"]["share"] == 1
    assert rows[ben]["first"] == {"share": 1, "of": rows[ben]["answers"]}
    assert rows[ben]["repeat"]["share"] == 0 and rows[ben]["repeat"]["of"] >= 1  # sides were swapped
    assert 0.2 < rows[ben]["gold"]["share"] < 0.8
    flags = {row["annotator"]: [flag["name"] for flag in row["flags"]] for row in found["model"]}
    assert flags[anna] == [] and "clicks one side" in flags[ben]
    (alpha,) = found["agreement"]
    assert (alpha["distance"], alpha["items"]) == ("ranking", 40) and -0.5 < alpha["alpha"] < 0.5
    assert found["progress"]["done"] == 80 and len(found["contested"]) == found["progress"]["contested"] > 5
    assert sum(week["answers"] for week in found["weeks"]) == sum(row["answers"] for row in found["annotators"])
    json.dumps(found, allow_nan=False)


def test_the_summary_of_an_empty_project_is_a_summary(tmp_path) -> None:
    store, _ = make_store(tmp_path, template("instructgpt"), items=0)
    found = summary.summary(store)
    assert found["annotators"] == found["contested"] == found["weeks"] == [] and found["progress"]["wanted"] == 0
    json.dumps(found, allow_nan=False)
