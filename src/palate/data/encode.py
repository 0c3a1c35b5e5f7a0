"""Records to items: grouped by prompt, tokenised, made to fit; every cut and every drop is counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from palate.data.chat import Chat, Encoded
from palate.data.formats.detect import check_kind
from palate.data.items import EncodeReport, Item, Pair, Row
from palate.data.kinds import (
    Comparison,
    Demonstration,
    Judgement,
    Prompt,
    PromptText,
    Ranking,
    Record,
    SegmentedComparison,
    Spans,
    at,
    prompt_key,
)
from palate.data.ranking import ordered_pairs
from palate.data.segments import found_spans
from palate.data.truncate import check_lengths, cut_prompt, prompt_room
from palate.errors import DataError

MAX_ROWS = 16  # rows an item of merged comparisons holds at most; an item is never cut into microbatches
_CHUNK = 1000  # groups tokenised at a time

_READS: dict[str, tuple[type, ...]] = {
    "prompts": (Prompt, Demonstration, Comparison, SegmentedComparison, Ranking, Judgement),
    "demonstrations": (Demonstration,),
    "comparisons": (Comparison, Ranking),
    "corrections": (SegmentedComparison,),
    "rankings": (Ranking,),
    "judgements": (Judgement,),
}

EMPTY, SAME, SAME_CUT = "empty response", "identical pair", "identical pair once cut"
NOTHING, TOO_LONG, TIED = "response cut to nothing", "too long", "all responses tied"


class NothingLeft(DataError):
    """Every record was dropped; the message counts why."""


@dataclass
class _Group:
    """Records of one prompt on their way to an item: distinct texts, and which record says what about them."""

    prompt: PromptText
    texts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    pairs: list[tuple[Record, Pair]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    spans: tuple[Spans, ...] | None = None  # of each text

    def row(self, text: str, source: str, *, merge: bool = True) -> int:
        """The number of a text's row, which is new unless the text is already there."""
        if merge and text in self.texts:
            return self.texts.index(text)
        self.texts.append(text)
        self.sources.append(source)
        return len(self.texts) - 1


def encode_records(
    records: Sequence[Record],
    kind: str,
    chat: Chat,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    truncate: str = "left_prompt",
) -> tuple[list[Item], EncodeReport]:
    """Tokenise records and make them fit.

    Comparisons of one prompt become one item in which every distinct response stands once (at most 16 rows; more make
    further items). A ranking is one item with all its untied pairs, each of weight 1/(number of pairs). A correction is
    one item of two rows, whose changed tokens are marked.

    Args:
        records: of the kind; "comparisons" takes ``Ranking`` records too, "prompts" any record.
        kind: one of ``KINDS``.
        max_length: tokens of prompt and response together, >= 2; for prompts, of the prompt.
        max_prompt_length: tokens of the prompt, or None = as many as the response leaves.
        truncate: "left_prompt" = cut the prompt's beginning until a quarter of ``max_length`` is left (oldest turns
            first, see ``truncate.cut_prompt``), then the response's end; "right" = cut the response's end only;
            "drop" = drop what is too long.
    Returns:
        (items in the order of the records, report of what was cut and dropped).
    Raises:
        DataError: records of another kind, a conversation that the template refuses, or no record left.
        ConfigError: lengths that leave no room.

    Judgements of one class only are a warning in the report, not an error: a small validation part may be so by chance.
    """
    check_kind(kind)
    check_lengths(max_length, None if kind == "prompts" else max_prompt_length, truncate)
    _check_types(records, kind)
    report = EncodeReport(kind, read=len(records), given=_given(records, kind))
    if kind == "prompts":
        limit = min(max_length, max_prompt_length or max_length)
        items = list(_prompt_items(records, chat, limit, truncate, report))
    else:
        fit = _Fit(chat, max_length, max_prompt_length, truncate, report)
        groups = list(_groups(records, report))
        items = []
        for start in range(0, len(groups), _CHUNK):
            part = groups[start : start + _CHUNK]
            for group, encoded in zip(part, _encoded(chat, part), strict=True):
                item = _item(group, fit.rows(group, encoded), report)
                items += [item] if item is not None else []
    _count(items, report)
    if not items:
        raise NothingLeft(f"no record is left to train on. {report}")
    return items, report


def _check_types(records: Sequence[Record], kind: str) -> None:
    for i, record in enumerate(records):
        if not isinstance(record, _READS[kind]):
            names = " and ".join(each.__name__ for each in _READS[kind])
            where = record.source or f"record {i + 1}"
            raise DataError(f"{where}: a {type(record).__name__}; {kind} are made of {names} records.")


def _groups(records: Sequence[Record], report: EncodeReport) -> Iterator[_Group]:
    """Records as groups, in the order of their first record; unusable ones are counted."""
    merged: dict[str, _Group] = {}
    groups: list[_Group] = []
    for record in records:
        if isinstance(record, Ranking):
            group = _ranking(record, report)
            groups += [group] if group is not None else []
        elif isinstance(record, Comparison):
            _add_comparison(record, merged, groups, report)
        elif isinstance(record, SegmentedComparison):
            group = _correction(record, report)
            groups += [group] if group is not None else []
        elif isinstance(record, Demonstration | Judgement):
            if not record.response.strip():
                report.drop(EMPTY, record.source)
                continue
            groups.append(_Group(record.prompt, [record.response], [record.source], records=[record]))
    yield from groups


def _ranking(record: Ranking, report: EncodeReport) -> _Group | None:
    kept = [i for i, response in enumerate(record.responses) if response.strip()]
    if len(kept) < 2:
        report.drop(EMPTY, record.source)
        return None
    if len(kept) < len(record.responses):
        report.thin(EMPTY, record.source)
    if not ordered_pairs([record.ranks[i] for i in kept]):
        report.drop(TIED, record.source)
        return None
    group = _Group(record.prompt, records=[record])
    for i in kept:
        group.row(record.responses[i], record.source, merge=False)
    group.pairs = [(record, Pair(a, b)) for a, b in ordered_pairs([record.ranks[i] for i in kept])]
    return group


def _add_comparison(record: Comparison, merged: dict[str, _Group], groups: list[_Group], report: EncodeReport) -> None:
    if not record.chosen.strip() or not record.rejected.strip():
        report.drop(EMPTY, record.source)
        return
    if record.chosen == record.rejected:
        report.drop(SAME, record.source)
        return
    key = prompt_key(record.prompt)
    group = merged.get(key)
    new = {record.chosen, record.rejected}.difference(group.texts if group else ())
    if group is None or len(group.texts) + len(new) > MAX_ROWS:
        group = merged[key] = _Group(record.prompt)
        groups.append(group)
    chosen, rejected = group.row(record.chosen, record.source), group.row(record.rejected, record.source)
    pair = Pair(chosen, rejected, probability=record.probability, margin=record.margin)
    group.pairs.append((record, pair))
    group.records.append(record)


def _correction(record: SegmentedComparison, report: EncodeReport) -> _Group | None:
    """Not merged with others of its prompt: the same text may be changed in other places there."""
    texts = [record.chosen, record.rejected]
    if not all(text.strip() for text in texts):
        report.drop(EMPTY, record.source)
        return None
    if record.chosen == record.rejected:
        report.drop(SAME, record.source)
        return None
    pairs: list[tuple[Record, Pair]] = [(record, Pair(0, 1))]
    return _Group(record.prompt, texts, [record.source] * 2, pairs, [record], found_spans(record))


def _encoded(chat: Chat, groups: Sequence[_Group]) -> list[Encoded]:
    every_turn = [isinstance(g.records[0], Demonstration) and g.records[0].every_turn for g in groups]
    marked = [g.spans for g in groups if g.spans is not None]  # of all of them, or of none
    try:
        return chat.encode_many([g.prompt for g in groups], [g.texts for g in groups], every_turn, marked or None)
    except DataError:
        # One of them cannot be written; again one by one, to say which.
        for group, every in zip(groups, every_turn, strict=True):
            _named(chat, group, every)
        raise


def _named(chat: Chat, group: _Group, every_turn: bool) -> None:
    try:
        chat.encode_many([group.prompt], [group.texts], [every_turn])
    except DataError as error:
        raise DataError(at(group.sources[0], str(error))) from None


@dataclass(frozen=True)
class _Fit:
    """Making the rows of a group fit, and counting what was cut."""

    chat: Chat
    max_length: int
    max_prompt_length: int | None
    truncate: str
    report: EncodeReport

    def rows(self, group: _Group, encoded: Encoded) -> list[Row | str]:
        """For each text its row, or why there is none."""
        responses, prompt, mask = encoded.responses, encoded.prompt, encoded.prompt_mask
        longest = max(len(ids) for ids in responses)
        if self.truncate == "drop":
            too_long = self.max_prompt_length is not None and len(prompt) > self.max_prompt_length
            left = -1 if too_long else self.max_length - len(prompt)
        else:
            room = prompt_room(len(prompt), longest, self.max_length, self.max_prompt_length, self.truncate)
            if room < len(prompt):
                prompt, mask = cut_prompt(self.chat, group.prompt, prompt, mask, room)
                self.report.truncated_prompt += 1
            left = self.max_length - len(prompt)
        changed: list[list[bool] | None] = [*encoded.changed] or [None] * len(responses)
        made = zip(responses, group.sources, encoded.rewritten, changed, strict=True)
        return [self._row(prompt, mask, ids, left, source, *facts) for ids, source, *facts in made]  # type: ignore

    def _row(
        self,
        prompt: list[int],
        mask: list[bool],
        ids: list[int],
        left: int,
        source: str,
        rewritten: bool,
        changed: list[bool] | None,
    ) -> Row | str:
        cut = len(ids) > left
        if cut and self.truncate == "drop":
            return TOO_LONG
        kept = ids[: max(left, 0)]
        if not kept:
            return NOTHING
        stops = self.chat.stop_token_ids
        self.report.truncated_response += cut
        self.report.rewritten += rewritten
        self.report.stop_in_text += any(stop in kept[: len(kept) - (not cut)] for stop in stops)
        return Row(
            np.array(prompt + kept, dtype=np.int32),
            np.array([*mask, *[True] * len(kept)], dtype=np.bool_),
            source,
            finished=not cut and bool(stops),
            changed=None if changed is None else np.array([*[False] * len(prompt), *changed[: len(kept)]], np.bool_),
        )


def _item(group: _Group, rows: list[Row | str], report: EncodeReport) -> Item | None:
    """The item of a group without the rows that could not be made; None, and a count, when nothing is left."""
    record = group.records[0]
    if isinstance(record, Comparison | SegmentedComparison) or (
        isinstance(record, Ranking) and report.kind == "comparisons"
    ):
        return _pairs_item(group, rows, report)
    number = {i: n for n, i in enumerate(i for i, row in enumerate(rows) if isinstance(row, Row))}
    lost = next((row for row in rows if isinstance(row, str)), "")
    kept = tuple(row for row in rows if isinstance(row, Row))
    if len(kept) < (2 if isinstance(record, Ranking) else 1):
        report.drop(lost, record.source)
        return None
    ranks: tuple[int, ...] = ()
    if isinstance(record, Ranking):
        given = [rank for response, rank in zip(record.responses, record.ranks, strict=True) if response.strip()]
        ranks = tuple(given[i] for i in number)
        nothing = _nothing_ranked(group, kept, ranks, list(number))
        if nothing:
            report.drop(nothing, record.source)
            return None
    if lost:
        report.thin(lost, record.source)
    report.kept += 1
    if isinstance(record, Ranking):
        return Item(kept, ranks=ranks, record=record)
    desirable = (record.desirable,) if isinstance(record, Judgement) else ()
    return Item(kept, desirable=desirable, record=record)


def _nothing_ranked(group: _Group, rows: Sequence[Row], ranks: Sequence[int], texts: Sequence[int]) -> str:
    """Why a ranking's rows say nothing about a preference: no two of them differ both in rank and in tokens; or ""."""
    pairs = ordered_pairs(ranks)
    if not pairs:
        return TIED
    if any(not np.array_equal(rows[a].ids, rows[b].ids) for a, b in pairs):
        return ""
    return SAME if len({group.texts[i].strip() for i in texts}) == 1 else SAME_CUT


def _pairs_item(group: _Group, rows: list[Row | str], report: EncodeReport) -> Item | None:
    """An item of the pairs whose rows are both there and differ."""
    valid: list[tuple[Record, Pair]] = []
    losses: dict[int, str] = {}
    for record, pair in group.pairs:
        chosen, rejected = rows[pair.chosen], rows[pair.rejected]
        lost = next((row for row in (chosen, rejected) if isinstance(row, str)), None)
        if lost is None and np.array_equal(cast(Row, chosen).ids, cast(Row, rejected).ids):
            lost = SAME if group.texts[pair.chosen].strip() == group.texts[pair.rejected].strip() else SAME_CUT
        if lost is None:
            valid.append((record, pair))
        else:
            losses.setdefault(id(record), lost)
    survivors = {id(record) for record, _ in valid}
    for record in group.records:
        if id(record) not in survivors:
            report.drop(losses[id(record)], record.source)
        elif id(record) in losses:
            report.thin(losses[id(record)], record.source)
    report.kept += len(survivors)
    if not valid:
        return None
    used = sorted({number for _, pair in valid for number in (pair.chosen, pair.rejected)})
    place = {old: new for new, old in enumerate(used)}
    # The pairs of one ranking are one piece of evidence (InstructGPT, arXiv:2203.02155, 3.5); comparisons are each one.
    weight = 1.0 / len(valid) if isinstance(group.records[0], Ranking) else 1.0
    pairs = [
        pair._replace(chosen=place[pair.chosen], rejected=place[pair.rejected], weight=weight) for _, pair in valid
    ]
    record = next(record for record in group.records if id(record) in survivors)
    return Item(tuple(cast(Row, rows[number]) for number in used), pairs=tuple(pairs), record=record)


def _prompt_items(
    records: Sequence[Any], chat: Chat, limit: int, truncate: str, report: EncodeReport
) -> Iterator[Item]:
    for start in range(0, len(records), _CHUNK):
        part = records[start : start + _CHUNK]
        try:
            found = chat.encode_prompts([record.prompt for record in part])
        except DataError:
            for record in part:
                _named(chat, _Group(record.prompt, sources=[record.source]), False)
            raise
        for record, ids in zip(part, found, strict=True):
            if len(ids) > limit and truncate == "drop":
                report.drop(TOO_LONG, record.source)
                continue
            if len(ids) > limit:
                ids, _ = cut_prompt(chat, record.prompt, ids, [False] * len(ids), limit)
                report.truncated_prompt += 1
            report.kept += 1
            row = Row(np.array(ids, dtype=np.int32), np.zeros(len(ids), dtype=np.bool_), record.source, finished=False)
            yield Item((row,), record=record)


def _given(records: Sequence[Record], kind: str) -> str:
    """What the records are called, for the report."""
    if kind != "comparisons":
        return kind
    ranked = sum(isinstance(record, Ranking) for record in records)
    return "rankings" if ranked == len(records) else "comparisons and rankings" if ranked else kind


def _count(items: Sequence[Item], report: EncodeReport) -> None:
    report.items = len(items)
    report.rows = sum(len(item.rows) for item in items)
    report.pairs = sum(len(item.pairs) for item in items)
    report.tokens = sum(item.length for item in items)
    classes = {good for item in items for good in item.desirable}
    if len(classes) == 1:
        which, other = ("desirable", "undesirable") if True in classes else ("undesirable", "desirable")
        report.warnings.append(
            f"all {report.kept:,} judgements are {which}: one class only teaches nothing but its own likelihood. "
            f"Add {other} ones."
        )
