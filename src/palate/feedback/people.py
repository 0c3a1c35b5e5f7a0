"""Who gives feedback: names, roles, login links and sessions.

In the log of events a person is a pseudonym; the name stands in a table of its own and can be erased. A login link holds
256 random bits, works once and ends after a while; a session is another 256 bits, made afresh at every login. Of both the
store keeps the SHA-256 only: they are random, so that no slow hash is needed, and a lookup by hash tells nothing by its
time that an attacker could use.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time as clock
from dataclasses import dataclass
from typing import Any

from palate.errors import FeedbackError
from palate.feedback.store import Store, Transaction

ROLES = ("annotator", "adjudicator", "admin")
LINK_DAYS = 7.0
SESSION_DAYS = 14.0
_DAY = 86_400.0


@dataclass(frozen=True)
class Person:
    """Somebody who may log in."""

    pseudonym: str
    name: str
    role: str
    active: bool = True


def add_person(store: Store, name: str, role: str = "annotator") -> Person:
    """Add somebody.

    Args:
        name: 1 to 100 printable characters, not used yet.
        role: "annotator" answers; "adjudicator" decides between answers too; "admin" also sees the summary.
    Raises:
        FeedbackError: the name is empty, too long or taken, or the role unknown.
    """
    name = name.strip()
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise FeedbackError(f"a name of {len(name)} characters; expected 1 to 100 printable ones.")
    _check_role(role)
    with store.write() as tx:
        if tx.one("SELECT 1 FROM person WHERE name = ?", name):
            raise FeedbackError(f'there is an annotator "{name}" already. Choose another name.')
        person = Person(f"p-{secrets.token_hex(4)}", name, role)
        tx.append("annotator", "admin", {"pseudonym": person.pseudonym, "role": role, "active": True})
        tx.run("INSERT INTO person VALUES (?, ?)", person.pseudonym, name)
        return person


def change_person(store: Store, name: str, *, role: str | None = None, active: bool | None = None) -> Person:
    """Give somebody another role, or take away or give back the right to log in; open sessions end.

    Raises:
        FeedbackError: nobody of that name, or an unknown role.
    """
    with store.write() as tx:
        before = _by_name(tx, name)
        role = before.role if role is None else role
        _check_role(role)
        person = Person(before.pseudonym, name, role, before.active if active is None else active)
        if person != before:
            body = {"pseudonym": person.pseudonym, "role": person.role, "active": person.active}
            tx.append("annotator", "admin", body)
            tx.run("DELETE FROM session WHERE pseudonym = ?", person.pseudonym)
            tx.run("DELETE FROM link WHERE pseudonym = ?", person.pseudonym)
        return person


def forget_name(store: Store, name: str) -> str:
    """Erase a name; the pseudonym and its answers stay. Returns the pseudonym."""
    with store.write() as tx:
        person = _by_name(tx, name)
        tx.run("UPDATE person SET name = ? WHERE pseudonym = ?", person.pseudonym, person.pseudonym)
        return person.pseudonym


def people(store: Store) -> list[Person]:
    """Everybody, in order of names."""
    with store.read() as tx:
        found = tx.all(
            "SELECT annotator.pseudonym, coalesce(name, annotator.pseudonym), role, active FROM annotator "
            "LEFT JOIN person ON person.pseudonym = annotator.pseudonym ORDER BY 2"
        )
    return [Person(pseudonym, name, role, bool(active)) for pseudonym, name, role, active in found]


def issue_link(store: Store, name: str, *, days: float = LINK_DAYS, token: str | None = None) -> str:
    """A token that logs this person in once.

    Args:
        days: after which it ends.
        token: one of the caller's own making, of at least 43 characters of base64url or 64 of hex; None = a new one.
    Raises:
        FeedbackError: nobody of that name, or not active, or a token that can be guessed.
    """
    token = secrets.token_urlsafe(32) if token is None else token
    if len(token) < 43 or len(set(token)) < 8:
        raise FeedbackError(
            f"a token of {len(token)} characters can be guessed. Expected 256 random bits, for example by: openssl rand -hex 32"
        )
    with store.write() as tx:
        person = _by_name(tx, name)
        if not person.active:
            raise FeedbackError(f'"{name}" may not log in. Allow it with: palate label annotators activate STORE NAME')
        tx.run("DELETE FROM link WHERE until < ?", clock.time())
        tx.run(
            "INSERT OR REPLACE INTO link VALUES (?, ?, ?)", _hash(token), person.pseudonym, clock.time() + days * _DAY
        )
    return token


def log_in(store: Store, token: str, *, replaces: str | None = None) -> tuple[Person, str] | None:
    """Use up a login token: (person, new session), or None for one that is unknown, used or out of time.

    Args:
        replaces: the session that the browser had before; it ends.
    """
    now, hashed = clock.time(), _hash(token)
    with store.write() as tx:
        row = tx.one("SELECT hash, pseudonym, until FROM link WHERE hash = ?", hashed)
        if row is None or not hmac.compare_digest(row[0], hashed) or row[2] < now:
            return None
        tx.run("DELETE FROM link WHERE hash = ?", hashed)
        person = _active(tx, row[1])
        if person is None:
            return None
        session = secrets.token_urlsafe(32)
        tx.run("DELETE FROM session WHERE until < ?", now)
        if replaces is not None:
            tx.run("DELETE FROM session WHERE hash = ?", _hash(replaces))
        tx.run("INSERT INTO session VALUES (?, ?, ?)", _hash(session), person.pseudonym, now + SESSION_DAYS * _DAY)
        return person, session


def who(store: Store, session: str) -> Person | None:
    """Whose session this is; None for an unknown or ended one, or somebody who may not log in any more."""
    hashed = _hash(session)
    with store.read() as tx:
        row = tx.one("SELECT hash, pseudonym, until FROM session WHERE hash = ?", hashed)
        if row is None or not hmac.compare_digest(row[0], hashed) or row[2] < clock.time():
            return None
        return _active(tx, row[1])


def log_out(store: Store, session: str) -> None:
    """End a session."""
    with store.write() as tx:
        tx.run("DELETE FROM session WHERE hash = ?", _hash(session))


def _active(tx: Transaction, pseudonym: str) -> Person | None:
    row = tx.one(_PERSON + "WHERE annotator.pseudonym = ? AND active", pseudonym)
    return None if row is None else _person(row)


def _by_name(tx: Transaction, name: str) -> Person:
    row = tx.one(_PERSON + "WHERE name = ?", name)
    if row is None:
        raise FeedbackError(f'there is no annotator "{name}". List them with: palate label annotators list STORE')
    return _person(row)


_PERSON = (
    "SELECT annotator.pseudonym, coalesce(name, annotator.pseudonym), role, active FROM annotator "
    "LEFT JOIN person ON person.pseudonym = annotator.pseudonym "
)


def _person(row: tuple[Any, ...]) -> Person:
    return Person(row[0], row[1], row[2], bool(row[3]))


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise FeedbackError(f'unknown role "{role}". Roles: {", ".join(ROLES)}.')


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()
