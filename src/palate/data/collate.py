"""Items to batches: right-padded rows, masks from lengths, group numbers from items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from palate.data.encode import NothingLeft, encode_records
from palate.data.formats.detect import check_kind
from palate.data.items import EncodeReport, Item, Pair, Row
from palate.types import Comparisons, Judgements, Rankings, Tokens

__all__ = ["EncodeReport", "Item", "NothingLeft", "Pair", "Row", "collate", "encode_records", "prompt_ids"]


def prompt_ids(items: Sequence[Item]) -> list[list[int]]:
    """The ids of each item's first row: of prompts, what a sampler starts from."""
    return [cast("list[int]", item.rows[0].ids.tolist()) for item in items]


def collate(items: Sequence[Item], kind: str) -> Tokens | Comparisons | Rankings | Judgements:
    """A batch of items.

    Args:
        items: at least one, made by ``encode_records`` for the same kind.
        kind: one of ``KINDS``.
    Returns:
        ``Tokens`` for prompts and demonstrations, else the kind's batch, on the CPU. Rows stand in the order of the
        items, items have the group numbers 0..n-1, padding is 0. ``tokens.extras`` holds "finished" (bool [N]: the
        response was not cut) and "records" (one a row), and of corrections "changed" (bool [N, T]: a token of what was
        changed). ``reference_logprobs`` is filled where every row knows its own.
    """
    check_kind(kind)
    tokens = _tokens(items)
    if kind in ("prompts", "demonstrations"):
        return tokens
    known = _reference_logprobs(items)
    if kind == "rankings":
        return Rankings(tokens, torch.tensor([rank for item in items for rank in item.ranks], dtype=torch.int64), known)
    if kind == "judgements":
        desirable = torch.tensor([good for item in items for good in item.desirable], dtype=torch.bool)
        return Judgements(tokens, desirable, known)
    first, pairs = 0, []
    for item in items:
        pairs += [(first + pair.chosen, first + pair.rejected, pair) for pair in item.pairs]
        first += len(item.rows)
    return Comparisons(
        tokens,
        chosen=torch.tensor([chosen for chosen, _, _ in pairs], dtype=torch.int64),
        rejected=torch.tensor([rejected for _, rejected, _ in pairs], dtype=torch.int64),
        weight=torch.tensor([pair.weight for _, _, pair in pairs], dtype=torch.float32),
        probability=_filled([pair.probability for _, _, pair in pairs], 1.0),
        margin=_filled([pair.margin for _, _, pair in pairs], 0.0),
        reference_logprobs=known,
    )


def _reference_logprobs(items: Sequence[Item]) -> Tensor | None:
    values = [row.reference_logprob for item in items for row in item.rows]
    return None if any(value is None for value in values) else torch.tensor(values, dtype=torch.float32)


def _filled(values: Sequence[float | None], missing: float) -> Tensor | None:
    if all(value is None for value in values):
        return None
    return torch.tensor([missing if value is None else value for value in values], dtype=torch.float32)


def _tokens(items: Sequence[Item]) -> Tokens:
    assert items, "a batch needs at least one item"
    rows = [row for item in items for row in item.rows]
    lengths = np.array([len(row.ids) for row in rows])
    width = max(1, int(lengths.max()))
    ids = np.zeros((len(rows), width), dtype=np.int64)
    response, changed = np.zeros((2, len(rows), width), dtype=np.bool_)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        response[i, : len(row.ids)] = row.response_mask
        if row.changed is not None:
            changed[i, : len(row.ids)] = row.changed
    marked = {"changed": torch.from_numpy(changed)} if any(row.changed is not None for row in rows) else {}
    return Tokens(
        ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(np.arange(width) < lengths[:, None]),
        response_mask=torch.from_numpy(response),
        group=torch.tensor([i for i, item in enumerate(items) for _ in item.rows], dtype=torch.int64),
        extras={
            "finished": torch.tensor([row.finished for row in rows], dtype=torch.bool),
            "records": [item.record for item in items for _ in item.rows],
            **marked,
        },
    )
