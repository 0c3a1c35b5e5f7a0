"""Rewrites to imitate: {"prompt", "completion"}, or conversational {"messages"} (TRL, OpenAI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.feedback.exchange.corrections import corrected
from palate.feedback.exchange.lines import Lines, Settings, plain, turns
from palate.feedback.task import Task
from palate.feedback.views import Answer


def write(given: Sequence[Answer], task: Task, settings: Settings) -> Lines:
    lines = Lines()
    for answer, _, rewrite in corrected(given, task, settings, "SFT"):
        if rewrite is None:
            lines.left_out["responses left as they were"] += 1
            continue
        row: dict[str, Any] = {"prompt": plain(answer.prompt), "completion": rewrite}
        if settings.conversational:
            row = {"messages": [*turns(answer.prompt), {"role": "assistant", "content": rewrite}]}
        lines.add(answer.prompt, row)
    return lines
