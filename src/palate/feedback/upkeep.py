"""Looking after a store: verify, back up, merge, count."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.errors import FeedbackError
from palate.feedback import tables
from palate.feedback.store import COLUMNS, START, TRIGGERS, Store, chain, connect, event_of, same


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found.

    Attributes:
        events: how many.
        last_hash: of the last event; note it elsewhere to be able to prove later that nothing was cut off.
        problems: what is wrong, one sentence each; empty = intact.
    """

    events: int
    last_hash: str
    problems: list[str] = field(default_factory=list)


def verify(store: Store, *, after: str | None = None) -> Verified:
    """Recompute every hash, make all derived tables again from the events, and compare.

    Args:
        after: a hash that was noted earlier; it must be in the chain (else the log was cut off or rewritten).
    """
    problems: list[str] = []
    with store.read() as tx, closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        damage = [row[0] for row in tx.all("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [f"SQLite: {each}" for each in damage[:5]]
        triggers = {name for (name,) in tx.all("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
        problems += [f"the trigger {name} is gone: events could be changed" for name in sorted(TRIGGERS - triggers)]
        fresh.executescript(tables.SCHEMA)
        count, last, seen = 0, START, after is None or after == START
        for row in tx.db.execute(f"SELECT {COLUMNS} FROM event ORDER BY seq"):
            count += 1
            if problem := _broken(row, count, last):
                problems.append(problem)
                break
            last = row[7]
            seen = seen or last == after
            try:
                tables.apply(fresh, event_of(row))
            except (sqlite3.Error, KeyError, TypeError, ValueError) as error:
                problems.append(f"event {count} ({row[3]}) cannot be applied: {error!r}")
                break
        else:
            for table in tables.DERIVED:
                if tables.rows(fresh, table) != tables.rows(tx.db, table):
                    problems.append(f"the table {table} is not what the events say")
        if not seen:
            problems.append(f"no event has the hash {after}: the log was cut off or rewritten after it was noted")
        for name, content in tx.db.execute("SELECT hash, content FROM image"):
            if hashlib.sha256(content).hexdigest() != name:
                problems.append(f"the picture {name} is not what its name says")
    return Verified(count, last, problems)


def backup(store: Store, target: str | Path) -> Verified:
    """A copy of the whole store while it is being written to, checked before it appears under its name.

    Raises:
        FeedbackError: the target exists, or the copy is not intact.
    """
    target = Path(target)
    if target.exists():
        raise FeedbackError(f"{target}: exists already. Choose another name for the copy.")
    unfinished = target.with_name(target.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.touch(mode=0o600)
    with closing(connect(store.path, read_only=True)) as source, closing(sqlite3.connect(unfinished)) as copy:
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
    with Store.open(unfinished) as copied:
        found = verify(copied)
    for suffix in ("-wal", "-shm"):
        unfinished.with_name(unfinished.name + suffix).unlink(missing_ok=True)
    if found.problems:
        raise FeedbackError(f"{target}: the copy is not intact: {found.problems[0]}. It is kept as {unfinished}.")
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.rename(unfinished, target)
    return found


def merge(store: Store, other: Store) -> dict[str, int]:
    """Take in another store's items, people and answers; what is here already is not taken again.

    Each event keeps its id, time, actor and body; it gets a new place in this store's chain, and one ``merge`` event says
    where it came from and under which last hash. Overlap is exact in each store, not over both.

    Returns:
        {"taken": events, "known": events that were here already}.
    Raises:
        FeedbackError: the other store is not intact, or asks other questions, or the same key means something else.
    """
    found = verify(other)
    if found.problems:
        raise FeedbackError(f"{other.path}: not intact: {found.problems[0]}. Nothing was taken.")
    if other.task.fingerprint() != store.task.fingerprint():
        raise FeedbackError(
            f"{other.path}: answers other questions than {store.path}. Nothing was taken; keep them apart and put their "
            "exports together instead."
        )
    taken = known = 0
    with other.read() as theirs, store.write() as tx:
        ours = {pseudonym for (pseudonym,) in tx.all("SELECT pseudonym FROM annotator")}
        for row in theirs.db.execute(f"SELECT {COLUMNS} FROM event ORDER BY seq"):
            event = event_of(row)
            if event.kind in ("task", "merge"):
                continue
            if event.kind == "annotator" and event.body["pseudonym"] in ours:
                known += 1  # nobody gets another role by a file that comes from elsewhere
                continue
            before = tx.find(event.id)
            if before is None:
                tx.append(event.kind, event.actor, event.body, key=event.id, time=event.time)
                taken += 1
            else:
                known += 1
                if event.kind != "item":  # an item's id is its content
                    same(before, event.kind, event.actor, event.body)
        for name in ("person", "image"):
            for row in theirs.all(f"SELECT * FROM {name}"):
                tx.run(f"INSERT OR IGNORE INTO {name} VALUES ({', '.join('?' * len(row))})", *row)
        if taken:
            tx.append("merge", "admin", {"file": other.path.name, "last_hash": found.last_hash, "taken": taken})
    return {"taken": taken, "known": known}


def status(store: Store) -> dict[str, Any]:
    """Counts of what is in a store."""
    with store.read() as tx:
        overlap = tx.task.distribution.overlap
        items = dict(tx.all("SELECT kind, count(*) FROM item GROUP BY kind"))
        done, complete = tx.one(
            "SELECT coalesce(sum(min(answers, ?)), 0), coalesce(sum(answers >= ?), 0) FROM item WHERE kind = 'task'",
            *(overlap, overlap),
        )
        skipped = tx.one(
            "SELECT count(*) FROM item WHERE kind = 'task' AND answers < ? AND (SELECT count(*) FROM presented WHERE "
            "item = item.id AND state = 'skipped') >= max(1, (SELECT count(*) FROM annotator WHERE active))",
            overlap,
        )[0]
        return {
            "title": tx.task.title,
            "items": items.get("task", 0),
            "gold": items.get("gold", 0),
            "attention": items.get("attention", 0),
            "overlap": overlap,
            "answers": tx.one("SELECT count(*) FROM answer")[0],
            "wanted": overlap * items.get("task", 0),
            "done": done,
            "complete": complete,
            "skipped_by_all": skipped,
            "contested": tx.one(
                "SELECT count(*) FROM item WHERE kind = 'task' AND disagreement > ? AND answers >= ? AND NOT EXISTS "
                "(SELECT 1 FROM adjudication WHERE adjudication.item = item.id)",
                *(tx.task.distribution.contested_above, overlap),
            )[0],
            "late": tx.one("SELECT count(*) FROM late")[0],
            "flags": tx.one("SELECT count(*) FROM flag")[0],
            "annotators": tx.one("SELECT count(*) FROM annotator WHERE active")[0],
            "events": tx.one("SELECT count(*) FROM event")[0],
        }


def _broken(row: tuple[Any, ...], number: int, last: str) -> str | None:
    """What is wrong with an event as number ``number`` after the hash ``last``."""
    seq, key, time, kind, actor, body, previous, hashed = row
    if seq != number:
        return f"event {number} is missing: after {number - 1} comes {seq}"
    if previous != last or chain(last, seq, key, time, kind, actor, body) != hashed:
        return f"event {seq} ({kind} by {actor}, {time}) was changed, or one before it was"
    return None
