"""What collating works on: a row of ids, an item of rows that answer one prompt, and the report of how they came about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt with one response.

    Attributes:
        ids: int32 [T], prompt and response.
        response_mask: bool [T], True = a token that the policy answers for; never True in column 0.
        source: "file:line" of the record.
        finished: the response ends with its stop token (it was not cut).
        changed: bool [T], True = a token of what was changed; None where nothing says so (all but corrections).
        reference_logprob: log p(response | prompt) of a frozen reference, nats; None = it is asked when it is needed.
    """

    ids: npt.NDArray[np.int32]
    response_mask: npt.NDArray[np.bool_]
    source: str = ""
    finished: bool = True
    changed: npt.NDArray[np.bool_] | None = None
    reference_logprob: float | None = None


class Pair(NamedTuple):
    """Of two rows of an item, ``chosen`` is the better."""

    chosen: int
    rejected: int
    weight: float = 1.0
    probability: float | None = None
    margin: float | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One prompt with all its responses: what stays together in a batch, and gets one group number.

    Attributes:
        rows: the responses; for prompts one row without a response.
        pairs: which row is better than which (comparisons, corrections).
        ranks: one a row, 1 = best (rankings).
        desirable: one a row (judgements).
        record: the record that the rows came from, the first where several were merged.
    """

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()
    ranks: tuple[int, ...] = ()
    desirable: tuple[bool, ...] = ()
    record: Any = None

    @property
    def length(self) -> int:
        """Real tokens of all rows."""
        return sum(len(row.ids) for row in self.rows)


@dataclass
class EncodeReport:
    """What became of the records that were encoded.

    Attributes:
        kind: of the records.
        read, kept: records given, records of which something is trained on.
        items, rows, pairs, tokens: what was made of them.
        truncated_prompt: prompts cut at their beginning (rows of one prompt count once).
        truncated_response: responses cut at their end; they have no stop token.
        rewritten: responses that the template would have changed (``Chat.encode_many``); they stand as they are.
        stop_in_text: responses that hold a stop token before their end, because their text quotes it.
        dropped: for each reason the sources of the records that were dropped.
        thinned: for each reason the sources of records that lost a response or a pair and were kept.
        warnings: what makes these records unfit as a whole, e.g. judgements of one class only.
        given: what they are called where that is not ``kind``: comparisons may be made of rankings.
    """

    kind: str
    read: int = 0
    kept: int = 0
    items: int = 0
    rows: int = 0
    pairs: int = 0
    tokens: int = 0
    truncated_prompt: int = 0
    truncated_response: int = 0
    rewritten: int = 0
    stop_in_text: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    thinned: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    given: str = ""

    def drop(self, reason: str, source: str) -> None:
        self.dropped.setdefault(reason, []).append(source)

    def thin(self, reason: str, source: str) -> None:
        self.thinned.setdefault(reason, []).append(source)

    @property
    def dropped_count(self) -> int:
        return sum(len(sources) for sources in self.dropped.values())

    def counts(self) -> dict[str, Any]:
        """All numbers, for a run's files."""
        names = ("read", "kept", "items", "rows", "pairs", "tokens", "truncated_prompt", "truncated_response")
        numbers = {name: getattr(self, name) for name in (*names, "rewritten", "stop_in_text")}
        reasons = {
            name: {why: len(where) for why, where in getattr(self, name).items()} for name in ("dropped", "thinned")
        }
        return {"kind": self.kind, **numbers, **reasons, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        parts = [(self.items, "prompts"), (self.tokens, "tokens")]
        if self.kind in ("comparisons", "corrections"):
            parts.insert(1, (self.pairs, "pairs"))
        if self.kind != "prompts":
            parts.insert(1, (self.rows, "responses"))
        made = ", ".join(_counted(*part) for part in parts)
        lines = [f"{_counted(self.read, self.given or self.kind)} read, {self.kept:,} kept: {made}."]
        cut = [
            (self.truncated_prompt, "prompts cut at the beginning"),
            (self.truncated_response, "responses cut at the end (without stop token)"),
            (self.rewritten, "responses that the template would have changed, kept as they are"),
            (self.stop_in_text, "responses with a stop token inside their text"),
        ]
        said = [_counted(count, what) for count, what in cut if count]
        said += [f"{len(where):,} kept in part: {why} ({_first(where)})" for why, where in self.thinned.items()]
        if self.dropped:
            said.append(f"{self.dropped_count:,} dropped: {_reasons(self.dropped)}")
        if said:
            lines.append("; ".join(said) + ".")
        return "\n".join(lines + [f"Warning: {warning}" for warning in self.warnings])


def _counted(count: int, what: str) -> str:
    """``2 prompts cut``, ``1 prompt cut``: the first word of ``what`` is a plural."""
    return f"{count:,} {what}" if count != 1 else "1 " + re.sub(r"^(\w+)s\b", r"\1", what)


def _reasons(found: Mapping[str, list[str]]) -> str:
    return ", ".join(f"{len(where):,} {why} ({_first(where)})" for why, where in found.items())


def _first(sources: list[str], count: int = 3) -> str:
    named = [source or "no source" for source in sources[:count]]
    return ", ".join(named) + (", ..." if len(sources) > count else "")
