"""Corrections in the shape of the RLHF-V data set -- Yu et al. 2023, arXiv:2312.00849.

    {"ds_name", "image_path", "text": JSON text of {"question", "chosen", "rejected"}, "origin_dataset", "idx", ...}

``chosen`` is the rewrite, ``rejected`` the model's text. ``image_path`` names the picture by its content hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from palate.data.files import rows
from palate.data.formats import rlhf_v
from palate.data.kinds import Comparison
from palate.feedback.exchange.corrections import corrected
from palate.feedback.exchange.lines import Lines, Settings, as_json, question_text
from palate.feedback.exchange.taken import Judged, Taken
from palate.feedback.task import Task
from palate.feedback.views import Answer


def read(where: str | Path) -> Taken:
    """Text only: a record with a picture keeps its question and answers."""
    taken = Taken("rlhf_v")
    name = taken.ask(id="correction", type="rewrite", required=False)
    for source, row in rows(where):
        (record,) = rlhf_v.convert(row, "comparisons", source)
        assert isinstance(record, Comparison)
        prompt, chosen, rejected = record.prompt, record.chosen, record.rejected
        who = str(row.get("annotator") or "unknown")
        taken.judged.append(Judged(prompt, (rejected,), {name: [chosen]}, who, source, id=str(row.get("idx", ""))))
    return taken


def write(given: Sequence[Answer], task: Task, settings: Settings) -> Lines:
    lines = Lines()
    for answer, number, rewrite in corrected(given, task, settings, "RLHF-V"):
        question = question_text(answer.prompt)
        if rewrite is None:
            lines.left_out["responses left as they were"] += 1
        elif question is None:
            lines.left_out["prompts that are conversations"] += 1
        else:
            text = {"question": question, "chosen": rewrite, "rejected": answer.responses[number]}
            row = {"ds_name": "palate", "image_path": answer.images[0] if answer.images else "", "text": as_json(text)}
            row |= {"origin_dataset": answer.place, "origin_split": "", "annotator": answer.annotator}
            lines.add(answer.prompt, row | {"idx": len(lines.lines)})
    return lines
