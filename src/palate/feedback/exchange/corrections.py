"""Rewritten responses beside what they were, which several formats are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from palate.feedback.exchange.lines import Settings, needed
from palate.feedback.task import Task
from palate.feedback.views import Answer


def corrected(
    given: Sequence[Answer], task: Task, settings: Settings, what: str
) -> Iterator[tuple[Answer, int, str | None]]:
    """(answer, number of the response, the rewrite or None) of every response that somebody could have rewritten.

    Raises:
        ConfigError: the task asks for no rewrites.
    """
    asked = needed(task, ("rewrite",), settings.question, what)
    for answer in given:
        rewritten = answer.values.get(asked.id) or [None] * len(answer.responses)
        for number, text in enumerate(rewritten):
            yield answer, number, text
