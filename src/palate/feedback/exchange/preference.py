"""Pairs for reward models and DPO, in the shape that TRL and others read, with what is known of each label.

    {"prompt", "chosen", "rejected", "margin": number or null, "p_chosen": number or null, "annotators": ["p-..."]}

With labels "each" a row is one annotator's own preference, with its "strength" where one was asked; with "consensus" it
is one pair of responses, "p_chosen" the probability that a typical annotator prefers ``chosen`` and "margin" the
expected difference of scores in that annotator's logits (``feedback.consensus``). Conversational rows hold messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.data.kinds import Comparison
from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, plain, turns
from palate.feedback.learned import consensus
from palate.feedback.task import Task


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    lines = Lines()
    if settings.labels == "consensus":
        found = consensus(given, task, question=settings.question, margin=True)
        for pair in found.comparisons:
            people = (pair.annotator or "").split(", ")
            lines.add(pair.prompt, _row(pair, settings) | {"p_chosen": pair.probability, "annotators": people})
        for _, reason in found.left_out:
            lines.left_out[reason] += 1
        return lines
    strengths = {answer.place: _strength(answer) for answer in given}
    made = views.comparisons(given, task, question=settings.question, margins=settings.margins)
    for pair in made.records:
        strength = strengths[pair.source]
        more: dict[str, Any] = {"p_chosen": None, "annotators": [pair.annotator]}
        lines.add(pair.prompt, _row(pair, settings) | more | ({"strength": strength} if strength else {}))
    lines.left_out = made.left_out
    return lines


def _row(pair: Comparison, settings: Settings) -> dict[str, Any]:
    if not settings.conversational:
        row = {"prompt": plain(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
    else:
        sides = {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
        row = {"prompt": turns(pair.prompt), **sides}
    return row | {"margin": pair.margin}


def _strength(answer: views.Answer) -> int | None:
    found = [v["strength"] for v in answer.values.values() if isinstance(v, dict) and "strength" in v]
    return found[0] if found else None
