"""Responses that are good or not: {"prompt", "completion", "label": bool, "annotator"} (TRL's unpaired preference).

Of an accept or flags question; where the task asks none, a preferred response counts as desirable and the other one as
undesirable, as Ethayarajh et al. 2024 (arXiv:2402.01306, section 4.1) make unpaired data of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, plain, question_of, turns
from palate.feedback.task import Task


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    types = ("accept", "flags", "rank", "compare", "rating")
    asked = question_of(task, types, settings.question)
    if asked is None or asked.type in ("accept", "flags"):
        made = views.judgements(given, task, question=settings.question)
        lines = Lines(left_out=made.left_out)
        for record in made.records:
            lines.add(record.prompt, _row(record.prompt, record.response, record.desirable, record.annotator, settings))
        return lines
    made = views.comparisons(given, task, question=settings.question)
    lines = Lines(left_out=made.left_out)
    for pair in made.records:
        for text, good in ((pair.chosen, True), (pair.rejected, False)):
            lines.add(pair.prompt, _row(pair.prompt, text, good, pair.annotator, settings))
    return lines


def _row(prompt: Any, text: str, good: bool, annotator: str | None, settings: Settings) -> dict[str, Any]:
    if settings.conversational:
        row: dict[str, Any] = {"prompt": turns(prompt), "completion": [{"role": "assistant", "content": text}]}
    else:
        row = {"prompt": plain(prompt), "completion": text}
    return row | {"label": good, "annotator": annotator}
