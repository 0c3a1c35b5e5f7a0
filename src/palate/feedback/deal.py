"""Which item an annotator is shown next, and in which order.

What an annotator is shown next, by draws that depend on the task's seed, the annotator and how much they were shown:

    an open item of theirs (after a reload, an undo, a crash)
    else, with the shares of the task: attention item | gold item | an earlier item of theirs again, in reverse order
    else, with random_share: any item with a free place
    else the item with the greatest need: priority, then most answers (what was begun is finished first)

Never an item that they answered or skipped, and never one with a text of their own. A skip frees the place for others.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from random import Random
from typing import Any

from palate.feedback.store import Transaction
from palate.feedback.task import Task

# An item with a free place that this annotator (?3) has neither answered nor skipped nor written.
_FREE = """
    kind = 'task' AND open = 1
    AND answers + (SELECT count(*) FROM lease WHERE lease.item = item.id AND purpose = 'task' AND until > ?2) < ?1
    AND NOT EXISTS (SELECT 1 FROM presented WHERE presented.annotator = ?3 AND presented.item = item.id
                    AND state <> 'open')
    AND NOT EXISTS (SELECT 1 FROM author WHERE author.item = item.id AND author.annotator = ?3)
"""
BY_NEED = f"SELECT id FROM item WHERE {_FREE} ORDER BY priority DESC, answers DESC, shuffle LIMIT 1"
BY_CHANCE = f"SELECT id FROM item WHERE {_FREE} AND shuffle >= ?4 ORDER BY shuffle LIMIT 1"
TESTS = """
    SELECT id FROM item WHERE kind = ?1
    AND NOT EXISTS (SELECT 1 FROM presented WHERE annotator = ?2 AND item = item.id AND state <> 'open') ORDER BY id
"""
EARLIER = """
    SELECT item, id FROM presented AS first WHERE annotator = ?1 AND purpose = 'task' AND state = 'answered'
    AND number <= (SELECT max(number) FROM presented WHERE annotator = ?1) - ?2
    AND NOT EXISTS (SELECT 1 FROM presented WHERE repeat_of = first.id) ORDER BY number
"""
CONTESTED = """
    SELECT id FROM item WHERE kind = 'task' AND disagreement > ?1 AND answers >= ?2
    AND NOT EXISTS (SELECT 1 FROM adjudication WHERE adjudication.item = item.id)
    AND NOT EXISTS (SELECT 1 FROM lease WHERE lease.item = item.id AND purpose = 'adjudicate' AND until > ?3)
    AND NOT EXISTS (SELECT 1 FROM presented WHERE presented.annotator = ?4 AND presented.item = item.id
                    AND state <> 'open')
    ORDER BY disagreement DESC, shuffle LIMIT 1
"""


def choose(tx: Transaction, task: Task, annotator: str, rng: Random, now: float) -> tuple[str | None, str, str | None]:
    """(item, purpose, presentation that is repeated)."""
    given = task.distribution
    free = (given.overlap, now, annotator)
    draw, at_random, point = rng.random(), rng.random() < given.random_share, rng.randrange(2**56)
    by_need = tx.one(BY_NEED, *free)
    if by_need is None:  # gold and repeats come between work, not after it
        return None, "task", None
    if draw < given.attention_share + given.gold_share:
        kind = "attention" if draw < given.attention_share else "gold"
        tests = tx.all(TESTS, kind, annotator)
        if tests:
            return rng.choice(tests)[0], kind, None
    elif draw < given.attention_share + given.gold_share + given.repeat_share:
        earlier = tx.all(EARLIER, annotator, given.repeat_after)
        if earlier:
            item, repeated = rng.choice(earlier)
            return item, "repeat", repeated
    if at_random:
        drawn = tx.one(BY_CHANCE, *free, point) or tx.one(BY_CHANCE, *free, 0)
        return drawn[0], "task", None
    return by_need[0], "task", None


def why_nothing(tx: Transaction, now: float) -> str:
    """Why there is nothing for somebody."""
    items = tx.one("SELECT count(*) FROM item WHERE kind = 'task'")[0]
    if not items:
        return "no items have been imported yet."
    if not tx.one("SELECT 1 FROM item WHERE kind = 'task' AND open = 1 LIMIT 1"):
        return "every item has all its answers. Thank you."
    if tx.one("SELECT 1 FROM lease WHERE purpose = 'task' AND until > ? LIMIT 1", now):
        return "you have done all you can; others are still at work on the rest. Look again later."
    return "you have done all you can; the rest waits for other people."


def order(tx: Transaction, item: str, repeated: str | None, rng: Random) -> list[list[Any]]:
    """[[random id, number of the response], ...] as shown: drawn, or for a repeat the first order reversed."""
    if repeated is not None:
        (first,) = tx.one("SELECT shown FROM presented WHERE id = ?", repeated)
        numbers = [number for _, number in reversed(json.loads(first))]
    else:
        (responses,) = tx.one("SELECT responses FROM item WHERE id = ?", item)
        numbers = list(range(len(json.loads(responses))))
        rng.shuffle(numbers)
    return [[secrets.token_hex(6), number] for number in numbers]


def generator(tx: Transaction, task: Task, annotator: str) -> Random:
    """Draws of this annotator's next presentation."""
    (shown,) = tx.one("SELECT count(*) FROM presented WHERE annotator = ?", annotator)
    digest = hashlib.sha256(f"{task.distribution.seed}:{annotator}:{shown}".encode()).digest()
    return Random(int.from_bytes(digest, "big"))
