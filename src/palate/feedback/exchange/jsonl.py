"""Comparisons, rankings and judgements of any shape that palate reads, each as one annotator's answer.

Beside the fields of ``docs/data.md`` are read: "strength" of a preference (1, 2, ...), "seconds", "time"; and the
single answers that ``palate label export --as answers`` writes. A row that puts several people's answers together
("annotators" with more than one name, "p_chosen" or "probability" between the ends) is no judgement of anybody, and is
left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palate.data.files import rows
from palate.data.formats.detect import convert_record
from palate.data.kinds import Comparison, Judgement, Prompt, Ranking, Unusable, describe
from palate.errors import DataError
from palate.feedback.exchange.taken import UNKNOWN, Judged, Taken, written_by


def read(where: str | Path) -> Taken:
    taken = Taken("jsonl")
    for source, row in rows(where):
        if "values" in row and "responses" in row:
            with written_by("palate label export", source):
                _answer(row, source, taken)
            continue
        try:
            records = convert_record(row, _kind(row, source), source)
        except Unusable as error:
            taken.left_out[str(error).removeprefix(f"{source}: ").rstrip(".")] += 1
            continue
        for record in records:
            _judged(record, row, source, taken)
    return taken


def _kind(row: dict[str, Any], source: str) -> str:
    if "chosen" in row:
        return "comparisons"
    if "responses" in row or "completions" in row or "ranked_responses" in row:
        return "rankings"
    if "desirable" in row or isinstance(row.get("label"), bool):
        return "judgements"
    found = ", ".join(map(repr, row))
    raise DataError(
        f'{source}: nobody judged anything here. Found: {found}. Expected "chosen" and "rejected", "responses" and '
        '"ranks", or "response" and "desirable"; for prompts and responses alone leave out --from.'
    )


def _judged(record: Any, row: dict[str, Any], source: str, taken: Taken) -> None:
    people = row.get("annotators") or [row.get("annotator") or getattr(record, "annotator", None) or UNKNOWN]
    if not isinstance(people, list):
        raise DataError(f'{source}: "annotators" is {describe(people)}. Expected a list of names.')
    if len(people) > 1:
        taken.left_out["of several people together"] += 1
        return
    about: dict[str, Any] = {"annotator": str(people[0]), "place": source, "seconds": row.get("seconds")}
    about["time"] = row.get("time")
    if isinstance(record, Comparison):
        sure = record.probability if record.probability is not None else row.get("p_chosen")
        if sure not in (None, 0, 0.5, 1):
            taken.left_out["of several people together"] += 1
            return
        strengths = 3 if "strength" in row else 1
        name = taken.ask(id="better", type="compare", strengths=strengths, tie=True)
        texts = tuple(sorted((record.chosen, record.rejected)))
        choice = texts.index(record.rejected if sure == 0 else record.chosen)
        value = {"choice": "tie"} if sure == 0.5 else {"choice": choice, "strength": row.get("strength", 1)}
        taken.judged.append(Judged(record.prompt, texts, {name: value}, **about))
    elif isinstance(record, Ranking):
        name = taken.ask(id="order", type="rank", ties=True)
        taken.judged.append(Judged(record.prompt, record.responses, {name: _tiers(record.ranks)}, **about))
    elif isinstance(record, Judgement):
        name = taken.ask(id="good", type="accept")
        taken.judged.append(Judged(record.prompt, (record.response,), {name: [record.desirable]}, **about))


def _tiers(ranks: tuple[int, ...]) -> list[list[int]]:
    return [[i for i, r in enumerate(ranks) if r == rank] for rank in sorted(set(ranks))]


def _answer(row: dict[str, Any], source: str, taken: Taken) -> None:
    if row.get("purpose", "task") != "task":
        taken.left_out[f"of the purpose {row['purpose']}"] += 1
        return
    taken.judged.append(
        Judged(
            Prompt(row["prompt"], source=source).prompt,
            tuple(row["responses"]),
            dict(row["values"]),
            annotator=str(row.get("annotator") or UNKNOWN),
            place=source,
            sources=tuple(row.get("sources") or ()),
            id=str(row.get("event") or ""),
            seconds=row.get("seconds"),
            time=row.get("time"),
        )
    )
