"""What the events of a store add up to: tables that ``apply`` brings up to date, one event at a time.

They hold nothing that the events do not say, so they can be thrown away and made again; ``store.verify`` does that in
memory and compares. Responses are named by their number in the item.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from palate.feedback.task import Task, task_of

DERIVED = ("task", "annotator", "item", "author", "presented", "answer", "late", "flag", "adjudication", "message")

SCHEMA = """
CREATE TABLE task(seq INTEGER PRIMARY KEY, settings TEXT NOT NULL, fingerprint TEXT NOT NULL);
CREATE TABLE annotator(pseudonym TEXT PRIMARY KEY, role TEXT NOT NULL, active INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE item(
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, kind TEXT NOT NULL, prompt TEXT NOT NULL, responses TEXT NOT NULL,
    images TEXT NOT NULL, gold TEXT, meta TEXT NOT NULL, shuffle INTEGER NOT NULL, priority REAL NOT NULL DEFAULT 0,
    open INTEGER NOT NULL DEFAULT 1, answers INTEGER NOT NULL DEFAULT 0, disagreement REAL NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX item_by_need ON item(kind, open, priority DESC, answers DESC, shuffle);
CREATE INDEX item_by_chance ON item(kind, open, shuffle);
CREATE INDEX item_contested ON item(kind, disagreement);
CREATE TABLE author(item TEXT NOT NULL, annotator TEXT NOT NULL, PRIMARY KEY (item, annotator)) WITHOUT ROWID;
CREATE TABLE presented(
    id TEXT PRIMARY KEY, seq INTEGER NOT NULL, item TEXT NOT NULL, annotator TEXT NOT NULL, purpose TEXT NOT NULL,
    repeat_of TEXT, shown TEXT NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL, previous TEXT) WITHOUT ROWID;
CREATE INDEX presented_by_annotator ON presented(annotator, item, state);
CREATE INDEX presented_by_number ON presented(annotator, number);
CREATE INDEX presented_repeat_of ON presented(repeat_of);
CREATE TABLE answer(
    event TEXT PRIMARY KEY, seq INTEGER NOT NULL, time TEXT NOT NULL, presentation TEXT NOT NULL UNIQUE,
    item TEXT NOT NULL, annotator TEXT NOT NULL, purpose TEXT NOT NULL, value TEXT NOT NULL, seconds REAL,
    changed INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX answer_by_item ON answer(item, purpose);
CREATE INDEX answer_by_annotator ON answer(annotator, purpose);
CREATE TABLE late(event TEXT PRIMARY KEY, presentation TEXT NOT NULL, annotator TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE flag(event TEXT PRIMARY KEY, item TEXT NOT NULL, annotator TEXT NOT NULL, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE adjudication(
    item TEXT PRIMARY KEY, event TEXT NOT NULL, seq INTEGER NOT NULL, time TEXT NOT NULL, presentation TEXT NOT NULL,
    annotator TEXT NOT NULL, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE message(event TEXT PRIMARY KEY, seq INTEGER NOT NULL, annotator TEXT NOT NULL, body TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX message_by_conversation ON message(json_extract(body, '$.conversation'));
CREATE INDEX message_by_annotator ON message(annotator);
"""


@dataclass(frozen=True)
class Event:
    """One line of the log; ``hash`` covers everything before it, see ``store.chain``."""

    seq: int
    id: str
    time: str
    kind: str
    actor: str
    body: Mapping[str, Any]
    previous: str
    hash: str


def canonical_json(value: Any) -> str:
    """The one way in which a value is written: keys sorted, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def apply(db: sqlite3.Connection, event: Event) -> None:
    """Bring the tables up to date with one event."""
    rule = _RULES.get(event.kind)
    if rule is not None:
        rule(db, event)


def current_task(db: sqlite3.Connection) -> Task:
    """The task in force: the last one."""
    return _task(db.execute("SELECT settings FROM task ORDER BY seq DESC LIMIT 1").fetchone()[0])


def rows(db: sqlite3.Connection, table: str) -> list[tuple[Any, ...]]:
    """All rows of a derived table in a fixed order."""
    if table not in DERIVED:
        raise ValueError(table)
    return db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall()


@lru_cache(maxsize=8)
def _task(settings: str) -> Task:
    return task_of(json.loads(settings))


def _on_task(db: sqlite3.Connection, event: Event) -> None:
    settings = canonical_json(event.body["settings"])
    db.execute("INSERT INTO task VALUES (?, ?, ?)", (event.seq, settings, _task(settings).fingerprint()))
    db.execute("UPDATE item SET open = answers < ?", (_task(settings).distribution.overlap,))


def _on_annotator(db: sqlite3.Connection, event: Event) -> None:
    body = event.body
    db.execute(
        "INSERT INTO annotator VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET role = excluded.role, active = excluded.active",
        (body["pseudonym"], body["role"], int(body["active"])),
    )


def _on_item(db: sqlite3.Connection, event: Event) -> None:
    body = event.body
    shuffle = int.from_bytes(hashlib.sha256(body["item"].encode()).digest()[:7], "big")
    gold = None if body["gold"] is None else canonical_json(body["gold"])
    texts = [canonical_json(body[name]) for name in ("prompt", "responses", "images")]
    db.execute(
        "INSERT INTO item(id, seq, kind, prompt, responses, images, gold, meta, shuffle) VALUES (?,?,?,?,?,?,?,?,?)",
        (body["item"], event.seq, body["kind"], *texts, gold, canonical_json(body["meta"]), shuffle),
    )
    authors = {response["source"].get("annotator") for response in body["responses"]} - {None}
    db.executemany("INSERT INTO author VALUES (?, ?)", [(body["item"], author) for author in sorted(authors)])


def _on_priority(db: sqlite3.Connection, event: Event) -> None:
    for item, need in event.body["items"].items():
        db.execute("UPDATE item SET priority = ? WHERE id = ?", (need, item))


def _on_presented(db: sqlite3.Connection, event: Event) -> None:
    body = event.body
    seen = db.execute("SELECT count(*) FROM presented WHERE annotator = ?", (event.actor,)).fetchone()[0]
    shown = canonical_json(body["shown"])
    db.execute(
        "INSERT INTO presented VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open', NULL)",
        (
            body["presentation"],
            event.seq,
            body["item"],
            event.actor,
            body["purpose"],
            body["repeat_of"],
            shown,
            seen + 1,
        ),
    )


def _on_answer(db: sqlite3.Connection, event: Event) -> None:
    body = event.body
    (purpose,) = db.execute("SELECT purpose FROM presented WHERE id = ?", (body["presentation"],)).fetchone()
    db.execute(
        "INSERT INTO answer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            event.id,
            event.seq,
            event.time,
            body["presentation"],
            body["item"],
            event.actor,
            purpose,
            canonical_json(body["values"]),
            body["seconds"],
            int(body["changed"]),
        ),
    )
    _close(db, body["presentation"], "answered")
    if purpose == "task":
        _recount(db, body["item"])


def _on_late(db: sqlite3.Connection, event: Event) -> None:
    db.execute("INSERT INTO late VALUES (?, ?, ?)", (event.id, event.body["presentation"], event.actor))
    _close(db, event.body["presentation"], "late")


def _on_skip(db: sqlite3.Connection, event: Event) -> None:
    _close(db, event.body["presentation"], "skipped")


def _on_undo(db: sqlite3.Connection, event: Event) -> None:
    presentation, item = event.body["presentation"], event.body["item"]
    value = event.body["values"]
    previous = None if value is None else canonical_json(value)
    db.execute("UPDATE presented SET state = 'open', previous = ? WHERE id = ?", (previous, presentation))
    db.execute("DELETE FROM answer WHERE presentation = ?", (presentation,))
    db.execute("DELETE FROM adjudication WHERE presentation = ?", (presentation,))
    _recount(db, item)


def _on_flag(db: sqlite3.Connection, event: Event) -> None:
    db.execute("INSERT INTO flag VALUES (?, ?, ?, ?)", (event.id, event.body["item"], event.actor, event.body["text"]))


def _on_adjudicate(db: sqlite3.Connection, event: Event) -> None:
    body = event.body
    db.execute(
        "INSERT OR REPLACE INTO adjudication VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            body["item"],
            event.id,
            event.seq,
            event.time,
            body["presentation"],
            event.actor,
            canonical_json(body["values"]),
        ),
    )
    _close(db, body["presentation"], "answered")


def _on_message(db: sqlite3.Connection, event: Event) -> None:
    db.execute(
        "INSERT INTO message VALUES (?, ?, ?, ?)", (event.id, event.seq, event.actor, canonical_json(event.body))
    )


def _close(db: sqlite3.Connection, presentation: str, state: str) -> None:
    db.execute("UPDATE presented SET state = ? WHERE id = ?", (state, presentation))


def _recount(db: sqlite3.Connection, item: str) -> None:
    """Answers in force and their disagreement."""
    found = db.execute("SELECT value FROM answer WHERE item = ? AND purpose = 'task' ORDER BY seq", (item,)).fetchall()
    (responses,) = db.execute("SELECT responses FROM item WHERE id = ?", (item,)).fetchone()
    task, values = current_task(db), [json.loads(value) for (value,) in found]
    disagreement = task.disagreement(values, len(json.loads(responses)))
    db.execute(
        "UPDATE item SET answers = ?, open = ?, disagreement = ? WHERE id = ?",
        (len(found), len(found) < task.distribution.overlap, disagreement, item),
    )


_RULES: dict[str, Callable[[sqlite3.Connection, Event], None]] = {
    "task": _on_task,
    "annotator": _on_annotator,
    "item": _on_item,
    "priority": _on_priority,
    "presented": _on_presented,
    "answer": _on_answer,
    "late": _on_late,
    "skip": _on_skip,
    "undo": _on_undo,
    "flag": _on_flag,
    "adjudicate": _on_adjudicate,
    "message": _on_message,
}
