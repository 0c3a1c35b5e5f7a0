"""The store of people's feedback: one SQLite file whose heart is a log that only grows.

    event(seq, id, time, kind, actor, body, previous, hash)      hash = sha256(previous + [seq, id, time, kind, actor, body])

An event is acknowledged after its COMMIT, with ``synchronous=FULL``: what was acknowledged survives a killed process and
a power cut. ``id`` is the idempotency key: a write that is repeated gives the first one's event and changes nothing. No
event is ever changed; an undo is another event. Each hash covers the one before it, so a change anywhere shows in
``upkeep.verify``; that the log's *end* was not cut off shows only against a hash that was noted elsewhere.

Everything else that is known (``tables``) follows from the events and is brought up to date in the same transaction.
Leases, login links, sessions, names and pictures are plain tables: they are no judgements, and may be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from palate.errors import FeedbackError
from palate.feedback import tables
from palate.feedback.tables import Event, canonical_json
from palate.feedback.task import Task

APPLICATION = 0x50414C41  # "PALA", in the file's header
VERSION = 1
START = "0" * 64  # the hash before the first event
KINDS = (
    *("task", "annotator", "item", "priority", "presented", "answer", "late", "skip", "undo"),
    *("flag", "adjudicate", "message", "merge"),
)

_SCHEMA = """
CREATE TABLE event(
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, time TEXT NOT NULL, kind TEXT NOT NULL, actor TEXT NOT NULL,
    body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TRIGGER event_is_never_changed BEFORE UPDATE ON event BEGIN SELECT raise(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_is_never_deleted BEFORE DELETE ON event BEGIN SELECT raise(ABORT, 'events are never deleted'); END;
CREATE TABLE lease(
    presentation TEXT PRIMARY KEY, item TEXT NOT NULL, annotator TEXT NOT NULL, purpose TEXT NOT NULL,
    since REAL NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX lease_by_item ON lease(item, purpose, until);
CREATE INDEX lease_by_annotator ON lease(annotator);
CREATE TABLE person(pseudonym TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE) WITHOUT ROWID;
CREATE TABLE link(hash TEXT PRIMARY KEY, pseudonym TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE session(hash TEXT PRIMARY KEY, pseudonym TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE image(hash TEXT PRIMARY KEY, type TEXT NOT NULL, content BLOB NOT NULL) WITHOUT ROWID;
"""
COLUMNS = "seq, id, time, kind, actor, body, previous, hash"
TRIGGERS = {"event_is_never_changed", "event_is_never_deleted"}


class Conflict(FeedbackError):
    """A write that contradicts what is already there: a key used for something else, an item already answered."""


class NotFound(FeedbackError):
    """Something named that is not there, or is not this annotator's."""


def chain(previous: str, seq: int, key: str, time: str, kind: str, actor: str, body: str) -> str:
    """The hash of an event; ``body`` is its canonical JSON."""
    head = canonical_json([seq, key, time, kind, actor])
    return hashlib.sha256(f"{previous}{head[:-1]},{body}]".encode()).hexdigest()


def now() -> str:
    """UTC to the microsecond, in a form whose alphabetical order is that of time."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Transaction:
    """Reads and writes that become true together, or not at all."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def one(self, sql: str, *values: Any) -> Any:
        """The first row, or None."""
        return self.db.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[Any]:
        return self.db.execute(sql, values).fetchall()

    def run(self, sql: str, *values: Any) -> int:
        """The number of rows changed."""
        return self.db.execute(sql, values).rowcount

    @property
    def task(self) -> Task:
        return tables.current_task(self.db)

    def find(self, key: str) -> Event | None:
        """The event of an idempotency key."""
        row = self.one(f"SELECT {COLUMNS} FROM event WHERE id = ?", key)
        return None if row is None else event_of(row)

    def append(
        self, kind: str, actor: str, body: Mapping[str, Any], *, key: str | None = None, time: str | None = None
    ) -> Event:
        """Write an event and bring the tables up to date.

        Args:
            kind: one of ``KINDS``.
            actor: the annotator's pseudonym, or "admin".
            body: what happened, as JSON.
            key: idempotency key; None = a new one.
            time: None = now.
        Raises:
            Conflict: the key was used before; look with ``find`` first.
        """
        if kind not in KINDS:
            raise FeedbackError(f'unknown kind of event "{kind}". Kinds: {", ".join(KINDS)}.')
        key, time, text = key or str(uuid.uuid4()), time or now(), canonical_json(body)
        last = self.one("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1")
        seq, previous = (last[0] + 1, last[1]) if last else (1, START)
        event = Event(
            seq, key, time, kind, actor, json.loads(text), previous, chain(previous, seq, key, time, kind, actor, text)
        )
        try:
            self.run(
                "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                *(seq, key, time, kind, actor, text, previous, event.hash),
            )
        except sqlite3.IntegrityError:
            raise Conflict(f"the key {key!r} was already used. Use a new one for each write.") from None
        tables.apply(self.db, event)
        return event


class Store:
    """An open store. One writer at a time, in this process by a lock and between processes by SQLite's own."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path = path
        self._db = db
        self._lock = threading.RLock()

    @classmethod
    def create(cls, path: str | Path, task: Task) -> Store:
        """Make a new store with a task.

        Raises:
            FeedbackError: the file exists, or cannot be made.
        """
        path = Path(path)
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            db = connect(path)
        except FileExistsError:
            raise FeedbackError(f"{path}: exists already. Choose another file, or go on with this one.") from None
        except (OSError, sqlite3.Error) as error:
            raise FeedbackError(f"{path}: no store can be made here: {error}.") from None
        # one transaction: a file with the schema has a task, and a file without it is no store
        header = f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"
        db.executescript(f"BEGIN IMMEDIATE; {header} {_SCHEMA} {tables.SCHEMA}")
        Transaction(db).append("task", "admin", {"settings": task.model_dump(mode="json")})
        db.execute("COMMIT")
        return cls(path, db)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store.

        Raises:
            FeedbackError: no such file, or it is no store, or a newer palate's.
        """
        path = Path(path)
        if not path.is_file():
            raise FeedbackError(f"{path}: no such store. Make one with: palate label import {path} RESPONSES.jsonl")
        try:
            with closing(connect(path, read_only=True)) as db:
                application, version = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in _HEADER)
        except sqlite3.OperationalError as error:
            raise FeedbackError(f"{path}: {file_trouble(error)}") from None
        except sqlite3.Error as error:
            raise FeedbackError(
                f"{path}: not a store of feedback ({error}). Make one with: palate label import feedback.db {path}"
            ) from None
        if application != APPLICATION:
            raise FeedbackError(f"{path}: is some other SQLite file, not a store of feedback.")
        if version > VERSION:
            raise FeedbackError(
                f"{path}: was written by a newer palate (version {version} of the file). Upgrade palate."
            )
        try:
            return cls(path, connect(path))
        except sqlite3.OperationalError as error:
            raise FeedbackError(f"{path}: {file_trouble(error)}") from None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """A transaction that nobody else writes beside; what is read in it stays true until it is over."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(self._db)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """One state of the store, on a connection of its own: long reading never makes a writer wait."""
        with closing(connect(self.path, read_only=True)) as db:
            db.execute("BEGIN")
            yield Transaction(db)

    def append(self, kind: str, actor: str, body: Mapping[str, Any], *, key: str | None = None) -> Event:
        """One event in a transaction of its own; a repeated key with the same content gives the first one's event.

        Raises:
            Conflict: the key was used for something else.
        """
        with self.write() as tx:
            before = tx.find(key) if key else None
            if before is not None:
                return same(before, kind, actor, body)
            return tx.append(kind, actor, body, key=key)

    @property
    def task(self) -> Task:
        with self.read() as tx:
            return tx.task

    def set_task(self, task: Task) -> None:
        """Put a task in force. How work is dealt out and worded may change at any time, questions only before answers.

        Raises:
            FeedbackError: answers to other questions are there.
        """
        with self.write() as tx:
            settings = task.model_dump(mode="json")
            row = tx.one("SELECT settings, fingerprint FROM task ORDER BY seq DESC LIMIT 1")
            if row is not None and row[0] == canonical_json(settings):
                return
            if row is not None and row[1] != task.fingerprint() and tx.one("SELECT 1 FROM answer LIMIT 1"):
                raise FeedbackError(
                    f"{self.path}: holds answers to other questions. Keep the questions as they are, or begin a new file."
                )
            tx.append("task", "admin", {"settings": settings})

    def events(self, after: int = 0) -> Iterator[Event]:
        """All events in their order, from one state of the store."""
        with self.read() as tx:
            for row in tx.db.execute(f"SELECT {COLUMNS} FROM event WHERE seq > ? ORDER BY seq", (after,)):
                yield event_of(row)

    def last(self) -> tuple[int, str]:
        """Number and hash of the last event."""
        with self.read() as tx:
            row = tx.one("SELECT seq, hash FROM event ORDER BY seq DESC LIMIT 1")
            return (row[0], row[1]) if row else (0, START)


def same(event: Event, kind: str, actor: str, body: Mapping[str, Any]) -> Event:
    """``event``, if it is what a repeated write asks for again.

    Raises:
        Conflict: it is something else.
    """
    if (event.kind, event.actor, canonical_json(event.body)) != (kind, actor, canonical_json(body)):
        raise Conflict(f"the key {event.id!r} was already used for something else. Use a new one for each write.")
    return event


_HEADER = ("application_id", "user_version")
PATIENCE = 30.0  # seconds for which one writer waits for another


def file_trouble(error: sqlite3.OperationalError) -> str:
    """What SQLite cannot do with a store's file, and what to do about it."""
    said = str(error)
    if "locked" in said:
        return (
            f"another process kept the store locked for {PATIENCE:g} s. Wait for it or end it, then give the same "
            "command again."
        )
    if "readonly" in said or "unable to open" in said:
        return f"cannot be opened for writing ({said}). The file and its folder must be writable."
    return f"SQLite says: {said}. What was acknowledged before is safe."


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection that waits for the disk at every COMMIT, and for other writers at every BEGIN."""
    where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    db = sqlite3.connect(where, uri=True, isolation_level=None, check_same_thread=False, timeout=PATIENCE)
    db.execute(f"PRAGMA busy_timeout = {int(1000 * PATIENCE)}")
    db.execute("PRAGMA foreign_keys = ON")
    if not read_only:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    return db


def event_of(row: tuple[Any, ...]) -> Event:
    """An event from its row, in the order of ``COLUMNS``."""
    seq, key, time, kind, actor, body, previous, hashed = row
    return Event(seq, key, time, kind, actor, json.loads(body), previous, hashed)
