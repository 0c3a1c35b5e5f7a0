"""How a labelling project stands: progress, people, agreement, what is contested, and drift by week.

Pure functions of answers (``views.Answer``); ``summary`` puts them together for a page. Names are pseudonyms.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from statistics import median
from typing import Any

from palate.feedback.questions import Question
from palate.feedback.store import Store
from palate.feedback.task import Task
from palate.feedback.upkeep import status
from palate.feedback.views import Answer, answers
from palate.feedback.votes import Vote, ranking_votes

PURPOSES = ("task", "gold", "attention", "repeat", "adjudicate")
MOST_LISTED = 50  # contested items, and remarks
MODEL_FROM = 20  # votes from which on the annotator model is fitted


def summary(store: Store, *, model: bool = True) -> dict[str, Any]:
    """Everything for the page of an admin, as JSON.

    Args:
        model: also fit the annotator model (seconds for thousands of votes).
    """
    given, task = answers(store, PURPOSES), store.task
    own = [answer for answer in given if answer.purpose == "task"]
    return {
        "progress": status(store),
        "annotators": annotator_rows(given, task),
        "model": model_rows(votes(own, task)) if model else [],
        "agreement": agreement(own, task),
        "contested": contested(given, task),
        "weeks": drift(given, task),
        "remarks": remarks(store),
        "questions": [{"id": question.id, "type": question.type} for question in task.questions],
        "last_hash": store.last()[1],
    }


def annotator_rows(given: Sequence[Answer], task: Task) -> list[dict[str, Any]]:
    """One row for each annotator, by number of answers: counts, time, and every test that there is.

    ``gold`` and ``attention``: share answered as known; ``repeat``: share answered as the first time; ``unchanged``: share
    of rankings sent in the order in which they were shown; ``first``: share of preferences for the response shown first
    (1/2 = no bias of position). Each share comes with its number of cases, and is None without any.
    """
    first_time = {answer.presentation: answer for answer in given if answer.purpose == "task"}
    rows = []
    for name, count in Counter(answer.annotator for answer in given).most_common():
        own = [answer for answer in given if answer.annotator == name]
        seconds = [answer.seconds for answer in own if answer.seconds is not None]
        ranked = [answer for answer in own if any(q.type == "rank" and q.id in answer.values for q in task.questions)]
        repeats = [
            same_order(task, answer, first_time[answer.repeat_of])
            for answer in own
            if answer.purpose == "repeat" and answer.repeat_of in first_time
        ]
        rows.append(
            {
                "annotator": name,
                "answers": count,
                "median_seconds": median(seconds) if seconds else None,
                "gold": _share([as_known(task, answer) for answer in own if answer.purpose == "gold"]),
                "attention": _share([as_known(task, answer) for answer in own if answer.purpose == "attention"]),
                "repeat": _share(repeats),
                "unchanged": _share([not answer.changed for answer in ranked]),
                "first": _share([side for answer in own for side in first_sides(task, answer)]),
                "last": max(answer.time for answer in own),
            }
        )
    return rows


def as_known(task: Task, answer: Answer) -> bool | None:
    """A test was answered as the known answer says: the same order of responses, or else the same values; None if no test.

    How strong a preference is does not matter.
    """
    if answer.gold is None:
        return None
    known = task.ranks(answer.gold, len(answer.responses))
    if known is not None:
        return order_of(task.ranks(answer.values, len(answer.responses))) == order_of(known)
    return all(answer.values.get(name) == value for name, value in answer.gold.items())


def same_order(task: Task, one: Answer, other: Answer) -> bool | None:
    """Two answers about an item order its responses alike; None where one says nothing about order."""
    count = len(one.responses)
    first, second = order_of(task.ranks(one.values, count)), order_of(task.ranks(other.values, count))
    return None if first is None or second is None else first == second


def order_of(ranks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Ranks without gaps: (1, 3, 3) and (1, 2, 2) are the same order."""
    if ranks is None:
        return None
    steps = sorted(set(ranks))
    return tuple(1 + steps.index(rank) for rank in ranks)


def first_sides(task: Task, answer: Answer) -> list[bool]:
    """Of two responses: [the one shown first is preferred]; nothing for ties, for more than two, and for imports."""
    ranks = task.ranks(answer.values, len(answer.responses))
    if ranks is None or len(ranks) != 2 or ranks[0] == ranks[1] or not answer.sides_known:
        return []
    return [ranks[answer.shown[0]] < ranks[answer.shown[1]]]


def votes(given: Sequence[Answer], task: Task) -> list[Vote]:
    """What answers say about pairs, for the annotator model: the sides of a pair are those of the screen."""
    found: list[Vote] = []
    for answer in given:
        ranks = task.ranks(answer.values, len(answer.responses))
        seconds = answer.seconds if answer.seconds else None
        if ranks is None or len(ranks) < 2:
            continue
        if len(ranks) > 2:
            found += ranking_votes(answer.item, range(len(ranks)), ranks, answer.annotator, seconds=seconds)
            continue
        left, right = answer.shown
        outcome = "tie" if ranks[0] == ranks[1] else "left" if ranks[left] < ranks[right] else "right"
        known = answer.sides_known
        found.append(Vote(answer.item, left, right, outcome, answer.annotator, seconds, sides_known=known))  # type: ignore[arg-type]
    return found


def model_rows(given: Sequence[Vote]) -> list[dict[str, Any]]:
    """The annotator model's table with its warnings; empty below ``MODEL_FROM`` votes or with a single annotator."""
    if len(given) < MODEL_FROM or len({vote.annotator for vote in given}) < 2:
        return []
    from palate.feedback.annotator_model import fit_annotators
    from palate.feedback.annotator_table import annotator_table

    return [
        {
            "annotator": row.name,
            "votes": row.votes,
            "reliability": row.reliability,
            "reliability_sd": row.reliability_sd,
            "left_bias": row.left_bias,
            "left_bias_sd": row.left_bias_sd,
            "tie_rate": row.tie_rate,
            "agreement": None if row.agreement is None else list(row.agreement),
            "median_seconds": row.median_seconds,
            "flags": [{"name": flag.name, "evidence": flag.evidence} for flag in row.flags],
        }
        for row in annotator_table(fit_annotators(given))
    ]


def agreement(given: Sequence[Answer], task: Task) -> list[dict[str, Any]]:
    """Krippendorff's alpha of every question, with the distance that suits its type; per response where it is.

    Rankings of different numbers of responses cannot be compared: each number has a row of its own. Of several answers
    of one annotator to one item, as imports may hold, the first counts.
    """
    from palate.feedback.agreement import krippendorff_alpha, rating_table

    rows = []
    for question in task.questions:
        distance, cells = _cells(question)
        if distance is None:
            continue
        cell: dict[tuple[Any, str], Any] = {}
        for answer in given:
            for item, value in cells(answer, answer.values[question.id]) if question.id in answer.values else ():
                cell.setdefault((item, answer.annotator), value)
        sizes = {len(value) for value in cell.values()} if distance == "ranking" else set()
        for size in sorted(sizes) if len(sizes) > 1 else (None,):
            triples = [(*key, value) for key, value in cell.items() if size is None or len(value) == size]
            found = krippendorff_alpha(rating_table(triples).ratings, distance) if triples else None
            rows.append(
                {
                    "question": question.id if size is None else f"{question.id} ({size} responses)",
                    "type": question.type,
                    "distance": distance,
                    "alpha": None if found is None else found.value,
                    "low": None if found is None else found.low,
                    "high": None if found is None else found.high,
                    "items": 0 if found is None else found.items,
                    "ratings": 0 if found is None else found.ratings,
                    "why": "no answers yet" if found is None else found.why if found.value is None else "",
                }
            )
    return rows


def contested(given: Sequence[Answer], task: Task) -> list[dict[str, Any]]:
    """Items whose answers disagree more than the task allows, the most contested first; with what was decided."""
    groups: dict[str, list[Answer]] = {}
    for answer in given:
        if answer.purpose == "task":
            groups.setdefault(answer.item, []).append(answer)
    decided = {answer.item: answer for answer in given if answer.purpose == "adjudicate"}
    rows: list[dict[str, Any]] = []
    for item, own in groups.items():
        found = task.disagreement([answer.values for answer in own], len(own[0].responses))
        if found > task.distribution.contested_above and len(own) >= task.distribution.overlap:
            rows.append(
                {
                    "item": item,
                    "disagreement": found,
                    "prompt": own[0].prompt if isinstance(own[0].prompt, str) else list(own[0].prompt),
                    "responses": list(own[0].responses),
                    "answers": [{"annotator": answer.annotator, "values": answer.values} for answer in own],
                    "decided": item in decided,
                }
            )
    rows.sort(key=lambda row: -row["disagreement"])
    return rows[:MOST_LISTED]


def remarks(store: Store) -> list[dict[str, Any]]:
    """What annotators said about items, the latest first: flags, and skips with a reason."""
    with store.read() as tx:
        found = tx.all(
            "SELECT event.kind, event.time, event.actor, event.body, presented.item FROM event JOIN presented "
            "ON presented.id = json_extract(event.body, '$.presentation') WHERE event.kind IN ('flag', 'skip') "
            "ORDER BY event.seq DESC"
        )
    rows = [(*row[:3], json.loads(row[3]), row[4]) for row in found]
    return [
        {"kind": kind, "time": time, "annotator": actor, "item": item, "text": body.get("text") or body.get("reason")}
        for kind, time, actor, body, item in rows
        if body.get("text") or body.get("reason")
    ][:MOST_LISTED]


def drift(given: Sequence[Answer], task: Task) -> list[dict[str, Any]]:
    """Week by week (ISO): answers, median time, ties, gold answered as known, and mean disagreement of items begun then."""
    weeks: dict[str, list[Answer]] = {}
    for answer in given:
        year, number, _ = datetime.fromisoformat(answer.time).isocalendar()
        weeks.setdefault(f"{year}-W{number:02d}", []).append(answer)
    rows = []
    for week, own in sorted(weeks.items()):
        seconds = [answer.seconds for answer in own if answer.seconds is not None]
        orders = [order_of(task.ranks(answer.values, len(answer.responses))) for answer in own]
        rows.append(
            {
                "week": week,
                "answers": len(own),
                "median_seconds": median(seconds) if seconds else None,
                "no_preference": _share(
                    [len(set(order)) == 1 for order in orders if order is not None and len(order) > 1]
                ),
                "gold": _share([as_known(task, answer) for answer in own if answer.purpose == "gold"]),
                "first": _share([side for answer in own for side in first_sides(task, answer)]),
            }
        )
    return rows


Cells = Callable[[Answer, Any], list[tuple[Any, Any]]]


def _cells(question: Question) -> tuple[str | None, Cells]:
    """(distance, from an answer to (unit, value) cells) of a question."""
    if question.type in ("rank", "compare"):
        return "ranking", lambda a, v: [(a.item, tuple(question.ranks(v, len(a.responses)) or ()))]
    if question.type == "rating":
        return "ordinal", _each
    if question.type == "accept":
        return "nominal", _each
    if question.type == "flags":
        return "set", lambda a, v: [((a.item, i), frozenset(flags)) for i, flags in enumerate(v)]
    if question.type == "spans":
        return "span", lambda a, v: [
            ((a.item, i), frozenset((span["start"], span["end"]) for span in spans)) for i, spans in enumerate(v)
        ]
    return None, lambda a, v: []


def _each(answer: Answer, values: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [((answer.item, i), value) for i, value in enumerate(values) if value is not None]


def _share(outcomes: Sequence[bool | None]) -> dict[str, Any]:
    """{"share", "of"}: share of True among those that are not None."""
    known = [outcome for outcome in outcomes if outcome is not None]
    return {"share": sum(known) / len(known) if known else None, "of": len(known)}
