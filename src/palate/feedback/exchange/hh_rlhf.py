"""Anthropic's HH-RLHF transcripts -- Bai et al. 2022, arXiv:2204.05862; who judged is not in them.

{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "\\n\\nHuman: ...\\n\\nAssistant: ..."}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.data.files import rows
from palate.data.formats import hh_rlhf
from palate.data.kinds import Comparison, PromptText, Unusable
from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, turns
from palate.feedback.exchange.taken import Judged, Taken
from palate.feedback.task import Task

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def read(where: str | Path) -> Taken:
    taken = Taken("hh_rlhf")
    name = taken.ask(id="better", type="compare", strengths=1, tie=True)
    for source, row in rows(where):
        try:
            (record,) = hh_rlhf.convert(row, "comparisons", source)
        except Unusable as error:
            taken.left_out[str(error).removeprefix(f"{source}: ").rstrip(".")] += 1
            continue
        assert isinstance(record, Comparison)
        texts = tuple(sorted((record.chosen, record.rejected)))
        value = {"choice": texts.index(record.chosen), "strength": 1}
        taken.judged.append(Judged(record.prompt, texts, {name: value}, place=source))
    return taken


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    """One line for each pair that an answer orders. Only what the transcript gives back is written: no system turns, no
    white space at the ends, no text that itself looks like a turn."""
    made = views.comparisons(given, task, question=settings.question)
    lines = Lines(left_out=made.left_out)
    for record in made.records:
        row = {name: transcript(record.prompt, getattr(record, name)) for name in ("chosen", "rejected")}
        wanted = tuple(turns(record.prompt))
        if all(_holds(row[name], wanted, getattr(record, name)) for name in row):
            lines.add(record.prompt, row)
        else:
            lines.left_out["pairs that a transcript of Human and Assistant cannot hold"] += 1
    return lines


def transcript(prompt: PromptText, response: str) -> str:
    """A conversation with its response as HH-RLHF writes it."""
    said = [*turns(prompt), {"role": "assistant", "content": response}]
    return "".join(f"\n\n{_SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in said)


def _holds(text: str, prompt: tuple[dict[str, Any], ...], response: str) -> bool:
    return hh_rlhf.parse(text) == (*prompt, {"role": "assistant", "content": response})
