"""Other tools' judgements on their way into a store: each stays one person's answer, with the line that it is from.

A judgement becomes three events: the item (once), its presentation and the answer, whose body says under "source"
which tool and line it is from. Annotators get a pseudonym; the tool's own name of them stands in the table of names
only, and imported annotators cannot log in. What was shown in which order is not known: the order is drawn, and the
presentation's id begins with ``IMPORTED``, so that nothing is concluded about sides. Importing a file again adds
nothing.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from palate.data.kinds import Judgement, PromptText, at, describe, prompt_key
from palate.errors import DataError, FeedbackError, PalateError
from palate.feedback.items import Candidate, add_items
from palate.feedback.questions import BadAnswer
from palate.feedback.store import Store, Transaction
from palate.feedback.tables import canonical_json
from palate.feedback.task import Task, Values, task_of
from palate.feedback.views import IMPORTED

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Judged:
    """One person's judgement of the responses to one prompt.

    Attributes:
        prompt: text or messages.
        responses: texts, in the order that ``values`` number them by.
        values: {question id: value}, responses by number, as ``feedback.questions`` stores them.
        annotator: the tool's name of who judged.
        place: "file:line".
        sources: what is known of each response's origin.
        id: the tool's own id of the judgement, if it has one.
        seconds: time spent, or None.
        time: when, ISO 8601, or None.
    Raises:
        DataError: something of another type than that, or text that cannot be stored.
    """

    prompt: PromptText
    responses: tuple[str, ...]
    values: Values
    annotator: str = UNKNOWN
    place: str = ""
    sources: tuple[Mapping[str, Any], ...] = ()
    id: str = ""
    seconds: float | None = None
    time: str | None = None

    def __post_init__(self) -> None:
        for text in self.responses:
            checked = Judgement(self.prompt, text, True, source=self.place)  # checked like any text
            object.__setattr__(self, "prompt", checked.prompt)
        if not all(isinstance(source, Mapping) for source in self.sources):
            raise DataError(at(self.place, f'"sources" is {describe(list(self.sources))}. Expected a list of objects.'))
        if self.seconds is not None:
            number = isinstance(self.seconds, int | float) and not isinstance(self.seconds, bool)
            if not number or not 0 <= self.seconds < 1e7:
                raise DataError(at(self.place, f"the time spent is {describe(self.seconds)}. Expected seconds, >= 0."))
        if self.time is not None and not isinstance(self.time, str):
            raise DataError(at(self.place, f"the time is {describe(self.time)}. Expected a text, ISO 8601."))
        try:
            canonical_json([self.values, self.annotator, self.id, self.time, self.sources]).encode()
        except (TypeError, ValueError) as error:  # half a character, or NaN
            raise DataError(at(self.place, f"this judgement cannot be stored: {error}.")) from None


@contextmanager
def written_by(tool: str, source: str) -> Iterator[None]:
    """Another tool's line is read as that tool writes it; what has another form is the file's fault, told with its place."""
    try:
        yield
    except PalateError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
        raise DataError(f"{source}: not of the form that {tool} writes ({found}). Export it again.") from error


@dataclass
class Taken:
    """What a file holds.

    Attributes:
        tool: a name of ``exchange.IMPORTS``.
        judged: the judgements.
        questions: settings of a task that asks what they answer.
        left_out: what could not be read as a judgement, by reason.
    """

    tool: str
    judged: list[Judged] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def ask(self, **question: Any) -> str:
        """Note that judgements answer this question; returns its id."""
        if question not in self.questions:
            self.questions.append(question)
        return str(question["id"])


@dataclass
class Imported:
    """What an import did."""

    answers: int = 0
    known: int = 0
    items: int = 0
    annotators: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        said = f"{self.answers} answers of {self.annotators} annotators about {self.items} new items"
        said += f"; {self.known} were here already" if self.known else ""
        left = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return said + (f"; left out: {left}" if left else "")


def task_for(taken: Taken) -> Task:
    """A task that asks what a file answers, for a store that is made for it.

    Raises:
        FeedbackError: nothing is known of what the file answers.
    """
    if not taken.questions:
        raise FeedbackError(
            "these answers do not say what was asked. Make the store with its task first: --task FILE.yaml"
        )
    return task_of({"title": f"Imported from {taken.tool.replace('_', ' ')}", "questions": taken.questions})


def take(store: Store, taken: Taken) -> Imported:
    """Write the judgements of a file into a store.

    Raises:
        FeedbackError: none of them answers a question that the store's task asks.
    """
    done, task = Imported(left_out=Counter(taken.left_out)), store.task
    fitting = [fit for each in taken.judged if (fit := _fitting(each, taken, task, done.left_out)) is not None]
    if taken.judged and not fitting:
        asked = ", ".join(f"{question.id} ({question.type})" for question in task.questions)
        left = ", ".join(f"{count} {reason}" for reason, count in done.left_out.most_common())
        raise FeedbackError(f"{store.path}: nothing was taken: {left}. Its task asks: {asked}.")
    fitting = _in_one_order(fitting, task)
    candidates = {_content(each): each for each in reversed(fitting)}
    done.items = add_items(store, [_candidate(each) for each in reversed(candidates.values())]).new
    with store.write() as tx:
        items = _items(tx)
        people = {name: pseudonym for name, pseudonym in tx.all("SELECT name, pseudonym FROM person")}
        seen: Counter[str] = Counter()
        authors: set[str] = set()
        for each in fitting:
            item = items[_content(each)]
            # Names stay out of the key: whoever has the log could try names until one fits.
            same = canonical_json([taken.tool, each.id, item, each.values, each.time])
            seen[same] += 1
            key = IMPORTED + hashlib.sha256(f"{same}{seen[same]}".encode()).hexdigest()[:40]
            if tx.find(key) is not None:
                done.known += 1
                continue
            annotator = _pseudonym(tx, taken.tool, each.annotator, people)
            authors.add(annotator)
            _write(tx, taken.tool, each, item, annotator, key)
            done.answers += 1
    done.annotators = len(authors)
    return done


def _write(tx: Transaction, tool: str, each: Judged, item: str, annotator: str, key: str) -> None:
    order = list(range(len(each.responses)))
    Random(key).shuffle(order)
    presentation = IMPORTED + secrets.token_hex(12)
    shown = [[secrets.token_hex(6), number] for number in order]
    time = _utc(each.time)
    body: dict[str, Any] = {
        "presentation": presentation,
        "item": item,
        "purpose": "task",
        "repeat_of": None,
        "shown": shown,
    }
    tx.append("presented", annotator, body | {"order_known": False}, time=time)
    source = {"tool": tool, "place": each.place, "id": each.id}
    body = {"presentation": presentation, "item": item, "values": each.values, "seconds": each.seconds, "changed": True}
    tx.append("answer", annotator, body | {"source": source}, key=key, time=time)


def _pseudonym(tx: Transaction, tool: str, name: str, people: dict[str, str]) -> str:
    """The pseudonym of a tool's annotator; one that a store of palate gave is kept."""
    if tool == "jsonl" and tx.one("SELECT 1 FROM annotator WHERE pseudonym = ?", name):
        return name
    own = "".join(c for c in f"{tool}: {name}" if c.isprintable())
    own = own if len(own) <= 100 else own[:60] + hashlib.sha256(own.encode()).hexdigest()[:40]
    if own not in people:
        people[own] = f"p-{secrets.token_hex(4)}"
        body = {"pseudonym": people[own], "role": "annotator", "active": False}
        tx.append("annotator", "admin", body)
        tx.run("INSERT INTO person VALUES (?, ?)", people[own], own)
    return people[own]


def _fitting(each: Judged, taken: Taken, task: Task, left_out: Counter[str]) -> Judged | None:
    """The judgement in the words of the store's task, or None."""
    if len(set(each.responses)) < len(each.responses):
        left_out["with the same response twice"] += 1
        return None
    if len(each.responses) > (task.shown or 9):
        left_out[f"with more than the {task.shown or 9} responses that are shown at once"] += 1
        return None
    values: Values = {}
    ids = [f"r{number}" for number in range(len(each.responses))]
    for name, value in each.values.items():
        asked = next((q for q in taken.questions if q["id"] == name), {"type": None})
        try:
            found = _translated(name, value, asked["type"], len(each.responses), task)
        except (KeyError, IndexError, TypeError, ValueError):
            left_out[f'values that do not fit the question "{name}"'] += 1
            continue
        if found is None:
            continue
        question, value = found
        try:
            values[question.id] = question.canonical(question.shown(value, ids), ids, each.responses)
        except (BadAnswer, KeyError, IndexError, TypeError, ValueError):
            left_out[f'values that do not fit the question "{question.id}"'] += 1
    if not values:
        left_out["without an answer to a question of the task"] += 1
        return None
    return Judged(**{**vars(each), "values": values})


def _translated(name: str, value: Any, kind: str | None, count: int, task: Task) -> tuple[Any, Any] | None:
    """(question of the task, value): the same question, else the only one of its type, else one for the order."""
    for question in task.questions:
        if question.id == name and kind in (None, question.type):
            return question, value
    alike = [question for question in task.questions if question.type == kind]
    if len(alike) == 1:
        return alike[0], value
    ranks = _ranks(value, kind, count)
    for question in task.questions:
        if ranks is not None and question.type == "rank":
            return question, [[i for i, r in enumerate(ranks) if r == rank] for rank in sorted(set(ranks))]
        if ranks is not None and question.type == "compare" and count == 2:
            tie = {"choice": "tie"}
            return question, tie if ranks[0] == ranks[1] else {"choice": ranks.index(min(ranks)), "strength": 1}
    return None


def _ranks(value: Any, kind: str | None, count: int) -> list[int] | None:
    if kind == "compare":
        choice = value["choice"]
        return [1] * count if not isinstance(choice, int) else [1 if i == choice else 2 for i in range(count)]
    if kind == "rank":
        place = {number: i for i, tier in enumerate(value, 1) for number in tier}
        return [place[i] for i in range(count)]
    return None


def _in_one_order(given: Sequence[Judged], task: Task) -> list[Judged]:
    """The same responses to a prompt in the order of their first judgement: else they would be different items."""
    first: dict[tuple[str, frozenset[str]], tuple[str, ...]] = {}
    ordered = []
    for each in given:
        order = first.setdefault((prompt_key(each.prompt), frozenset(each.responses)), each.responses)
        if order != each.responses:
            number = [order.index(text) for text in each.responses]  # old number -> new number
            sources = tuple(each.sources[each.responses.index(text)] for text in order) if each.sources else ()
            values = {name: _renumbered(task, name, value, number) for name, value in each.values.items()}
            each = Judged(**{**vars(each), "responses": order, "sources": sources, "values": values})
        ordered.append(each)
    return ordered


def _renumbered(task: Task, name: str, value: Any, number: Sequence[int]) -> Any:
    kind = next(question.type for question in task.questions if question.id == name)
    if kind == "compare":
        return value | {"choice": number[value["choice"]]} if isinstance(value["choice"], int) else value
    if kind == "rank":
        return [sorted(number[i] for i in tier) for tier in value]
    if kind == "text":
        return value
    moved = [None] * len(value)
    for old, entry in enumerate(value):
        moved[number[old]] = entry
    return moved


def _content(each: Judged) -> str:
    prompt = each.prompt if isinstance(each.prompt, str) else list(each.prompt)
    return canonical_json([prompt, list(each.responses)])


def _candidate(each: Judged) -> Candidate:
    meta = {"source": each.place} if each.place else {}
    return Candidate(each.prompt, each.responses, sources=each.sources, meta=meta)


def _items(tx: Transaction) -> dict[str, str]:
    """Content -> id of the task's items without pictures."""
    found: dict[str, str] = {}
    rows = tx.all("SELECT id, prompt, responses FROM item WHERE kind = 'task' AND images = '[]' ORDER BY seq")
    for item, prompt, responses in rows:
        texts = [response["text"] for response in json.loads(responses)]
        found.setdefault(canonical_json([json.loads(prompt), texts]), item)
    return found


def _utc(time: str | None) -> str | None:
    """A tool's time in the form of the log; None where there is none that can be read."""
    try:
        found = datetime.fromisoformat(time) if time else None
    except ValueError:
        return None
    if found is None:
        return None
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Reader = Callable[[str | Path], Taken]
