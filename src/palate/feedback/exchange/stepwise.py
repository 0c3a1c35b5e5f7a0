"""Steps of a response with a label each: {"prompt", "completions": [text], "labels": [bool], "annotator"} (as in TRL).

Of a spans question: a response is cut after each line, or after each sentence where it is a single line, and a step is
good when no marked span touches it. The steps together are the response, character for character.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, needed, plain
from palate.feedback.task import Task

_LINE = re.compile(r"[^\n]*\n+|[^\n]+")
_SENTENCE = re.compile(r".+?(?:[.!?。！？]+[\"'”’)]*\s*|$)", re.DOTALL)


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    asked, lines = needed(task, ("spans",), settings.question, "stepwise"), Lines()
    for answer in given:
        marked = answer.values.get(asked.id) or [[] for _ in answer.responses]
        for text, spans in zip(answer.responses, marked, strict=True):
            steps = steps_of(text)
            if not steps:
                lines.left_out["empty responses"] += 1
                continue
            labels, start = [], 0
            for step in steps:
                end = start + len(step)
                labels.append(not any(span["start"] < end and start < span["end"] for span in spans))
                start = end
            row = {"prompt": plain(answer.prompt), "completions": steps, "labels": labels}
            lines.add(answer.prompt, row | {"annotator": answer.annotator})
    return lines


def steps_of(text: str) -> list[str]:
    """The lines of a text, or its sentences where it is one line; joined they are the text.

    >>> steps_of("One. Two!"), steps_of("a\\nb")
    (['One. ', 'Two!'], ['a\\n', 'b'])
    """
    lines = _LINE.findall(text)
    return lines if len(lines) > 1 else _SENTENCE.findall(text)
