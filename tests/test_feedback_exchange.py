"""Judgements out of a store in other tools' shapes and back: no answer is lost, merged or given to somebody else."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feedback_stores import answer_all, make_store
from palate.cli import app
from palate.data.records import prompt_key, read_records
from palate.errors import ConfigError, DataError, FeedbackError
from palate.feedback import queue, views
from palate.feedback.exchange import EXPORTS, Settings, export_file, import_file, read_file
from palate.feedback.exchange.ddpo import token_weights
from palate.feedback.exchange.stepwise import steps_of
from palate.feedback.export import csv_text
from palate.feedback.items import Candidate
from palate.feedback.people import people
from palate.feedback.store import Store
from palate.feedback.task import Task, task_of
from palate.feedback.upkeep import verify

CONVERSATION = (
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "A joke?"},
)
PAIRS = [
    Candidate("Say hello.", ("Hello there.", "Go away now.")),
    Candidate("Count to two.", ("One. Two.", "Two, one")),
    Candidate(CONVERSATION, ("A cat sat down.", "No.")),
]
EVERYTHING: list[dict[str, Any]] = [
    {"id": "better", "type": "compare", "strengths": 3, "tie": True, "both_bad": True},
    {"id": "overall", "type": "rating", "scale": 7},
    {"id": "wrong", "type": "flags", "options": [{"id": "rude", "label": "Rude"}, {"id": "false_", "label": "False"}]},
    {"id": "errors", "type": "spans", "kinds": ["off topic", "language"], "severities": ["minor", "major"]},
    {"id": "correction", "type": "rewrite"},
    {"id": "good", "type": "accept"},
    {"id": "notes", "type": "text"},
]
TRIPLES = [Candidate(f"prompt {i}", (f"a {i}", f"b {i}", f"c {i}")) for i in range(3)]


def full_answer(who: int) -> Any:
    """Answers that differ by person and item, with every kind of value in them."""

    def answer(shown: queue.Presentation) -> dict[str, Any]:
        texts = sorted(shown.responses, key=lambda pair: pair[1])
        first, second = texts[0][0], texts[1][0]
        odd = len(prompt_key(shown.prompt)) % 2
        better: dict[str, Any] = {"choice": (first, second)[(who + odd) % 2], "strength": 1 + who}
        if who == 2:
            better = {"choice": "tie" if odd else "both_bad"}
        span = {"start": 1, "end": 3, "kind": "language", "severity": ("minor", "major")[odd]}
        return {
            "better": better,
            "overall": {first: 1 + who, second: 7 - who},
            "wrong": {first: ["rude", "false_"] if who == 1 else []},
            "errors": {second: [span] if who == 0 else []},
            "correction": {second: f"Better by {who}."} if odd else {},
            "good": {first: True, second: who == 1},
            "notes": f"noted by {who}",
        }

    return answer


def ranked(who: int) -> Any:
    def answer(shown: queue.Presentation) -> dict[str, Any]:
        ids = [key for key, _ in sorted(shown.responses, key=lambda pair: pair[1])]
        tiers = [[[ids[0]], [ids[1]], [ids[2]]], [[ids[2], ids[0]], [ids[1]]], [[ids[1]], [ids[0], ids[2]]]][who]
        return {"order": tiers}

    return answer


@pytest.fixture
def full(tmp_path: Path) -> Store:
    """Three items with two responses, three annotators, every type of question that goes with a comparison."""
    task = task_of({"questions": EVERYTHING, "distribution": {"overlap": 3, "random_share": 0.0}})
    return _answered(tmp_path / "full", task, PAIRS, full_answer)


@pytest.fixture
def orders(tmp_path: Path) -> Store:
    """Three items with three responses, ranked by three annotators, with ties."""
    task = task_of({"questions": [{"id": "order", "type": "rank"}], "distribution": {"overlap": 3}})
    return _answered(tmp_path / "orders", task, TRIPLES, ranked)


def _answered(folder: Path, task: Task, items: list[Candidate], how: Any) -> Store:
    folder.mkdir()
    store, names = make_store(folder, task, items, annotators=3)
    for who, name in enumerate(names):
        answer_all(store, name, how(who))
    return store


def said(store: Store, *questions: str) -> Counter[str]:
    """Every answer, without its annotator's name: prompt, texts and values by text."""
    found: Counter[str] = Counter()
    types = {question.id: question.type for question in store.task.questions}
    for answer in views.labels(store):
        values = {}
        for name, value in answer.values.items():
            if not questions or name in questions:
                values[name] = _by_text(types[name], value, answer.responses)
        values = {name: value for name, value in values.items() if value != {}}  # an empty answer says nothing
        found[json.dumps([answer.prompt, sorted(answer.responses), values], sort_keys=True)] += 1
    return found


def _by_text(kind: str, value: Any, texts: tuple[str, ...]) -> Any:
    if kind == "compare":
        return value | {"choice": texts[value["choice"]]} if isinstance(value["choice"], int) else value
    if kind == "rank":
        return [sorted(texts[i] for i in tier) for tier in value]
    if kind == "text":
        return value
    return {text: entry for text, entry in zip(texts, value, strict=True) if entry not in (None, [])}


def groups(store: Store) -> Counter[int]:
    """How many answers the annotators gave, most first: the names may change, who said what together may not."""
    return Counter(Counter(answer.annotator for answer in views.labels(store)).values())


def back(tmp_path: Path, store: Store, kind: str, *, task: Task | None = None, **settings: Any) -> Store:
    """A store made of what another one exported."""
    file = tmp_path / f"{kind}.json{'' if kind in ('argilla', 'label_studio') else 'l'}"
    export_file(store, kind, file, settings=Settings(**settings))
    tool = kind if kind not in ("preference", "ranking", "kto") else "jsonl"
    import_file(tmp_path / "back.db", file, tool, task)
    return Store.open(tmp_path / "back.db")


@pytest.mark.parametrize("kind", ["argilla", "label_studio"])
def test_every_type_of_answer_comes_back_from_another_tools_shape(tmp_path: Path, full: Store, kind: str) -> None:
    made = back(tmp_path, full, kind, task=full.task)
    assert said(made) == said(full)
    assert groups(made) == groups(full) == Counter({3: 3})
    assert verify(made).problems == []


@pytest.mark.parametrize("kind", ["argilla", "label_studio"])
def test_without_a_task_the_questions_are_found_in_the_file(tmp_path: Path, full: Store, kind: str) -> None:
    made = back(tmp_path, full, kind)
    types = {question.id: question.type for question in made.task.questions}
    assert types == {question["id"]: question["type"] for question in EVERYTHING}
    assert said(made) == said(full)


@pytest.mark.parametrize("kind", ["argilla", "label_studio", "ranking", "ultrafeedback"])
def test_rankings_with_ties_come_back(tmp_path: Path, orders: Store, kind: str) -> None:
    made = back(tmp_path, orders, kind)
    assert said(made) == said(orders) and sum(said(made).values()) == 9
    assert groups(made) == Counter({3: 3})


def test_preferences_come_back_with_their_strengths(tmp_path: Path, full: Store) -> None:
    """Ties are no preference and give no row: three items by two who decided."""
    made = back(tmp_path, full, "preference")
    wanted = Counter({key: n for key, n in said(full, "better").items() if '"strength"' in key})
    assert said(made) == wanted and sum(wanted.values()) == 6


def test_ratings_come_back_from_ultrafeedback_with_who_gave_them(tmp_path: Path, full: Store) -> None:
    """Its instructions are single texts, so the conversation stays out; 2 items x 3 annotators remain."""
    made = back(tmp_path, full, "ultrafeedback")
    wanted = Counter({key: n for key, n in said(full, "overall").items() if not key.startswith("[[")})
    assert said(made) == wanted and sum(wanted.values()) == 6
    assert groups(made) == Counter({2: 3})


def test_judgements_come_back_from_kto_rows(tmp_path: Path, full: Store) -> None:
    """18 responses were judged: 3 annotators x 3 items x 2."""
    export_file(full, "kto", tmp_path / "kto.jsonl")
    import_file(tmp_path / "back.db", tmp_path / "kto.jsonl", "jsonl")
    with Store.open(tmp_path / "back.db") as made:
        found = views.judgements(views.labels(made), made.task).records
    wanted = views.judgements(views.labels(full), full.task).records
    assert _judged(found) == _judged(wanted) and len(found) == 18


def _judged(records: list[Any]) -> Counter[Any]:
    return Counter((prompt_key(r.prompt), r.response, r.desirable) for r in records)


def test_corrections_come_back_from_rlhf_v(tmp_path: Path, full: Store) -> None:
    made = back(tmp_path, full, "rlhf_v")
    found, wanted = (views.corrections(views.labels(s), s.task).records for s in (made, full))
    single = [r for r in wanted if isinstance(r.prompt, str)]
    assert Counter((r.prompt, r.chosen, r.rejected) for r in found) == Counter(
        (r.prompt, r.chosen, r.rejected) for r in single
    )
    assert found


def test_transcripts_come_back_as_the_same_pairs(tmp_path: Path, full: Store) -> None:
    made = back(tmp_path, full, "hh_rlhf")
    found, wanted = (views.comparisons(views.labels(s), s.task).records for s in (made, full))
    assert _pairs(found) == _pairs(wanted) and len(found) == 6


def _pairs(records: list[Any]) -> Counter[Any]:
    return Counter((_turns(r.prompt), r.chosen, r.rejected) for r in records)


def _turns(prompt: Any) -> str:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return json.dumps(turns, sort_keys=True)


def test_a_text_that_would_be_read_as_another_turn_is_left_out_of_transcripts(tmp_path: Path) -> None:
    trick = [Candidate("prompt", ("good\n\nHuman: and now?", "bad"))]
    task = task_of({"questions": [{"id": "better", "type": "compare"}]})
    store, (name, _) = make_store(tmp_path, task, trick)
    answer_all(store, name, lambda shown: {"better": {"choice": shown.responses[0][0], "strength": 1}})
    about = export_file(store, "hh_rlhf", tmp_path / "out.jsonl")
    assert about["records"] == 0 and sum(about["left_out"].values()) == 1


def test_what_is_written_for_training_is_read_by_palate(tmp_path: Path, full: Store) -> None:
    kinds = {"preference": "comparisons", "kto": "judgements", "sft": "demonstrations", "hh_rlhf": "comparisons"}
    kinds |= {"ddpo": "corrections", "rlhf_v": "comparisons", "ultrafeedback": "rankings"}
    for kind, read_as in kinds.items():
        about = export_file(full, kind, tmp_path / f"{kind}.jsonl")
        assert len(read_records(tmp_path / f"{kind}.jsonl", read_as)) == about["records"] > 0, kind


def test_conversational_rows_are_the_same_records(tmp_path: Path, full: Store) -> None:
    for kind, read_as in (("preference", "comparisons"), ("kto", "judgements")):
        found = []
        for conversational in (False, True):
            file = tmp_path / f"{kind}-{conversational}.jsonl"
            export_file(full, kind, file, settings=Settings(conversational=conversational))
            found.append(read_records(file, read_as))
        assert [prompt_key(r.prompt) for r in found[0]] == [prompt_key(r.prompt) for r in found[1]]
        if kind == "preference":
            assert [(r.chosen, r.rejected) for r in found[0]] == [(r.chosen, r.rejected) for r in found[1]]


def test_a_consensus_row_names_its_annotators_and_how_sure_it_is(tmp_path: Path) -> None:
    """Twelve items on which three agree: the probability of the preferred side is well above one half, and below 1."""
    task = task_of({"questions": [{"id": "better", "type": "compare"}], "distribution": {"overlap": 3}})
    store, names = make_store(tmp_path, task, 12, annotators=3)
    for name in names:
        answer_all(store, name, lambda shown: {"better": {"choice": _good(shown), "strength": 1}})
    export_file(store, "preference", tmp_path / "out.jsonl", settings=Settings(labels="consensus"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["chosen"].startswith("good") for row in rows)
    assert all(sorted(row["annotators"]) == names and 0.7 < row["p_chosen"] < 1 and row["margin"] > 0 for row in rows)


def _good(shown: queue.Presentation) -> str:
    return next(key for key, text in shown.responses if text.startswith("good"))


def test_a_prompt_is_on_one_side_of_an_exported_split(tmp_path: Path) -> None:
    task = task_of({"questions": [{"id": "better", "type": "compare"}], "distribution": {"overlap": 2}})
    store, names = make_store(tmp_path, task, 40)
    for name in names:
        answer_all(store, name, lambda shown: {"better": {"choice": _good(shown), "strength": 1}})
    export_file(store, "preference", tmp_path / "pairs.jsonl", validation=0.25)
    sides = [read_records(tmp_path / f"pairs{name}.jsonl", "comparisons") for name in ("", ".validation")]
    prompts = [{r.prompt for r in side} for side in sides]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 40
    assert [len(side) for side in sides] == [2 * len(p) for p in prompts] and 4 <= len(prompts[1]) <= 16


def test_steps_are_the_response_and_the_marked_one_is_wrong(tmp_path: Path) -> None:
    task = task_of({"questions": [{"id": "errors", "type": "spans", "kinds": ["wrong"]}], "show": 1})
    store, (name, _) = make_store(tmp_path, task, [Candidate("prompt", ("One. Two is 3. End.",))])
    span = {"start": 5, "end": 8, "kind": "wrong"}
    answer_all(store, name, lambda shown: {"errors": {shown.responses[0][0]: [span]}})
    export_file(store, "stepwise", tmp_path / "out.jsonl")
    (row,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["completions"] == ["One. ", "Two is 3. ", "End."] and row["labels"] == [True, False, True]


@pytest.mark.parametrize("text", ["", "no stop", "a\n\nb\n", "1. 2. 3!", "真的。假的！", 'He said "no." Then'])
def test_steps_joined_are_the_text(text: str) -> None:
    assert "".join(steps_of(text)) == text


def test_ddpo_weighs_the_changed_tokens(tiny_tokenizer: Any) -> None:
    """Every character is a token or more: those of "cat" (2..5) weigh 5, all others and the end 1."""
    ids, weights = token_weights(tiny_tokenizer, "a cat.", ((2, 5),), 5.0)
    places = tiny_tokenizer("a cat.", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(weights) == len(ids) + 1 and weights[-1] == 1.0
    assert [w == 5.0 for w in weights[:-1]] == [start < 5 and stop > 2 for start, stop in places]


@pytest.mark.parametrize("kind", ["argilla", "label_studio"])
def test_one_list_is_not_written_where_lines_are_expected(tmp_path: Path, full: Store, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"out\.jsonl.*one JSON list.*\.json"):
        export_file(full, kind, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_importing_a_file_again_adds_nothing(tmp_path: Path, full: Store) -> None:
    file = tmp_path / "out.json"
    export_file(full, "label_studio", file)
    first = import_file(tmp_path / "back.db", file, "label_studio")
    moved = tmp_path / "elsewhere.json"
    file.rename(moved)
    again = import_file(tmp_path / "back.db", moved, "label_studio")
    assert (first.answers, first.known) == (9, 0) and (again.answers, again.known, again.items) == (0, 9, 0)


def test_opposite_judgements_of_a_pair_are_of_one_item(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "annotator": "anna"},
        {"prompt": "p", "chosen": "y", "rejected": "x", "annotator": "ben"},
    ]
    rankings = [
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], "annotator": "anna"},
        {"prompt": "q", "responses": ["c", "b", "a"], "ranks": [1, 1, 2], "annotator": "ben"},
    ]
    for name, given in (("pairs", rows), ("orders", rankings)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        done = import_file(tmp_path / f"{name}.db", file, "jsonl")
        assert (done.items, done.answers, done.annotators) == (1, 2, 2)
    with Store.open(tmp_path / "orders.db") as store:
        found = views.rankings(views.labels(store), store.task).records
    ranks = [dict(zip(r.responses, r.ranks, strict=True)) for r in found]
    assert ranks == [{"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 1, "c": 1}]


def test_names_of_imported_annotators_are_not_in_the_log(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    row = {"prompt": "p", "chosen": "x", "rejected": "y", "annotator": "Anna Secret"}
    file.write_text(json.dumps(row) + "\n")
    import_file(tmp_path / "f.db", file, "jsonl")
    with Store.open(tmp_path / "f.db") as store:
        log = json.dumps([[e.id, e.actor, dict(e.body)] for e in store.events()])
        (person,) = people(store)
        (answer,) = [e for e in store.events() if e.kind == "answer"]
    assert "Secret" not in log and person.name == "jsonl: Anna Secret" and not person.active
    assert answer.body["source"]["place"] == f"{file}:1" and answer.actor == person.pseudonym


def test_what_several_said_together_is_nobodys_judgement(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "p_chosen": 0.8, "annotators": ["a", "b"]},
        {"prompt": "p", "chosen": "x", "rejected": "y", "probability": 0.8},
        {"prompt": "p", "chosen": "x", "rejected": "y", "probability": 0.5, "annotator": "a"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_file(file, "jsonl")
    assert found.left_out == Counter({"of several people together": 2})
    assert [j.values for j in found.judged] == [{"better": {"choice": "tie"}}]


def test_a_rating_task_refuses_comparisons_with_what_it_asks(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}) + "\n")
    task = task_of({"questions": [{"id": "overall", "type": "rating"}]})
    with pytest.raises(FeedbackError, match=r"nothing was taken.*asks: overall \(rating\)"):
        import_file(tmp_path / "f.db", file, "jsonl", task)


def test_comparisons_become_rankings_where_the_task_ranks(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}) + "\n")
    import_file(tmp_path / "f.db", file, "jsonl", task_of({"questions": [{"id": "order", "type": "rank"}]}))
    with Store.open(tmp_path / "f.db") as store:
        (record,) = views.rankings(views.labels(store), store.task).records
    assert dict(zip(record.responses, record.ranks, strict=True)) == {"x": 1, "y": 2}


# --- the tools' own files ------------------------------------------------------------------------------------------

PAIRWISE = [
    {
        "id": 7,
        "data": {"prompt": "Say hello.", "answer1": "Hello.", "answer2": "No."},
        "annotations": [
            {
                "id": 31,
                "completed_by": {"id": 3, "email": "ann@example.org"},
                "was_cancelled": False,
                "lead_time": 4.288,
                "created_at": "2021-03-09T22:16:08.728353Z",
                "result": [
                    {"from_name": "pw", "to_name": "txt-1,txt-2", "type": "pairwise", "value": {"selected": "right"}}
                ],
            },
            {"id": 32, "completed_by": 4, "was_cancelled": True, "result": []},
        ],
    }
]
RANKER = [
    {
        "id": 1,
        "data": {"prompt": "Q", "items": [{"id": "llm_1", "body": "one"}, {"id": "llm_2", "body": "two"}]},
        "annotations": [
            {
                "completed_by": 1,
                "result": [
                    {
                        "from_name": "rank",
                        "to_name": "results",
                        "type": "ranker",
                        "value": {"ranker": {"rank": ["llm_2", "llm_1"]}},
                    }
                ],
            }
        ],
    }
]


def _one(tmp_path: Path, rows: Any, tool: str) -> Any:
    file = tmp_path / "in.json"
    file.write_text(json.dumps(rows))
    return read_file(file, tool)


def test_label_studios_pairwise_is_read(tmp_path: Path) -> None:
    found = _one(tmp_path, PAIRWISE, "label_studio")
    (judged,) = found.judged
    assert (judged.annotator, judged.seconds, judged.id) == ("ann@example.org", 4.288, "31")
    assert judged.responses == ("Hello.", "No.") and judged.values == {"pw": {"choice": 1, "strength": 1}}
    assert found.left_out == Counter({"skipped annotations": 1})
    import_file(tmp_path / "f.db", tmp_path / "in.json", "label_studio")
    with Store.open(tmp_path / "f.db") as store:
        (answer,) = views.answers(store)
        assert answer.time == "2021-03-09T22:16:08.728353Z" and answer.seconds == 4.288


def test_label_studios_ranker_is_read(tmp_path: Path) -> None:
    (judged,) = _one(tmp_path, RANKER, "label_studio").judged
    assert judged.responses == ("one", "two") and judged.values == {"rank": [[1], [0]]}


def test_label_studios_named_buckets_are_no_order(tmp_path: Path) -> None:
    rows = json.loads(json.dumps(RANKER))
    rows[0]["annotations"][0]["result"][0]["value"]["ranker"] = {"good": ["llm_1"], "biased": ["llm_2"]}
    with pytest.raises(DataError, match="rankings that do not place every response once"):
        _one(tmp_path, rows, "label_studio")


ARGILLA_2 = [
    {
        "id": "r1",
        "fields": {"prompt": "Q", "response-1": "one", "response-2": "two"},
        "metadata": {},
        "suggestions": {},
        "responses": {
            "preference": [
                {"value": ["response-2", "response-1"], "user_id": "u1", "status": "submitted"},
                {"value": ["response-1", "response-2"], "user_id": "u2", "status": "draft"},
            ],
            "why": [{"value": "shorter", "user_id": "u1"}],
        },
        "vectors": {},
    }
]
ARGILLA_1 = [
    {
        "instruction": "Q",
        "reply_1": "one",
        "reply_2": "two",
        "reply-ranking": [
            {"user_id": "u1", "value": {"rank": [1, 1], "value": ["reply-1", "reply-2"]}, "status": "submitted"}
        ],
        "external_id": None,
    }
]
ARGILLA_COLUMNS = [
    {
        "prompt": "Q",
        "response": "one",
        "quality": {"user_id": ["u1", "u2"], "value": [4, 2], "status": ["submitted"] * 2},
    }
]
ARGILLA_SPANS = [
    {
        "id": "1",
        "fields": {"prompt": "Q", "response": "bad word"},
        "responses": {"marks": [{"value": [{"start": 0, "end": 3, "label": "rude"}], "user_id": "u"}]},
    }
]


def test_argillas_records_are_read(tmp_path: Path) -> None:
    found = _one(tmp_path, ARGILLA_2, "argilla")
    (judged,) = found.judged
    assert judged.values == {"preference": [[1], [0]], "why": "shorter"} and judged.annotator == "u1"
    assert found.left_out == Counter({"answers with the status draft": 1})


def test_argillas_older_rows_are_read(tmp_path: Path) -> None:
    (tied,) = _one(tmp_path, ARGILLA_1, "argilla").judged
    assert tied.values == {"reply_ranking": [[0, 1]]} and tied.responses == ("one", "two")
    first, second = _one(tmp_path, ARGILLA_COLUMNS, "argilla").judged
    assert (first.values, second.values) == ({"quality": [4]}, {"quality": [2]})


def test_argillas_spans_are_read(tmp_path: Path) -> None:
    (judged,) = _one(tmp_path, ARGILLA_SPANS, "argilla").judged
    assert judged.values == {"marks": [[{"start": 0, "end": 3, "kind": "rude"}]]}


def test_the_published_ultrafeedback_is_one_annotators_ratings(tmp_path: Path) -> None:
    aspects = {"helpfulness": {"Rating": "4", "Rationale": "..."}, "honesty": {"Rating": "N/A"}}
    rows = [
        {
            "instruction": "Q",
            "completions": [
                {"model": "m1", "response": "one", "overall_score": 7.5, "annotations": aspects},
                {"model": "m2", "response": "two", "overall_score": 8.0, "annotations": aspects},
            ],
        }
    ]
    (judged,) = _one(tmp_path, rows, "ultrafeedback").judged
    assert judged.values == {"helpfulness": [4, 4], "order": [[1], [0]]} and judged.sources[0] == {"model": "m1"}


@pytest.mark.shared_data
def test_three_real_annotators_keep_their_own_judgements(tmp_path: Path, shared_data: Path) -> None:
    """PandaLM's test set (arXiv:2306.05087): of its first 60 items, what each of three people said, 0 = a tie."""
    with gzip.open(shared_data / "annotation/pandalm_3annotators.jsonl.gz", "rt", encoding="utf-8") as file:
        items = [json.loads(line) for line in itertools.islice(file, 60)]
    items = [item for item in items if item["response_1"] != item["response_2"]]
    rows, wanted = [], Counter[Any]()
    for item in items:
        prompt = f"{item['instruction']}\n\n{item['input']}"
        for name, vote in item["annotators"].items():
            sides = [item["response_1"], item["response_2"]]
            chosen, rejected = sides if vote != "2" else sides[::-1]
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "annotator": name}
            rows.append(row | ({"probability": 0.5} if vote == "0" else {}))
            wanted[name, prompt, chosen if vote != "0" else "tie"] += 1
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = import_file(tmp_path / "f.db", file, "jsonl")
    assert (done.answers, done.annotators) == (3 * len(items), 3)
    with Store.open(tmp_path / "f.db") as store:
        names = {person.pseudonym: person.name.removeprefix("jsonl: ") for person in people(store)}
        found = Counter[Any]()
        for answer in views.labels(store):
            choice = answer.values["better"]["choice"]
            found[names[answer.annotator], answer.prompt, choice if choice == "tie" else answer.responses[choice]] += 1
    assert found == wanted


def test_a_format_that_the_task_cannot_fill_says_what_it_asks(tmp_path: Path, orders: Store) -> None:
    for kind in ("sft", "ddpo", "rlhf_v", "stepwise"):
        with pytest.raises(ConfigError, match=r"this task asks: order \(rank\)"):
            export_file(orders, kind, tmp_path / kind)
    with pytest.raises(ConfigError, match="nothing is exported as"):
        export_file(orders, "parquet", tmp_path / "x")
    assert set(EXPORTS) >= {"preference", "ranking", "kto", "rlhf_v", "ddpo", "sft", "hh_rlhf", "ultrafeedback"}


def test_a_table_of_answers_holds_no_formula() -> None:
    """The guard is the store's own; a response that begins like a formula is the attack."""
    assert csv_text([["=1+1", "@x", 1]]) == "'=1+1,'@x,1\r\n"


def test_the_commands_export_and_import(tmp_path: Path, orders: Store) -> None:
    out, back_again = str(tmp_path / "ls.json"), str(tmp_path / "back.db")
    for words, code in (
        (["export", str(orders.path), "--as", "label_studio", "--out", out], 0),
        (["import", back_again, out, "--from", "label_studio"], 0),
        (["export", back_again, "--as", "preference", "--consensus", "--out", str(tmp_path / "p.jsonl")], 0),
        (["export", back_again, "--as", "preference", "--out", str(tmp_path / "p.jsonl")], 1),  # it is there
        (["export", back_again, "--as", "rankings", "--conversational"], 2),
        (["import", back_again, out, "--from", "potato"], 2),
    ):
        done = CliRunner().invoke(app, ["label", *words])
        assert done.exit_code == code, f"{words}\n{done.stderr}\n{done.exception!r}"
    assert json.loads((tmp_path / "p.jsonl.provenance.json").read_text())["answers"] == 9
