"""Encoded items as a few flat arrays and back: the same items, to the bit, about the same records.

Of a record nothing is kept but its number: whoever unpacks has read the records anew, with all that may be wrong with them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from palate.data.items import EncodeReport, Item, Pair, Row

Arrays = Mapping[str, npt.NDArray[Any]]


def packed(items: Sequence[Item], report: EncodeReport, records: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
    """Arrays that hold items and their report.

    Args:
        records: those that the items were made of; a row's ``source`` is that of one of them.
    """
    rows = [row for item in items for row in item.rows]
    number = {id(record): i for i, record in enumerate(records)}
    place = {record.source: i for i, record in enumerate(records)}
    changed = [row.changed for row in rows if row.changed is not None]
    # JSON keeps what the numbers of a pair are: a margin of 2 stays a whole number, 0.1 the same float.
    facts = {
        "report": dataclasses.asdict(report),
        "pairs": [item.pairs for item in items],
        "ranks": [item.ranks for item in items],
        "desirable": [item.desirable for item in items],
    }
    return {
        "ids": np.concatenate([row.ids for row in rows]),
        "length": np.array([len(row.ids) for row in rows], dtype=np.int64),
        "mask": np.packbits(np.concatenate([row.response_mask for row in rows])),
        "changed": np.packbits(np.concatenate(changed) if changed else np.zeros(0, dtype=np.bool_)),
        "has_changed": np.array([row.changed is not None for row in rows]),
        "finished": np.array([row.finished for row in rows]),
        "source": np.array([place[row.source] for row in rows], dtype=np.int64),
        "rows": np.array([len(item.rows) for item in items], dtype=np.int64),
        "record": np.array([number[id(item.record)] for item in items], dtype=np.int64),
        "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
    }


def unpacked(arrays: Arrays, records: Sequence[Any]) -> tuple[list[Item], EncodeReport]:
    """What ``packed`` was given, about records equal to those."""
    facts = json.loads(arrays["facts"].tobytes())
    rows = _rows(arrays, records)
    firsts = list(accumulate(arrays["rows"].tolist(), initial=0))
    told = zip(pairwise(firsts), facts["pairs"], facts["ranks"], facts["desirable"], arrays["record"], strict=True)
    items = [
        Item(tuple(rows[a:b]), tuple(Pair(*pair) for pair in pairs), tuple(ranks), tuple(desirable), records[number])
        for (a, b), pairs, ranks, desirable, number in told
    ]
    return items, EncodeReport(**facts["report"])


def _rows(arrays: Arrays, records: Sequence[Any]) -> list[Row]:
    lengths, has_changed = arrays["length"], arrays["has_changed"]
    bounds = list(accumulate(lengths.tolist(), initial=0))
    mask = np.unpackbits(arrays["mask"], count=bounds[-1]).view(np.bool_)
    marked = int(lengths[has_changed].sum())
    changed = np.unpackbits(arrays["changed"], count=marked).view(np.bool_)
    rows, read = [], 0
    facts = zip(pairwise(bounds), arrays["source"].tolist(), arrays["finished"].tolist(), has_changed, strict=True)
    for (start, end), source, finished, has in facts:
        own = changed[read : read + end - start] if has else None
        read += end - start if has else 0
        rows.append(Row(arrays["ids"][start:end], mask[start:end], records[source].source, finished, own))
    return rows
