"""Dealing out the work: who is shown which item next, and what becomes of it.

An item has ``overlap`` places. A place is taken by an answer in force, or kept for a while by a lease; places are counted
and a lease is given in one transaction, so there are never more answers than places, however many ask at once. A lease
that ran out gives its place away only when somebody else asks for it: until then a late answer still counts.

Which item that is, and in which order its responses are shown: ``deal``.
"""

from __future__ import annotations

import json
import math
import secrets
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.data.kinds import PromptText
from palate.feedback.deal import CONTESTED, choose, generator, order, why_nothing
from palate.feedback.questions import BadAnswer
from palate.feedback.store import Conflict, NotFound, Store, Transaction, same
from palate.feedback.tables import Event, canonical_json
from palate.feedback.task import Task, Values

PURPOSES = ("task", "gold", "attention", "repeat", "adjudicate")
LONGEST_REASON = 2000  # characters of a skip's reason or a flag's text


@dataclass(frozen=True)
class Presentation:
    """What one annotator is shown.

    Attributes:
        id: of this presentation.
        item: the item's id; not for the annotator's eyes, it betrays repeats.
        purpose: one of ``PURPOSES``; not for the annotator's eyes.
        prompt: text or messages.
        responses: (random id, text) in the order in which they are shown.
        images: content hashes.
        until: when the lease ends, seconds since 1970.
        previous: the annotator's own answer before an undo, in the presentation's ids, or None.
    """

    id: str
    item: str
    purpose: str
    prompt: PromptText
    responses: tuple[tuple[str, str], ...]
    images: tuple[str, ...]
    until: float
    previous: Values | None = None


@dataclass(frozen=True)
class Nothing:
    """There is nothing for this annotator now, and why."""

    why: str


@dataclass(frozen=True)
class Receipt:
    """An answer that is safely stored.

    Attributes:
        event: of the answer.
        counted: False for one that came after its place had been given away; it is kept, but not in force.
    """

    event: Event
    counted: bool


def next_item(store: Store, annotator: str, *, now: float | None = None) -> Presentation | Nothing:
    """The item that an annotator is to answer now; the same one until it is answered or skipped.

    Args:
        annotator: pseudonym.
        now: seconds since 1970; None = the clock's.
    """
    now = clock.time() if now is None else now
    with store.write() as tx:
        task = tx.task
        until = now + 60 * task.distribution.lease_minutes
        _known(tx, annotator)
        own = _own_lease(tx, task, annotator, now)
        if own is not None:
            tx.run("UPDATE lease SET until = ? WHERE presentation = ?", until, own)
            return _presentation(tx, task, own, until)
        rng = generator(tx, task, annotator)
        item, purpose, repeated = choose(tx, task, annotator, rng, now)
        if item is None:
            return Nothing(why_nothing(tx, now))
        shown = order(tx, item, repeated, rng)
        return _present(tx, task, annotator, item, purpose, shown, repeated, now, until)


def answer(
    store: Store,
    annotator: str,
    key: str,
    presentation: str,
    values: Any,
    *,
    seconds: float | None = None,
    changed: bool = True,
    now: float | None = None,
) -> Receipt:
    """Store an answer; when this returns, it is on the disk. The same key again gives the same receipt.

    Args:
        annotator: pseudonym.
        key: the client's idempotency key, different for every write.
        presentation: what is answered.
        values: {question id: value} in the presentation's ids.
        seconds: that the annotator spent on it, >= 0.
        changed: False when the initial order of a ranking was sent as it was.
    Raises:
        BadAnswer: the values do not fit the task.
        Conflict: the key was used for something else, or the presentation is answered or skipped already.
        NotFound: no such presentation of this annotator.
    """
    now = clock.time() if now is None else now
    seconds = _seconds(seconds)
    with store.write() as tx:
        before = tx.find(key)
        row = _own(tx, annotator, presentation)
        item, purpose, state, shown = row
        stored = _canonical(tx, tx.task, item, json.loads(shown), values)
        body = {"presentation": presentation, "item": item, "values": stored, "seconds": seconds, "changed": changed}
        if before is not None:
            kind = before.kind if before.kind in ("answer", "late") else "answer"
            return Receipt(same(before, kind, annotator, body), kind == "answer")
        if purpose == "adjudicate":
            raise Conflict("this item was shown for a decision between answers. Send it as an adjudication.")
        _check_open(state)
        fits = purpose != "task" or _has_place(tx, tx.task, item, presentation, now)
        event = tx.append("answer" if fits else "late", annotator, body, key=key)
        tx.run("DELETE FROM lease WHERE presentation = ?", presentation)
        return Receipt(event, fits)


def skip(store: Store, annotator: str, key: str, presentation: str, reason: str = "") -> Event:
    """Leave an item to others. It is not done, and it does not come again.

    Raises:
        Conflict, NotFound, BadAnswer: as ``answer``.
    """
    body = {"presentation": presentation, "reason": _reason(reason)}
    with store.write() as tx:
        before = tx.find(key)
        if before is not None:
            return same(before, "skip", annotator, body)
        _, _, state, _ = _own(tx, annotator, presentation)
        _check_open(state)
        event = tx.append("skip", annotator, body, key=key)
        tx.run("DELETE FROM lease WHERE presentation = ?", presentation)
        return event


def undo(store: Store, annotator: str, key: str, presentation: str, *, now: float | None = None) -> Event:
    """Take back an answer or a skip; the presentation is open again and comes next.

    Raises:
        Conflict: it is open still, or came too late, or its item was decided or given to others meanwhile.
        NotFound: no such presentation of this annotator.
    """
    now = clock.time() if now is None else now
    with store.write() as tx:
        before = tx.find(key)
        item, purpose, state, _ = _own(tx, annotator, presentation)
        if before is not None:
            if before.kind != "undo" or before.actor != annotator or before.body["presentation"] != presentation:
                same(before, "undo", annotator, {"presentation": presentation})
            return before
        if state not in ("answered", "skipped"):
            raise Conflict("there is nothing to undo: this item has no answer of yours in force.")
        if purpose != "adjudicate" and tx.one("SELECT 1 FROM adjudication WHERE item = ?", item):
            raise Conflict(
                "an adjudicator has decided about this item meanwhile; the answer cannot be undone any more."
            )
        if state == "skipped" and purpose == "task" and not _has_place(tx, tx.task, item, presentation, now):
            raise Conflict("others have taken this item meanwhile; the skip cannot be undone any more.")
        table = "adjudication" if purpose == "adjudicate" else "answer"
        given = tx.one(f"SELECT value FROM {table} WHERE presentation = ?", presentation)
        values = None if given is None else json.loads(given[0])
        body = {"presentation": presentation, "item": item, "undone": state, "values": values}
        event = tx.append("undo", annotator, body, key=key)
        _lease(tx, presentation, item, annotator, purpose, now, now + 60 * tx.task.distribution.lease_minutes)
        return event


def flag(store: Store, annotator: str, key: str, presentation: str, text: str) -> Event:
    """Say that something is wrong with an item; it stays open.

    Raises:
        Conflict, NotFound, BadAnswer: as ``answer``.
    """
    with store.write() as tx:
        item = _own(tx, annotator, presentation)[0]
        body = {"presentation": presentation, "item": item, "text": _reason(text)}
        before = tx.find(key)
        return same(before, "flag", annotator, body) if before else tx.append("flag", annotator, body, key=key)


def next_contested(
    store: Store, adjudicator: str, *, now: float | None = None
) -> tuple[Presentation, list[tuple[str, Values]]] | Nothing:
    """The item whose answers disagree most, with the answers, for somebody who gave none of them.

    Returns:
        (presentation, [(pseudonym, values in the presentation's ids)]), or why there is none.
    """
    now = clock.time() if now is None else now
    with store.write() as tx:
        task = tx.task
        until = now + 60 * task.distribution.lease_minutes
        _known(tx, adjudicator)
        tx.run(  # decided by somebody else meanwhile
            "DELETE FROM lease WHERE annotator = ? AND purpose = 'adjudicate' AND item IN (SELECT item FROM adjudication)",
            adjudicator,
        )
        open_one = tx.one(
            "SELECT presentation FROM lease WHERE annotator = ? AND purpose = 'adjudicate' ORDER BY since DESC LIMIT 1",
            adjudicator,
        )
        if open_one is not None:
            tx.run("UPDATE lease SET until = ? WHERE presentation = ?", until, open_one[0])
            found = _presentation(tx, task, open_one[0], until)
        else:
            row = tx.one(CONTESTED, task.distribution.contested_above, task.distribution.overlap, now, adjudicator)
            if row is None:
                return Nothing("no item is contested now.")
            shown = order(tx, row[0], None, generator(tx, task, adjudicator))
            found = _present(tx, task, adjudicator, row[0], "adjudicate", shown, None, now, until)
        ids = _ids(json.loads(_own(tx, adjudicator, found.id)[3]))
        given = tx.all(
            "SELECT annotator, value FROM answer WHERE item = ? AND purpose = 'task' ORDER BY seq", found.item
        )
        return found, [(who, task.shown_values(json.loads(value), ids)) for who, value in given]


def adjudicate(store: Store, adjudicator: str, key: str, presentation: str, values: Any) -> Event:
    """Decide about a contested item: these values stand in place of a majority.

    Raises:
        BadAnswer, Conflict, NotFound: as ``answer``.
    """
    with store.write() as tx:
        before = tx.find(key)
        item, purpose, state, shown = _own(tx, adjudicator, presentation)
        stored = _canonical(tx, tx.task, item, json.loads(shown), values)
        body = {"presentation": presentation, "item": item, "values": stored}
        if before is not None:
            return same(before, "adjudicate", adjudicator, body)
        if purpose != "adjudicate":
            raise Conflict("this item was not shown for a decision between answers. Send it as an answer.")
        _check_open(state)
        if tx.one("SELECT 1 FROM adjudication WHERE item = ?", item):
            raise Conflict("somebody else has decided about this item meanwhile. Ask for the next one.")
        event = tx.append("adjudicate", adjudicator, body, key=key)
        tx.run("DELETE FROM lease WHERE presentation = ?", presentation)
        return event


def prioritise(store: Store, needs: Mapping[str, float], *, key: str | None = None) -> Event:
    """Say where the next answers are worth most.

    Args:
        needs: item id -> need; greater comes first, 0 is the default.
    Raises:
        BadAnswer: a need is not finite.
    """
    if not all(math.isfinite(need) for need in needs.values()):
        raise BadAnswer("an item's need is not a finite number.")
    return store.append("priority", "admin", {"items": {item: float(need) for item, need in needs.items()}}, key=key)


def progress(store: Store, annotator: str) -> dict[str, int]:
    """{"done": answers of every purpose, "wanted": the annotator's expected share}.

    Everything that is answered counts, and the share is the same whatever was drawn: a number that stood still at a gold
    item would betray it.
    """
    with store.read() as tx:
        given = tx.task.distribution
        done = tx.one("SELECT count(*) FROM answer WHERE annotator = ?", annotator)[0]
        (items,) = tx.one("SELECT count(*) FROM item WHERE kind = 'task'")
        people = max(1, tx.one("SELECT count(*) FROM annotator WHERE active AND role = 'annotator'")[0])
    share = 1 - given.gold_share - given.attention_share - given.repeat_share
    wanted = math.ceil(items * min(1.0, given.overlap / people) / share)
    return {"done": done, "wanted": max(done, wanted)}


def _own_lease(tx: Transaction, task: Task, annotator: str, now: float) -> str | None:
    """The presentation that is open with this annotator, the latest first; leases whose place is gone are removed."""
    leases = tx.all(
        "SELECT presentation, item, purpose FROM lease WHERE annotator = ? AND purpose <> 'adjudicate' "
        "ORDER BY since DESC, presentation",
        annotator,
    )
    for presentation, item, purpose in leases:
        if purpose != "task" or _has_place(tx, task, item, presentation, now):
            return str(presentation)
        tx.run("DELETE FROM lease WHERE presentation = ?", presentation)
    return None


def _has_place(tx: Transaction, task: Task, item: str, presentation: str, now: float) -> bool:
    """A place is kept for this presentation, or one is free."""
    if tx.one("SELECT 1 FROM lease WHERE presentation = ? AND until > ?", presentation, now):
        return True
    taken = tx.one(
        "SELECT answers + (SELECT count(*) FROM lease WHERE item = ?1 AND purpose = 'task' AND until > ?2 "
        "AND presentation <> ?3) FROM item WHERE id = ?1",
        *(item, now, presentation),
    )[0]
    return bool(taken < task.distribution.overlap)


def _present(
    tx: Transaction,
    task: Task,
    annotator: str,
    item: str,
    purpose: str,
    shown: list[list[Any]],
    repeated: str | None,
    now: float,
    until: float,
) -> Presentation:
    presentation = secrets.token_hex(12)
    body = {"presentation": presentation, "item": item, "purpose": purpose, "repeat_of": repeated, "shown": shown}
    tx.append("presented", annotator, body)
    _lease(tx, presentation, item, annotator, purpose, now, until)
    return _presentation(tx, task, presentation, until)


def _lease(
    tx: Transaction, presentation: str, item: str, annotator: str, purpose: str, now: float, until: float
) -> None:
    tx.run("INSERT OR REPLACE INTO lease VALUES (?, ?, ?, ?, ?, ?)", presentation, item, annotator, purpose, now, until)


def _presentation(tx: Transaction, task: Task, presentation: str, until: float) -> Presentation:
    item, purpose, shown, previous, prompt, responses, images = tx.one(
        "SELECT presented.item, purpose, shown, previous, prompt, responses, images FROM presented "
        "JOIN item ON item.id = presented.item WHERE presented.id = ?",
        presentation,
    )
    shown, responses, prompt = json.loads(shown), json.loads(responses), json.loads(prompt)
    return Presentation(
        presentation,
        item,
        purpose,
        prompt if isinstance(prompt, str) else tuple(prompt),
        tuple((key, responses[number]["text"]) for key, number in shown),
        tuple(json.loads(images)),
        until,
        None if previous is None else task.shown_values(json.loads(previous), _ids(shown)),
    )


def _canonical(tx: Transaction, task: Task, item: str, shown: list[list[Any]], values: Any) -> Values:
    (responses,) = tx.one("SELECT responses FROM item WHERE id = ?", item)
    texts = [response["text"] for response in json.loads(responses)]
    stored = task.canonical(values, _ids(shown), texts)
    try:
        canonical_json(stored).encode("utf-8")
    except UnicodeEncodeError:
        raise BadAnswer("a text holds half a character (an unpaired surrogate). Type it again.") from None
    return stored


def _ids(shown: Sequence[Sequence[Any]]) -> list[str]:
    """A presentation's ids in the item's own order."""
    return [key for key, _ in sorted(shown, key=lambda pair: pair[1])]


def _own(tx: Transaction, annotator: str, presentation: str) -> tuple[str, str, str, str]:
    """(item, purpose, state, shown) of a presentation of this annotator."""
    row = tx.one(
        "SELECT item, purpose, state, shown FROM presented WHERE id = ? AND annotator = ?", presentation, annotator
    )
    if row is None:
        raise NotFound("no such presentation of yours. Ask for the next item.")
    return row


def _known(tx: Transaction, annotator: str) -> None:
    if not tx.one("SELECT 1 FROM annotator WHERE pseudonym = ? AND active", annotator):
        raise NotFound(f"no active annotator {annotator}. Add one with: palate label annotators add STORE NAME")


def _check_open(state: str) -> None:
    if state != "open":
        done = {"answered": "answered", "skipped": "skipped", "late": "answered, too late to count"}[state]
        raise Conflict(f"this item is {done} already. Undo that first, or ask for the next item.")


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e7:
        raise BadAnswer(f"seconds is {str(value)[:40]}; expected the time spent, a number >= 0.")
    return round(float(value), 3)


def _reason(text: Any) -> str:
    if not isinstance(text, str) or len(text) > LONGEST_REASON:
        raise BadAnswer(f"expected a text of at most {LONGEST_REASON} characters.")
    return text.encode("utf-8", "replace").decode("utf-8")
