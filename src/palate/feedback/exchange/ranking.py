"""Each annotator's ranking of an item: {"prompt", "responses", "ranks": [1 = best, equal = tie], "annotator"}."""

from __future__ import annotations

from collections.abc import Sequence

from palate.data.formats.palate import to_json
from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings
from palate.feedback.task import Task


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    made = views.rankings(given, task, question=settings.question)
    lines = Lines(left_out=made.left_out)
    for record in made.records:
        lines.add(record.prompt, to_json(record))
    return lines
