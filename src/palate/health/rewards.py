"""What a run's reward is made of, as its settings say: what judges, what is watched only, what a program can check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palate.health.alarm import History, Line, having
from palate.models.rewards.spec import KINDS, kind_of, long_form

LEARNED = {"model", "classifier", "ensemble", "url"}
CHECKED = {"check", "length"}
RIGHT_OR_WRONG = 1e-3  # of a variance: how near it must be to that of zeros and ones
MASTERED = 0.9  # share of the highest score


def parts(history: History) -> dict[str, Mapping[str, Any]]:
    """The parts of the reward by name; "" of a reward that is one."""
    whole: Any = history.settings.get("reward")
    if isinstance(whole, Sequence) and not isinstance(whole, str):
        found = [(str(n), long_form(part)) for n, part in enumerate(whole)]
        return {str(part.get("name", n)): part for n, part in found if isinstance(part, Mapping)}
    if whole is None:
        whole = _nested(history.settings)
    whole = long_form(whole)
    if not isinstance(whole, Mapping):  # a function, in a loop of one's own
        return {}
    if kind_of(whole) is not None:
        return {"": whole}
    named = {name: long_form(part) for name, part in whole.items()}
    return {name: part for name, part in named.items() if isinstance(part, Mapping)}


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings below ``reward``, which come by dotted key."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        first, *path = key.split(".")
        if first == "reward" and path:
            place = tree
            for name in path[:-1]:
                place = place.setdefault(name, {})
            place[path[-1]] = value
    return tree


def watched(history: History) -> list[str]:
    """Names of the parts that are measured and not trained on (weight 0), but for a cost that the method itself weighs.

    Where no settings say what the reward is made of, "gold".
    """
    known, cost = parts(history), history.settings.get("method.cost")
    if not known:
        return ["gold"]
    return [name for name, part in known.items() if name and part.get("weight") == 0 and name != cost]


def kinds(history: History) -> set[str]:
    """What gives the parts that are trained on: a model, a function, a check, ..."""
    trained = [part for part in parts(history).values() if part.get("weight", 1) != 0]
    return {kind for part in trained for kind in KINDS if kind in part}


def is_learned(history: History) -> bool:
    """Is a model among what is trained on, which can be wrong where it has seen nothing?"""
    return bool(kinds(history) & LEARNED)


def says_right_or_wrong(history: History, lines: Sequence[Line]) -> bool:
    """Is there a right answer: do checks (and a price of length) give the score, or is every score 0 or 1?

    Zeros and ones of mean m have the variance m (1 - m), and nothing else within [0, 1] has so much.
    """
    if "check" in kinds(history) and kinds(history) <= CHECKED:
        return True
    lines = having(lines, "score", "score/std")
    gaps = [line["score/std"] ** 2 - line["score"] * (1 - line["score"]) for line in lines]
    return bool(lines) and max(map(abs, gaps)) < RIGHT_OR_WRONG


def is_mastered(history: History, lines: Sequence[Line]) -> bool:
    """Is nearly every answer right, so that there is nothing left to learn?"""
    lines = having(lines, "score")
    if not lines or not says_right_or_wrong(history, lines):
        return False
    most = sum(
        part.get("weight", 1) for part in parts(history).values() if "check" in part and part.get("weight", 1) > 0
    )
    return sum(line["score"] for line in lines) / len(lines) >= MASTERED * (most or 1)
