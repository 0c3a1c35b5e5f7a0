"""Corrections with the weight of every token, for dense DPO -- Yu et al. 2023, arXiv:2312.00849, equation 3.

    {"prompt", "chosen", "rejected", "chosen_spans": [[start, end]], "rejected_spans": [[start, end]], "gamma",
     "annotator", and with a tokenizer "chosen_ids", "chosen_weights", "rejected_ids", "rejected_weights"}

Spans are what the rewrite changed (``data.segments``), which makes the lines palate's own corrections. A changed token
weighs gamma, any other 1; a response's log-probability is then sum(weight * log p) / sum(weight). The last weight is that
of the end of the text, which has no id here. Ids go with the weights, because two tokenizers cut differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.data.kinds import Spans
from palate.data.segments import changed_spans, changed_tokens
from palate.errors import ConfigError
from palate.feedback.exchange.corrections import corrected
from palate.feedback.exchange.lines import Lines, Settings, plain
from palate.feedback.task import Task
from palate.feedback.views import Answer


def write(given: Sequence[Answer], task: Task, settings: Settings) -> Lines:
    lines, tokenizer = Lines(), _tokenizer(settings.tokenizer)
    for answer, number, rewrite in corrected(given, task, settings, "DDPO"):
        if rewrite is None:
            lines.left_out["responses left as they were"] += 1
            continue
        rejected = answer.responses[number]
        spans = dict(zip(("chosen", "rejected"), changed_spans(rewrite, rejected), strict=True))
        row: dict[str, Any] = {"prompt": plain(answer.prompt), "chosen": rewrite, "rejected": rejected}
        row |= {f"{side}_spans": [list(span) for span in found] for side, found in spans.items()}
        row |= {"gamma": settings.gamma, "annotator": answer.annotator}
        if tokenizer is not None:
            for side, found in spans.items():
                ids, weights = token_weights(tokenizer, row[side], found, settings.gamma)
                row |= {f"{side}_ids": ids, f"{side}_weights": weights}
        lines.add(answer.prompt, row)
    return lines


def token_weights(tokenizer: Any, text: str, spans: Spans, gamma: float) -> tuple[list[int], list[float]]:
    """Ids of a text, [T], and weights [T + 1] of them and of its end: ``gamma`` where something was changed, else 1.

    Raises:
        ConfigError: the tokenizer cannot say where its tokens are.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            "this tokenizer does not say where its tokens lie in the text. Take one with a tokenizer.json."
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    changed = changed_tokens(found["offset_mapping"], spans, then=1)
    weights = [gamma if each else 1.0 for each in changed]
    return list(found["input_ids"]), weights


def _tokenizer(where: str | None) -> Any:
    if where is None:
        return None
    from palate.models.load import load_tokenizer

    return load_tokenizer(where)
