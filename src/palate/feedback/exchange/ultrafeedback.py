"""UltraFeedback -- Cui et al. 2023, arXiv:2310.01377: completions of an instruction with scores and rated aspects.

    {"source", "instruction", "models", "completions": [{"model", "response", "overall_score": number,
      "annotations": {aspect: {"Rating": "4", "Rationale": ...}}}, ...]}

Written by palate, an aspect holds a list with one rating for each annotator, {"Rating": "4", "annotator": "p-..."}, so
that single judgements are not lost; "overall_score" is then their mean. Read, such lists are each annotator's own
answer, and the published file's ratings those of one annotator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palate.data.files import rows
from palate.data.formats import fields
from palate.data.formats.ultrafeedback import SCORES
from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, needed, question_text
from palate.feedback.exchange.taken import UNKNOWN, Judged, Taken, written_by
from palate.feedback.task import Task

ORDER = "order"  # the aspect of a rank question: its "Rating" is the rank


def read(where: str | Path) -> Taken:
    taken = Taken("ultrafeedback")
    for source, row in rows(where):
        prompt = fields.text(row, "instruction", source)
        completions = fields.objects(row.get("completions") or [], "completions", source)
        texts = tuple(fields.text(each, "response", source) for each in completions)
        if len(texts) < 2:
            taken.left_out["with fewer than two completions"] += 1
            continue
        sources = tuple({"model": each["model"]} if each.get("model") else {} for each in completions)
        with written_by("UltraFeedback", source):
            by_person = _by_person(completions)
        scores = [_score(each) for each in completions]
        if not by_person.get(UNKNOWN, {}).get(ORDER) and list(by_person) in ([], [UNKNOWN]) and None not in scores:
            order = sorted(set(scores), reverse=True)  # type: ignore[type-var]
            by_person.setdefault(UNKNOWN, {})[ORDER] = [1 + order.index(score) for score in scores]
        for person, aspects in by_person.items():
            values = {
                _ask(taken, name, found): _value(name, found) for name, found in aspects.items() if None not in found
            }
            if values:
                taken.judged.append(Judged(prompt, texts, values, person, source, sources))
        if not by_person:
            taken.left_out["without scores"] += 1
    _same_scale(taken)
    return taken


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    """One line for each item; of the task's rating questions, or its ranking where it has none."""
    asked = needed(task, ("rating", "rank", "compare"), settings.question, "UltraFeedback")
    ratings = [q for q in task.questions if q.type == "rating"] if asked.type == "rating" else []
    lines = Lines()
    for group in views.by_item(given).values():
        instruction, first = question_text(group[0].prompt), group[0]
        if instruction is None:
            lines.left_out["items whose prompt is a conversation"] += 1
            continue
        completions = []
        for number, text in enumerate(first.responses):
            aspects: dict[str, list[dict[str, Any]]] = {}
            for answer in group:
                for question in ratings or [asked]:
                    rating = _rating(question, answer, number)
                    if rating is not None:
                        name = question.id if ratings else ORDER
                        aspects.setdefault(name, []).append({"Rating": str(rating), "annotator": answer.annotator})
            marks = [int(each["Rating"]) for each in aspects.get(asked.id if ratings else ORDER, [])]
            if not marks:
                continue
            mean = sum(marks) / len(marks)
            score = mean if ratings else len(first.responses) + 1 - mean
            model = str(first.sources[number].get("model") or "")
            completions.append({"model": model, "response": text, "annotations": aspects, "overall_score": score})
        if len(completions) < len(first.responses):
            lines.left_out["items with a response that nobody judged"] += 1
            continue
        models = [each["model"] for each in completions]
        lines.add(
            first.prompt,
            {"source": "palate", "instruction": instruction, "models": models, "completions": completions},
        )
    return lines


def _rating(question: Any, answer: views.Answer, number: int) -> int | None:
    value = answer.values.get(question.id)
    if value is None:
        return None
    if question.type == "rating":
        return value[number]  # type: ignore[no-any-return]
    ranks = question.ranks(value, len(answer.responses))
    return None if ranks is None else ranks[number]


def _by_person(completions: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """person -> aspect -> [rating of each completion, None where there is none]."""
    found: dict[str, dict[str, list[Any]]] = {}
    for number, completion in enumerate(completions):
        for aspect, entries in (completion.get("annotations") or {}).items():
            for entry in entries if isinstance(entries, list) else [entries]:
                if isinstance(entry, dict) and (rating := _whole(entry.get("Rating"))) is not None:
                    person = str(entry.get("annotator") or UNKNOWN)
                    marks = found.setdefault(person, {}).setdefault(aspect, [None] * len(completions))
                    marks[number] = rating
    return found


def _ask(taken: Taken, name: str, marks: Sequence[int]) -> str:
    if name == ORDER:
        return taken.ask(id=ORDER, type="rank", ties=True)
    slug = (
        "".join(c if c.isascii() and c.isalnum() else "_" for c in name.lower()).lstrip("0123456789_")[:40] or "rating"
    )
    known = next((q for q in taken.questions if q["id"] == slug), None)
    if known is None:
        return taken.ask(id=slug, type="rating", scale=max(5, *marks))
    known["scale"] = max(known["scale"], *marks)
    return slug


def _same_scale(taken: Taken) -> None:
    """Ratings beyond the largest scale that can be asked are left out, with their question."""
    for question in [q for q in taken.questions if q["type"] == "rating" and q["scale"] > 10]:
        taken.questions.remove(question)
        taken.left_out[f'the aspect "{question["id"]}": ratings up to {question["scale"]}'] += 1
        for each in taken.judged:
            each.values.pop(question["id"], None)


def _value(name: str, marks: list[int]) -> Any:
    if name != ORDER:
        return marks
    return [[i for i, mark in enumerate(marks) if mark == rank] for rank in sorted(set(marks))]


def _whole(value: Any) -> int | None:
    text = str(value).strip()
    return int(text) if text.isdecimal() and int(text) >= 1 else None


def _score(completion: dict[str, Any]) -> float | None:
    for name in SCORES:
        try:
            score = float(completion.get(name))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(score):
            return score
    return None
