"""UltraFeedback -- Cui et al. 2023, arXiv:2310.01377: several models' completions of an instruction, each with a score.

    {"instruction", "completions": [{"response", "overall_score" or "fine-grained_score": number, ...}, ...]}

Completions are ranked by their score, the highest first, equal scores tied. Records in which a completion has no score,
or which have fewer than two, are skipped with a count. (The binarized edition is read by ``trl``.)
"""

from __future__ import annotations

import math
from typing import Any

from palate.data.formats import fields
from palate.data.kinds import Demonstration, Prompt, Ranking, Record, Unusable, at
from palate.data.ranking import ratings_to_ranks

SCORES = ("overall_score", "fine-grained_score")


def detect(record: dict[str, Any]) -> bool:
    return "instruction" in record and isinstance(record.get("completions"), list)


def convert(record: dict[str, Any], kind: str, source: str) -> list[Record]:
    prompt = fields.text(record, "instruction", source)
    if kind == "prompts":
        return [Prompt(prompt, fields.others(record, "instruction", "completions"), source)]
    if kind == "judgements":
        raise fields.cannot("UltraFeedback", "rankings", kind, source)
    completions = fields.objects(fields.required(record, "completions", source), "completions", source)
    scores = [_score(completion, source) for completion in completions]
    responses = [fields.text(completion, "response", source) for completion in completions]
    if len(scores) < 2:
        raise Unusable(at(source, "fewer than two completions."))
    if kind == "demonstrations":
        return [Demonstration(prompt, responses[scores.index(max(scores))], source=source)]
    return [Ranking(prompt, tuple(responses), ratings_to_ranks(scores), source=source)]


def _score(completion: dict[str, Any], source: str) -> float:
    found = next((completion[name] for name in SCORES if completion.get(name) not in (None, "N/A")), None)
    try:
        score = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise Unusable(at(source, "a completion without a score."))
    return score
