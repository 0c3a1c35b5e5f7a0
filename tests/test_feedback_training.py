"""A store of feedback where a method takes records: the right view, whose answers, and from which events."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from feedback_stores import answer_all, make_store, prefer_bad, prefer_good
from palate.cli import app
from palate.data.kinds import Comparison, Judgement, Prompt, Ranking, SegmentedComparison
from palate.errors import ConfigError, DataError
from palate.feedback import queue
from palate.feedback.exchange import import_file
from palate.feedback.items import Candidate
from palate.feedback.learned import is_store, learn, votes_of
from palate.feedback.store import Store
from palate.feedback.task import task_of
from palate.feedback.views import labels
from palate.models.load import save_model
from tiny import tiny, tokenizer_of

QUICK = ["training.max_steps=2", "training.batch_size=4", "training.eval_every=0", "training.save_every=0"]
COMPARE = {"id": "better", "type": "compare", "strengths": 3, "tie": True}
WORDS = "abcdefghijkl"


def compared(folder: Path, *how: Any, items: int = 12) -> Store:
    """A store whose pairs "a c" (good) and "d e" were compared by one annotator for each way of answering."""
    task = task_of({"questions": [COMPARE], "distribution": {"overlap": max(1, len(how)), "random_share": 0.0}})
    pairs = [Candidate(f"{w} b ", ("good a c", "bad d e")) for w in WORDS[:items]]
    store, names = make_store(folder, task, pairs, annotators=max(1, len(how)))
    for name, answer in zip(names, how, strict=False):
        answer_all(store, name, answer)
    return store


def asked(folder: Path, question: dict[str, Any], answer: Any, responses: int = 1) -> Store:
    """A store with one other question, answered once for each of six prompts."""
    task = task_of({"questions": [question], "distribution": {"random_share": 0.0}})
    texts = ("a c b", "d e", "b a")[:responses]
    store, (name, _) = make_store(folder, task, [Candidate(f"{w} b ", texts) for w in WORDS[:6]])
    answer_all(store, name, answer)
    return store


def tie(shown: queue.Presentation) -> dict[str, Any]:
    return {"better": {"choice": "tie"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder)
    return folder


def train(base: Path, method: str, *words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["train", method, "-m", str(base), "-q", *words, *QUICK])
    assert done.exit_code == code, f"{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def test_a_store_is_known_by_its_header_and_nothing_else(tmp_path: Path) -> None:
    store = compared(tmp_path, prefer_good, items=1)
    other = tmp_path / "other.db"
    sqlite3.connect(other).execute("CREATE TABLE t(x)").connection.commit()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert is_store(store.path)  # while it is open, its header is still in the write-ahead log
    store.close()
    (tmp_path / "renamed.jsonl").write_bytes(store.path.read_bytes())
    assert is_store(store.path) and is_store(tmp_path / "renamed.jsonl")
    assert not any(
        is_store(tmp_path / name) for name in ("other.db", "rows.jsonl", "missing.db", "-")
    ) and not is_store("-")


def test_each_annotators_own_preferences_are_records(tmp_path: Path) -> None:
    store = compared(tmp_path, prefer_good, prefer_bad, tie, items=4)
    found = learn(store.path, "comparisons").records
    assert Counter((r.annotator, r.chosen) for r in found if isinstance(r, Comparison)) == {
        ("p-0", "good a c"): 4,
        ("p-1", "bad d e"): 4,
    }
    assert all(r.probability is None and r.margin is None and r.source.startswith("feedback.db:") for r in found)


def test_a_consensus_is_one_soft_label_for_each_pair(tmp_path: Path) -> None:
    """Three honest people and one who contradicts them always: they are believed, and no pair is certain."""
    store = compared(tmp_path, prefer_good, prefer_good, prefer_good, prefer_bad)
    found = learn(store.path, "comparisons", labels="consensus").records
    assert len(found) == 12 and all(isinstance(r, Comparison) and r.chosen == "good a c" for r in found)
    assert all(0.6 < r.probability < 1 for r in found)
    assert {r.annotator for r in found} == {"p-0, p-1, p-2, p-3"}


def test_a_consensus_knows_who_clicks_left(tmp_path: Path) -> None:
    """Someone who always takes the left one says nothing: with two honest people the good side wins every pair."""

    def left(shown: queue.Presentation) -> dict[str, Any]:
        return {"better": {"choice": shown.responses[0][0], "strength": 1}}

    store = compared(tmp_path, prefer_good, prefer_good, left)
    votes = votes_of(labels(store), store.task)
    sides = Counter(v.outcome for v in votes if v.annotator == "p-2")
    assert sides == {"left": 12} and all(v.sides_known for v in votes)
    assert all(r.chosen == "good a c" for r in learn(store.path, "comparisons", labels="consensus").records)


def test_sides_of_imported_judgements_are_not_known(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(json.dumps({"prompt": "p", "chosen": "x", "rejected": "y"}) + "\n")
    import_file(tmp_path / "f.db", file, "jsonl")
    with Store.open(tmp_path / "f.db") as store:
        assert [v.sides_known for v in votes_of(labels(store), store.task)] == [False]


def test_every_kind_of_record_has_its_view(tmp_path: Path) -> None:
    views: dict[str, tuple[dict[str, Any], Any, int, type, int]] = {
        "rankings": ({"id": "order", "type": "rank"}, _ranked, 3, Ranking, 6),
        "judgements": ({"id": "good", "type": "accept"}, _accepted, 2, Judgement, 12),
        "corrections": ({"id": "fix", "type": "rewrite"}, _rewritten, 1, SegmentedComparison, 6),
        "prompts": ({"id": "good", "type": "accept"}, _accepted, 2, Prompt, 6),
    }
    for kind, (question, answer, responses, cls, count) in views.items():
        (tmp_path / kind).mkdir()
        found = learn(asked(tmp_path / kind, question, answer, responses).path, kind).records
        assert len(found) == count and all(isinstance(record, cls) for record in found), kind
    demonstrations = learn(tmp_path / "corrections" / "feedback.db", "demonstrations").records
    assert {r.response for r in demonstrations} == {"c c b"}  # type: ignore[union-attr]


def _ranked(shown: queue.Presentation) -> dict[str, Any]:
    ids = [key for key, _ in sorted(shown.responses, key=lambda pair: pair[1])]
    return {"order": [[ids[1]], [ids[0], ids[2]]]}


def _accepted(shown: queue.Presentation) -> dict[str, Any]:
    return {"good": {key: text == "d e" for key, text in shown.responses}}


def _rewritten(shown: queue.Presentation) -> dict[str, Any]:
    return {"fix": {shown.responses[0][0]: "c c b"}}


def test_rankings_make_judgements_of_their_ends_only_where_nobody_was_asked(tmp_path: Path) -> None:
    """1 = "b a" alone, the two others tied last: one desirable, two undesirable, for each of six prompts."""
    learned = learn(asked(tmp_path, {"id": "order", "type": "rank"}, _ranked, 3).path, "judgements")
    assert Counter(r.desirable for r in learned.records) == {True: 6, False: 12}  # type: ignore[union-attr]
    assert "nobody having been asked what is good" in learned.origin


def test_methods_train_from_a_store(tmp_path: Path, base: Path) -> None:
    """Each reads its own view; the card names the last event, and how many answered."""
    pairs = compared(tmp_path, prefer_good, prefer_good)
    (tmp_path / "fix").mkdir()
    fixes = asked(tmp_path / "fix", {"id": "fix", "type": "rewrite"}, _rewritten)
    for method, store in (("reward", pairs), ("dpo", pairs), ("kto", pairs), ("sft", fixes), ("ddpo", fixes)):
        out = tmp_path / method
        train(base, method, "--data", str(store.path), "--out", str(out))
        card = (out / "card.md").read_text(encoding="utf-8")
        seq, last = store.last()
        answers, people = (24, 2) if store is pairs else (6, 1)
        assert f"{seq} events, the last with the hash {last}" in card, method
        assert f"{answers} answers by {people} annotators" in card and "not recorded" not in card


def test_a_reward_model_learns_soft_labels_of_the_consensus(tmp_path: Path, base: Path) -> None:
    store = compared(tmp_path, prefer_good, prefer_good, prefer_bad)
    train(base, "reward", "--data", str(store.path), "--out", str(tmp_path / "run"), "data.labels=consensus")
    assert "with the probability of the annotator-aware model" in (tmp_path / "run" / "card.md").read_text()
    train(base, "dpo", "--data", str(store.path), "--out", str(tmp_path / "dpo"), "data.labels=consensus")
    done = train(base, "cpo", "--data", str(store.path), "--out", str(tmp_path / "no"), "data.labels=consensus", code=1)
    assert 'the comparison has a "probability"' in done.stderr


def test_a_reward_model_learns_rankings_of_a_store(tmp_path: Path, base: Path) -> None:
    store = asked(tmp_path, {"id": "order", "type": "rank"}, _ranked, 3)
    for method in ("reward", "reward_listwise"):
        train(base, method, "--data", str(store.path), "--out", str(tmp_path / method))


def test_ppo_takes_the_prompts_of_a_store(tmp_path: Path, base: Path) -> None:
    store = compared(tmp_path, prefer_good)
    (tmp_path / "short.py").write_text("def short(prompts, responses):\n    return [-len(r) for r in responses]\n")
    words = ["--reward", f"{tmp_path / 'short.py'}:short", "--data", str(store.path), "--out", str(tmp_path / "run")]
    train(base, "ppo", *words, "sampling.max_new_tokens=4")
    assert "the prompts of 12 items" in (tmp_path / "run" / "card.md").read_text()


def test_a_prompts_answers_are_on_one_side_of_the_split(tmp_path: Path, base: Path) -> None:
    """12 prompts with two answers each, a quarter held out: items are whole prompts, none on both sides."""
    store = compared(tmp_path, prefer_good, prefer_bad)
    train(base, "reward", "--data", str(store.path), "--out", str(tmp_path / "r"), "data.validation_fraction=0.25")
    sides = json.loads((tmp_path / "r" / "data.json").read_text())
    assert sides["train"]["items"] + sides["validation"]["items"] == 12 and sides["validation"]["items"] >= 1


def test_an_adjudicators_decision_is_learnt_in_place_of_the_answers(tmp_path: Path) -> None:
    store = compared(tmp_path, prefer_good, prefer_bad, items=1)
    with store.write() as tx:
        tx.append("annotator", "admin", {"pseudonym": "p-judge", "role": "adjudicator", "active": True})
    found = queue.next_contested(store, "p-judge")
    assert isinstance(found, tuple)
    queue.adjudicate(store, "p-judge", "decision-00000001", found[0].id, prefer_bad(found[0]))
    (record,) = learn(store.path, "comparisons").records
    assert isinstance(record, Comparison) and (record.annotator, record.chosen) == ("p-judge", "bad d e")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.format=trl"], "data.format: "),
        (["data.rename={a: b}"], "data.rename: "),
    ],
)
def test_settings_of_files_are_refused_for_a_store(tmp_path: Path, base: Path, words: list[str], message: str) -> None:
    store = compared(tmp_path, prefer_good, items=2)
    done = train(base, "reward", "--data", str(store.path), "--out", str(tmp_path / "r"), *words, code=2)
    assert message in done.stderr and "is a store of feedback" in done.stderr


def test_labels_are_a_setting_of_stores(tmp_path: Path, base: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a ", "chosen": "b", "rejected": "c"}) + "\n")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "r"), "data.labels=consensus"]
    assert "is no store of feedback" in train(base, "reward", *words, code=2).stderr


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    store = compared(tmp_path, items=2)
    with pytest.raises(DataError, match="no comparisons yet: 0 answers"):
        learn(store.path, "comparisons")
    with pytest.raises(DataError, match="no two responses were compared yet"):
        learn(store.path, "comparisons", labels="consensus")
    with pytest.raises(
        ConfigError, match=r"no question of the types rewrite in this task. It asks: better \(compare\)"
    ):
        learn(store.path, "demonstrations")
    with pytest.raises(ConfigError, match="a consensus is made of comparisons"):
        learn(store.path, "rankings", labels="consensus")


def test_a_run_is_not_resumed_with_answers_that_came_later(tmp_path: Path, base: Path) -> None:
    """A finished run whose card is taken away counts as unfinished; with another answer in the store it is refused."""
    task = task_of({"questions": [COMPARE], "distribution": {"overlap": 2, "random_share": 0.0}})
    pairs = [Candidate(f"{w} b ", ("good a c", "bad d e")) for w in WORDS[:6]]
    store, (one, two) = make_store(tmp_path, task, pairs)
    answer_all(store, one)
    words = ["--data", str(store.path), "--out", str(tmp_path / "run")]
    train(base, "reward", *words)
    (tmp_path / "run" / "card.md").unlink()
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    train(base, "reward", *words)
    (tmp_path / "run" / "card.md").unlink()
    answer_all(store, two, prefer_bad)
    assert "the data changed since this run was started" in train(base, "reward", *words, code=1).stderr


def test_a_store_that_is_not_there_is_named_as_one(tmp_path) -> None:
    """Not as a data set of the hub, which the name could be too."""
    from palate.config import load_settings
    from palate.stage.records import read_sides

    config = load_settings("reward", settings={"model": "m", "data": {"train": f"{tmp_path}/none.db"}, "out": tmp_path})
    with pytest.raises(DataError, match="none.db: no such store of feedback. Make one with: palate label import"):
        read_sides(config)
