"""From answers to records that methods train on: comparisons, rankings, judgements, demonstrations, corrections.

The answers in force are the ones not undone; where an adjudicator decided about an item, that decision stands in place of
the answers. Every record names its annotator (a pseudonym) and the event that it comes from ("feedback.db:417"); what
gives no record is counted with the reason, never dropped in silence.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from palate.data.kinds import Comparison, Demonstration, Judgement, PromptText, Ranking, Record
from palate.data.ranking import ordered_pairs
from palate.data.segments import comparison_to_correction
from palate.errors import ConfigError
from palate.feedback.questions import Question
from palate.feedback.store import Store
from palate.feedback.task import Task, Values

ORDERING = ("rank", "compare", "rating", "accept")  # types of question that say which response is better
IMPORTED = "import-"  # how the ids of imported presentations begin


@dataclass(frozen=True)
class Answer:
    """One annotator's answer about one item.

    Attributes:
        seq, event, time: of the event.
        item, kind: the item's id, and "task", "gold" or "attention".
        prompt, responses, sources, images: of the item; values name responses by their number here.
        gold: the known answer, or None.
        annotator: pseudonym.
        purpose: "task", "gold", "attention", "repeat" or "adjudicate".
        repeat_of: for a repeat, the presentation that it repeats.
        presentation, shown: the numbers of the responses in the order in which they were shown.
        values: {question id: value}.
        seconds: time spent, or None.
        changed: False for an initial order that was sent as it was.
        place: "feedback.db:417".
    """

    seq: int
    event: str
    time: str
    item: str
    kind: str
    prompt: PromptText
    responses: tuple[str, ...]
    sources: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...]
    gold: Values | None
    annotator: str
    purpose: str
    repeat_of: str | None
    presentation: str
    shown: tuple[int, ...]
    values: Values
    seconds: float | None
    changed: bool
    place: str

    @property
    def sides_known(self) -> bool:
        """``shown`` is what stood on the screen; of another tool's answer nobody knows, and it was drawn."""
        return not self.presentation.startswith(IMPORTED)


@dataclass
class Made:
    """Records made of answers, and how many answers (or pairs) gave none, by reason."""

    records: list[Any] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f"{len(self.records):,} records" + (f"; left out: {reasons}" if reasons else "")


def answers(store: Store, purposes: Sequence[str] = ("task",)) -> list[Answer]:
    """The answers in force, in the order in which they were given; decisions have the purpose "adjudicate"."""
    marks = ", ".join("?" * len(purposes))
    with store.read() as tx:
        found = tx.all(_ANSWERS.format(marks=marks), *purposes)
        if "adjudicate" in purposes:
            found = sorted(found + tx.all(_DECISIONS))
        return [_answer(row, store.path.name) for row in found]


def labels(store: Store, *, decided: bool = True) -> list[Answer]:
    """What to learn from: answers about the task's own items, not tests and repeats.

    Args:
        decided: where an adjudicator decided, that decision alone; False = every annotator's own answer.
    """
    found = answers(store, ("task", "adjudicate") if decided else ("task",))
    over = {answer.item for answer in found if answer.purpose == "adjudicate"}
    return [answer for answer in found if answer.purpose == "adjudicate" or answer.item not in over]


def rankings(given: Iterable[Answer], task: Task, *, question: str | None = None) -> Made:
    """One ranking for each answer, ties kept; of a comparison, a rating or accepted/refused responses too.

    Args:
        question: id; None = the task's first question of the most telling type (rank, compare, rating, accept).
    Raises:
        ConfigError: no such question, or it says nothing about order.
    """
    asked, made = _asked(task, ORDERING, question), Made()
    for answer in given:
        value = answer.values.get(asked.id)
        ranks = None if value is None else asked.ranks(value, len(answer.responses))
        if len(answer.responses) < 2:
            made.left_out["with a single response"] += 1
        elif ranks is None:
            made.left_out["without an answer"] += 1
        else:
            made.records.append(
                Ranking(answer.prompt, answer.responses, tuple(ranks), annotator=answer.annotator, source=answer.place)
            )
    return made


def comparisons(
    given: Iterable[Answer],
    task: Task,
    *,
    question: str | None = None,
    margins: Sequence[float] | None = None,
    ties: Literal["drop", "half"] = "drop",
) -> Made:
    """One comparison for each pair of responses that an answer orders.

    Args:
        question: as for ``rankings``.
        margins: in reward units, for the strengths 1, 2, ... of a compare question; None = records without margin.
            (Touvron et al. 2023, arXiv:2307.09288, table 27, use 1/3, 2/3 and 1, or 1, 2 and 3.)
        ties: "drop" leaves pairs without preference out, "half" gives them the probability 1/2.
    Raises:
        ConfigError: no such question, it says nothing about order, or margins that do not fit it.
    """
    asked, made = _asked(task, ORDERING, question), Made()
    if margins is not None and (asked.type != "compare" or len(margins) != asked.strengths):
        wanted = f"{asked.strengths} of them" if asked.type == "compare" else "none: it has no strengths"
        raise ConfigError(f'{len(margins)} margins for the question "{asked.id}"; expected {wanted}.')
    for answer in given:
        value = answer.values.get(asked.id)
        ranks = None if value is None else asked.ranks(value, len(answer.responses))
        if value is None or ranks is None:
            made.left_out["answers without an order"] += 1
            continue
        margin = margins[value["strength"] - 1] if margins is not None and "strength" in value else None
        for better, worse in ordered_pairs(ranks):
            made.records.append(_comparison(answer, better, worse, margin=margin))
        tied = [(i, j) for i, j in combinations(range(len(ranks)), 2) if ranks[i] == ranks[j]]
        if ties == "half" and not (asked.type == "compare" and value["choice"] == "both_bad"):
            made.records += [_comparison(answer, i, j, probability=0.5) for i, j in tied]
        elif tied:
            made.left_out["pairs without preference"] += len(tied)
    return made


def majority(given: Iterable[Answer], task: Task, *, question: str | None = None) -> Made:
    """One comparison for each pair of an item's responses, over all its annotators.

    ``probability`` is the share who prefer ``chosen``, those without preference half for each; an even split is left out.
    """
    asked, made = _asked(task, ORDERING, question), Made()
    for group in by_item(given).values():
        first = group[0]
        rows = [
            ranks
            for answer in group
            if asked.id in answer.values
            and (ranks := asked.ranks(answer.values[asked.id], len(first.responses))) is not None
        ]
        for i, j in combinations(range(len(first.responses)), 2):
            share = _preferred(rows, i, j)
            if share is None:
                made.left_out["pairs without an answer"] += 1
            elif share == 0.5:
                made.left_out["even pairs"] += 1
            else:
                better, worse = (i, j) if share > 0.5 else (j, i)
                made.records.append(
                    Comparison(
                        first.prompt,
                        first.responses[better],
                        first.responses[worse],
                        probability=max(share, 1 - share),
                        source=first.place,
                    )
                )
    return made


def judgements(given: Iterable[Answer], task: Task, *, question: str | None = None) -> Made:
    """One judgement for each response: accepted or not, or, of a flags question, not flagged or flagged."""
    asked, made = _asked(task, ("accept", "flags"), question), Made()
    for answer in given:
        value = answer.values.get(asked.id)
        if value is None and asked.type == "flags":
            value = [[] for _ in answer.responses]
        for number, entry in enumerate(value or [None] * len(answer.responses)):
            if entry is None:
                made.left_out["responses without an answer"] += 1
                continue
            good = entry if asked.type == "accept" else not entry
            text = answer.responses[number]
            made.records.append(Judgement(answer.prompt, text, good, annotator=answer.annotator, source=answer.place))
    return made


def demonstrations(given: Iterable[Answer], task: Task, *, question: str | None = None) -> Made:
    """The rewritten responses, to be imitated."""
    return _rewritten(
        given, task, question, lambda answer, number, text: Demonstration(answer.prompt, text, source=answer.place)
    )


def corrections(given: Iterable[Answer], task: Task, *, question: str | None = None) -> Made:
    """Rewritten responses beside what they were: the rewrite is chosen, the model's text rejected."""
    return _rewritten(given, task, question, correction)


def correction(answer: Answer, number: int, rewritten: str) -> Record:
    """One correction as a record; what was changed is found by the diff when it is trained on."""
    pair = Comparison(
        answer.prompt, rewritten, answer.responses[number], annotator=answer.annotator, source=answer.place
    )
    return comparison_to_correction(pair)


def by_item(given: Iterable[Answer]) -> dict[str, list[Answer]]:
    """Answers of each item, in their order."""
    groups: dict[str, list[Answer]] = {}
    for answer in given:
        groups.setdefault(answer.item, []).append(answer)
    return groups


def provenance(store: Store, given: Sequence[Answer], made: Made, **options: Any) -> dict[str, Any]:
    """Where records come from: the state of the log, the task, who answered how much, and what was left out."""
    seq, last = store.last()
    return {
        "store": store.path.name,
        "events": seq,
        "last_hash": last,
        "task": store.task.title,
        "questions": store.task.fingerprint(),
        "records": len(made.records),
        "left_out": dict(made.left_out),
        "answers": len(given),
        "items": len({answer.item for answer in given}),
        "annotators": dict(Counter(answer.annotator for answer in given).most_common()),
        "options": options,
    }


_ANSWERS = """
    SELECT answer.seq, answer.event, answer.time, item.id, item.kind, item.prompt, item.responses, item.images, item.gold,
           answer.annotator, answer.purpose, presented.repeat_of, presented.id, presented.shown, answer.value, seconds,
           changed
    FROM answer JOIN item ON item.id = answer.item JOIN presented ON presented.id = answer.presentation
    WHERE answer.purpose IN ({marks}) ORDER BY answer.seq
"""
_DECISIONS = """
    SELECT adjudication.seq, adjudication.event, adjudication.time, item.id, item.kind, item.prompt, item.responses,
           item.images, item.gold, adjudication.annotator, 'adjudicate', NULL, presented.id, presented.shown,
           adjudication.value, NULL, 1
    FROM adjudication JOIN item ON item.id = adjudication.item
    JOIN presented ON presented.id = adjudication.presentation
"""


def _answer(row: Sequence[Any], name: str) -> Answer:
    seq, event, time, item, kind, prompt, responses, images, gold, annotator, purpose, repeat_of, *rest = row
    presentation, shown, value, seconds, changed = rest
    prompt, responses = json.loads(prompt), json.loads(responses)
    return Answer(
        seq=seq,
        event=event,
        time=time,
        item=item,
        kind=kind,
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        responses=tuple(response["text"] for response in responses),
        sources=tuple(response["source"] for response in responses),
        images=tuple(json.loads(images)),
        gold=None if gold is None else json.loads(gold),
        annotator=annotator,
        purpose=purpose,
        repeat_of=repeat_of,
        presentation=presentation,
        shown=tuple(number for _, number in json.loads(shown)),
        values=json.loads(value),
        seconds=seconds,
        changed=bool(changed),
        place=f"{name}:{seq}",
    )


def _asked(task: Task, types: Sequence[str], question: str | None) -> Any:
    """The question that a kind of record is made of."""
    fitting: list[Question] = [q for kind in types for q in task.questions if q.type == kind]
    if question is None and fitting:
        return fitting[0]
    for each in fitting:
        if each.id == question:
            return each
    asked = ", ".join(f"{q.id} ({q.type})" for q in task.questions)
    what = f'no question "{question}" of the types' if question else "no question of the types"
    raise ConfigError(f"{what} {', '.join(types)} in this task. It asks: {asked}.")


def _comparison(answer: Answer, better: int, worse: int, **facts: Any) -> Comparison:
    return Comparison(
        answer.prompt,
        answer.responses[better],
        answer.responses[worse],
        annotator=answer.annotator,
        source=answer.place,
        **facts,
    )


def _rewritten(given: Iterable[Answer], task: Task, question: str | None, make: Any) -> Made:
    asked, made = _asked(task, ("rewrite",), question), Made()
    for answer in given:
        for number, text in enumerate(answer.values.get(asked.id) or [None] * len(answer.responses)):
            if text is None:
                made.left_out["responses left as they were"] += 1
            else:
                made.records.append(make(answer, number, text))
    return made


def _preferred(rows: Sequence[Sequence[int]], i: int, j: int) -> float | None:
    """Share of rankings that prefer i to j, ties one half; None without any."""
    if not rows:
        return None
    return sum(0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]) for ranks in rows) / len(rows)
