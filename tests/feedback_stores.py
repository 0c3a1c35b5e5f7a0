"""Small stores of feedback for tests: a task, items, people, and how somebody answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from palate.feedback import queue
from palate.feedback.items import Candidate, add_items
from palate.feedback.store import Store
from palate.feedback.task import Task, task_of

COMPARE = {"id": "better", "type": "compare", "strengths": 3, "tie": True, "both_bad": True}


def compare_task(**distribution: Any) -> Task:
    """Which of two is better, in three strengths; without random share unless asked for."""
    return task_of({"questions": [COMPARE], "distribution": {"random_share": 0.0, **distribution}})


def make_store(
    folder: Path, task: Task, items: int | Iterable[Candidate] = 3, annotators: int = 2
) -> tuple[Store, list[str]]:
    """(store, pseudonyms of its annotators n0, n1, ...). Item i is the prompt "prompt i" with "good i" and "bad i".

    The pseudonyms are p-0, p-1, ...: every draw depends on them, and so is the same in every run.
    """
    store = Store.create(folder / "feedback.db", task)
    if isinstance(items, int):
        items = [Candidate(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(items)]
    add_items(store, items)
    names = [f"p-{i}" for i in range(annotators)]
    with store.write() as tx:
        for i, pseudonym in enumerate(names):
            tx.append("annotator", "admin", {"pseudonym": pseudonym, "role": "annotator", "active": True})
            tx.run("INSERT INTO person VALUES (?, ?)", pseudonym, f"n{i}")
    return store, names


def prefer_good(shown: queue.Presentation, strength: int = 2) -> dict[str, Any]:
    """The answer of somebody who prefers the response that begins with "good"."""
    choice = next(key for key, text in shown.responses if text.startswith("good"))
    return {"better": {"choice": choice, "strength": strength}}


def prefer_bad(shown: queue.Presentation) -> dict[str, Any]:
    choice = next(key for key, text in shown.responses if text.startswith("bad"))
    return {"better": {"choice": choice, "strength": 1}}


def answer_all(
    store: Store,
    annotator: str,
    answer: Callable[[queue.Presentation], dict[str, Any]] = prefer_good,
    most: int = 10_000,
) -> list[queue.Presentation]:
    """Answer until there is nothing more; what was shown."""
    shown: list[queue.Presentation] = []
    while len(shown) < most:
        each = queue.next_item(store, annotator)
        if isinstance(each, queue.Nothing):
            break
        queue.answer(store, annotator, f"{annotator}-{each.id}", each.id, answer(each), seconds=1.0)
        shown.append(each)
    return shown
