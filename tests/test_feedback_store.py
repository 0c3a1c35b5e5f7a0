"""The store of feedback: nothing acknowledged is lost or done twice, and nothing can be changed unseen."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from feedback_stores import answer_all, compare_task, make_store, prefer_bad, prefer_good
from palate.errors import ConfigError, FeedbackError
from palate.feedback import people, queue
from palate.feedback.items import Candidate, add_items
from palate.feedback.store import Conflict, Store
from palate.feedback.task import task_of
from palate.feedback.upkeep import backup, merge, status, verify


def test_the_hash_of_each_event_covers_its_content_and_the_hash_before(tmp_path) -> None:
    """hash = sha256(previous + JSON of [seq, id, time, kind, actor, body]), keys sorted and without spaces."""
    store, (anna, _) = make_store(tmp_path, compare_task())
    answer_all(store, anna)
    previous, count = "0" * 64, 0
    with closing(sqlite3.connect(store.path)) as db:
        for seq, key, time, kind, actor, body, before, hashed in db.execute("SELECT * FROM event ORDER BY seq"):
            content = [seq, key, time, kind, actor, json.loads(body)]
            text = previous + json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            assert (before, hashed) == (previous, hashlib.sha256(text.encode()).hexdigest())
            previous, count = hashed, count + 1
    found = verify(store)
    assert (found.events, found.last_hash, found.problems) == (count, previous, [])


@pytest.mark.parametrize("sql", ["UPDATE event SET actor = 'x' WHERE seq = 2", "DELETE FROM event WHERE seq = 2"])
def test_events_cannot_be_changed_or_deleted(tmp_path, sql: str) -> None:
    store, _ = make_store(tmp_path, compare_task())
    with closing(sqlite3.connect(store.path)) as db, pytest.raises(sqlite3.IntegrityError, match="events are never"):
        db.execute(sql)


FORGERIES = {
    "a changed body": ("UPDATE event SET body = replace(body, 'good 1', 'GOOD 1') WHERE kind = 'item'", "was changed"),
    "a changed time": ("UPDATE event SET time = '2020-01-01T00:00:00.000000Z' WHERE seq = 4", "was changed"),
    "an event taken out": ("DELETE FROM event WHERE seq = 4", "event 4 is missing"),
    "a changed answer": ('UPDATE answer SET value = \'{"better":{"choice":"tie"}}\'', "the table answer"),
    "a changed count": ("UPDATE item SET answers = 0", "the table item"),
    "a promoted annotator": ("UPDATE annotator SET role = 'admin'", "the table annotator"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_verify_sees(tmp_path, name: str) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    answer_all(store, anna)
    sql, said = FORGERIES[name]
    with closing(sqlite3.connect(store.path)) as db:
        made = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for trigger, _ in made:
            db.execute(f"DROP TRIGGER {trigger}")
        assert db.execute(sql).rowcount >= 1
        for _, again in made:  # whoever forges puts them back
            db.execute(again)
        db.commit()
    problems = verify(store).problems
    assert len(problems) == 1 and said in problems[0], problems


def test_verify_sees_that_a_trigger_is_gone(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task())
    with closing(sqlite3.connect(store.path)) as db:
        db.execute("DROP TRIGGER event_is_never_deleted")
        db.commit()
    assert verify(store).problems == ["the trigger event_is_never_deleted is gone: events could be changed"]


def test_a_log_that_was_cut_off_shows_against_a_noted_hash(tmp_path) -> None:
    """A shorter chain is a whole chain; only a hash noted elsewhere tells."""
    store, (anna, _) = make_store(tmp_path, compare_task())
    noted_early = store.last()[1]
    copy = tmp_path / "early.db"
    backup(store, copy)
    answer_all(store, anna)
    noted_late = store.last()[1]
    assert verify(store, after=noted_early).problems == [] == verify(store, after=noted_late).problems
    with Store.open(copy) as early:
        assert verify(early).problems == []
        assert "cut off" in verify(early, after=noted_late).problems[0]


def test_a_repeated_write_gives_the_first_event_and_changes_nothing(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    shown = queue.next_item(store, anna)
    first = queue.answer(store, anna, "key-1", shown.id, prefer_good(shown), seconds=3.2)
    events = store.last()
    for _ in range(3):
        assert queue.answer(store, anna, "key-1", shown.id, prefer_good(shown), seconds=3.2) == first
    assert store.last() == events


@pytest.mark.parametrize("other", ["values", "presentation", "annotator", "kind"])
def test_a_key_used_for_something_else_is_refused(tmp_path, other: str) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2))
    shown = queue.next_item(store, anna)
    queue.answer(store, anna, "key-1", shown.id, prefer_good(shown))
    before = store.last()
    with pytest.raises(Conflict, match="key-1"):
        if other == "values":
            queue.answer(store, anna, "key-1", shown.id, prefer_bad(shown))
        elif other == "presentation":
            second = queue.next_item(store, anna)
            before = store.last()
            queue.answer(store, anna, "key-1", second.id, prefer_good(second))
        elif other == "annotator":
            theirs = queue.next_item(store, ben)
            before = store.last()
            queue.answer(store, ben, "key-1", theirs.id, prefer_good(theirs))
        else:
            queue.undo(store, anna, "key-1", shown.id)
    assert store.last() == before


def test_a_failed_transaction_leaves_nothing(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    before = store.last()
    with pytest.raises(RuntimeError), store.write() as tx:
        tx.append("flag", anna, {"item": "x", "text": "y", "presentation": "z"})
        raise RuntimeError
    assert store.last() == before and verify(store).problems == []


def test_writers_in_several_threads_and_connections_make_one_chain(tmp_path) -> None:
    """8 writers, 4 of them with a connection of their own, 25 events each: 200 more events, chain whole."""
    store, (anna, _) = make_store(tmp_path, compare_task())
    before = store.last()[0]
    others = [Store.open(store.path) for _ in range(4)]

    def write(n: int) -> None:
        mine = others[n] if n < 4 else store
        for i in range(25):
            mine.append("message", anna, {"n": n, "i": i}, key=f"message-{n}-{i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    found = verify(store)
    assert (found.events, found.problems) == (before + 200, [])
    for other in others:
        other.close()


def test_the_disk_is_waited_for(tmp_path) -> None:
    """synchronous = 2 is FULL; journal_mode is WAL."""
    store, _ = make_store(tmp_path, compare_task())
    with store.write() as tx:
        assert (tx.one("PRAGMA synchronous")[0], tx.one("PRAGMA journal_mode")[0]) == (2, "wal")


def test_nobody_else_may_read_the_file(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task())
    assert store.path.stat().st_mode & 0o077 == 0


def test_what_is_no_store_is_refused_and_not_touched(tmp_path) -> None:
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with closing(sqlite3.connect(other)) as db:
        db.execute("CREATE TABLE t(a)")
        db.commit()
    text.write_text("not a database, but long enough to be looked at as if it were one" * 20)
    for path, said in (
        (other, "some other SQLite file"),
        (text, "not a store"),
        (tmp_path / "none.db", "no such store"),
    ):
        before = path.read_bytes() if path.exists() else None
        with pytest.raises(FeedbackError, match=said):
            Store.open(path)
        assert (path.read_bytes() if path.exists() else None) == before
    with pytest.raises(FeedbackError, match="exists already"):
        Store.create(other, compare_task())


def test_a_backup_of_a_store_in_use_is_whole(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=20)
    answer_all(store, anna, most=10)
    with store.write() as tx:  # a transaction in the middle: the copy holds what was committed before it
        tx.append("message", anna, {"half": True})
        found = backup(store, tmp_path / "copy.db")
    with Store.open(tmp_path / "copy.db") as copy:
        assert copy.last() == (found.events, found.last_hash)
        assert status(copy)["answers"] == 10 and verify(copy).problems == []
    assert store.last()[0] == found.events + 1
    with pytest.raises(FeedbackError, match="exists already"):
        backup(store, tmp_path / "copy.db")


def test_merging_a_copy_that_went_on_takes_what_is_new_once(tmp_path) -> None:
    """Anna answers in one copy, Ben in the other; 3 answers each. Merging twice takes nothing twice."""
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2))
    store.close()
    shutil.copy(store.path, tmp_path / "away.db")
    store, away = Store.open(store.path), Store.open(tmp_path / "away.db")
    answer_all(store, anna)
    answer_all(away, ben, prefer_bad)
    first = merge(store, away)
    assert first["taken"] == 6  # 3 presentations and 3 answers
    assert merge(store, away)["taken"] == 0
    assert status(store)["answers"] == 6 and verify(store).problems == []
    with store.read() as tx:
        assert {row[0] for row in tx.all("SELECT answers FROM item")} == {2}
    assert [event.kind for event in store.events()].count("merge") == 1


def test_merging_refuses_other_questions_and_broken_stores(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task())
    (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    other, _ = make_store(tmp_path / "b", task_of({"questions": [{"id": "good", "type": "accept"}]}), items=2)
    with pytest.raises(FeedbackError, match="other questions"):
        merge(store, other)
    broken, _ = make_store(tmp_path / "c", compare_task())
    with closing(sqlite3.connect(broken.path)) as db:
        db.execute("UPDATE item SET priority = 9")
        db.commit()
    before = store.last()
    with pytest.raises(FeedbackError, match="not intact"):
        merge(store, broken)
    assert store.last() == before


def test_questions_are_fixed_once_they_have_answers(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    two = {"id": "better", "type": "compare", "strengths": 1}
    store.set_task(task_of({"questions": [two]}))  # no answers yet
    store.set_task(compare_task())
    answer_all(store, anna, most=1)
    store.set_task(compare_task(overlap=3))  # how work is dealt out may change
    with pytest.raises(FeedbackError, match="other questions"):
        store.set_task(task_of({"questions": [two]}))
    assert verify(store).problems == []


def test_importing_twice_adds_nothing(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task(), items=0)
    many = [Candidate("p", ("a", "b")), Candidate("q", ("a", "b")), Candidate("r", ("same", "same"))]
    first, second = add_items(store, many), add_items(store, many)
    assert (first.new, first.known, first.empty) == (2, 0, 1)
    assert (second.new, second.known, second.empty) == (0, 2, 1)


def test_four_responses_of_a_comparing_task_become_all_six_pairs(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task(), items=[Candidate("p", ("a", "b", "c", "d"))])
    with store.read() as tx:
        pairs = {tuple(r["text"] for r in json.loads(row[0])) for row in tx.all("SELECT responses FROM item")}
    assert pairs == {("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")}


def test_names_can_be_erased_without_breaking_the_chain(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    answer_all(store, anna)
    assert not any("n0" in json.dumps([event.actor, dict(event.body)]) for event in store.events())
    people.forget_name(store, "n0")
    assert {person.name for person in people.people(store)} == {anna, "n1"} and verify(store).problems == []


def test_a_login_link_works_once_and_only_its_hash_is_kept(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    token = people.issue_link(store, "n0")
    assert len(token) >= 43  # 256 bits in base64url
    person, session = people.log_in(store, token)
    assert person.pseudonym == anna and people.who(store, session) == person
    assert people.log_in(store, token) is None
    assert people.who(store, token) is None  # a link is no session
    people.log_out(store, session)
    assert people.who(store, session) is None
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.encode() not in kept and session.encode() not in kept


def test_a_link_ends_and_so_do_sessions_of_somebody_put_out(tmp_path, monkeypatch) -> None:
    store, _ = make_store(tmp_path, compare_task())
    old = people.issue_link(store, "n0", days=1)
    session = people.log_in(store, people.issue_link(store, "n0"))[1]
    people.change_person(store, "n0", active=False)
    assert people.who(store, session) is None and people.log_in(store, old) is None
    people.change_person(store, "n0", active=True)
    late = people.issue_link(store, "n0", days=1)
    now = people.clock.time()
    monkeypatch.setattr(people.clock, "time", lambda: now + 86_401)
    assert people.log_in(store, late) is None


@pytest.mark.parametrize("token", ["", "short", "a" * 64])
def test_a_token_that_can_be_guessed_is_refused(tmp_path, token: str) -> None:
    store, _ = make_store(tmp_path, compare_task())
    with pytest.raises(FeedbackError, match="guessed"):
        people.issue_link(store, "n0", token=token)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"questions": []}, "questions"),
        ({"questions": [{"id": "a", "type": "rank"}, {"id": "a", "type": "accept"}]}, "two questions"),
        ({"questions": [{"id": "a", "type": "stars"}]}, "compare, rank, rating"),
        ({"questions": [{"id": "a", "type": "rating", "scale": 100}]}, "questions.0.scale"),
        ({"questions": [COMPARE_ONE := {"id": "a", "type": "compare"}], "show": 4}, "about 2 responses"),
        ({"questions": [COMPARE_ONE], "distribution": {"overlap": 0}}, "distribution.overlap"),
        ({"questions": [COMPARE_ONE], "distribution": {"gold_share": 0.6, "repeat_share": 0.5}}, "nothing is left"),
        ({"questions": [COMPARE_ONE], "titel": "x"}, "titel"),
    ],
)
def test_wrong_task_settings_are_named(settings, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task_of(settings)


def test_a_store_from_elsewhere_makes_nobody_an_admin(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    store.close()
    shutil.copy(store.path, tmp_path / "away.db")
    store, away = Store.open(store.path), Store.open(tmp_path / "away.db")
    people.change_person(away, "n0", role="admin")
    answer_all(away, anna)
    merge(store, away)
    assert {person.role for person in people.people(store)} == {"annotator"} and status(store)["answers"] == 3


def test_with_nobody_there_yet_no_item_is_skipped_by_all(tmp_path) -> None:
    store, _ = make_store(tmp_path, compare_task(), annotators=0)
    assert status(store)["items"] > 0 and status(store)["skipped_by_all"] == 0
