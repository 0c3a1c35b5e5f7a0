"""Records for a stage: read, refused when they are of another kind, split by prompt, encoded with an account."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.data.collate import Item, NothingLeft
from palate.data.ranking import (
    comparison_to_judgements,
    comparison_to_ranking,
    ranking_to_judgements,
    split_by_prompt,
)
from palate.data.records import KINDS, Comparison, Prompt, Ranking, Record, read_records
from palate.errors import ConfigError, DataError
from palate.feedback.learned import Learned, is_store, learn
from palate.lookup import find_method, method_names
from palate.stage.token_cache import encode_or_recall
from palate.stage.user_cache import cache_folder

Say = Callable[[str], None]
MOST_PARTICULAR = ("rankings", "comparisons", "judgements", "demonstrations")
ANSWERS = {"response", "chosen", "rejected", "responses", "ranks", "desirable"}


class Sides(NamedTuple):
    """Records or items to train on and to evaluate on."""

    train: list[Any]
    validation: list[Any]


def _unsaid(text: str) -> None:
    pass


def read_sides(config: RunConfig, origin: Say = _unsaid) -> Sides:
    """The records of ``data.train``, and of ``data.validation`` or a share of the prompts of ``data.train``.

    Args:
        origin: told, for each store of feedback, which of its events the records are from.
    Raises:
        DataError: a file is missing or malformed, holds records of a kind that the method does not read, or facts that
            it has no place for.
    """
    data, kind = config.data, config.method.settings.reads
    if data.labels != "each" and not is_store(str(data.train)):
        raise ConfigError(
            f"data.labels={data.labels}: {data.train} is no store of feedback, whose answers could be put together."
        )
    train = _read(config, str(data.train), kind, data.limit, origin)
    _refuse_facts(config, train)
    if data.validation is not None:
        validation = _read(config, data.validation, kind, None, origin)
        _refuse_facts(config, validation)
        return Sides(train, validation)
    return Sides(*split_by_prompt(train, data.validation_fraction, config.training.seed, by=data.split_by))


def _read(config: RunConfig, where: str, kind: str, limit: int | None, origin: Say) -> list[Record]:
    data = config.data
    if is_store(where):
        learned = _learn(config, where, kind, limit)
        origin(learned.origin)
        return (
            learned.records if data.prompt_words is None else [opening(r, data.prompt_words) for r in learned.records]
        )
    if where.endswith(".db") and not Path(where).is_file():
        raise DataError(
            f"{where}: no such store of feedback. Make one with: palate label import {where} RESPONSES.jsonl"
        )
    try:
        records = read_records(
            where, kind, format=data.format, split=data.split, limit=limit, rename=data.rename or None
        )
        return records if data.prompt_words is None else [opening(record, data.prompt_words) for record in records]
    except DataError as error:
        other = None if where == "-" else kind_of(where, format=data.format, split=data.split, but=kind)
        if other is None:
            raise
        if (kind, other) == ("rankings", "comparisons"):
            pairs = read_records(
                where, other, format=data.format, split=data.split, limit=limit, rename=data.rename or None
            )
            return [pair if isinstance(pair, Ranking) else comparison_to_ranking(pair) for pair in pairs]  # type: ignore
        if kind == "judgements" and other in ("rankings", "comparisons"):
            found = read_records(
                where, "comparisons", format=data.format, split=data.split, limit=limit, rename=data.rename or None
            )
            return _as_judgements(where, found)
        readers = [name for name in method_names() if find_method(name).METHOD.reads == other]
        others = f" Methods that read {other}: {', '.join(readers)}." if readers else ""
        raise DataError(
            f"{error}\n{config.method.name} reads {kind}, and {where} looks like {other}.{others}"
        ) from None


def _learn(config: RunConfig, where: str, kind: str, limit: int | None) -> Learned:
    """The records of a store of feedback; settings of files say nothing about it."""
    data = config.data
    given = {"format": data.format != "auto", "rename": bool(data.rename), "split": data.split != "train"}
    for name, set_ in given.items():
        if set_:
            raise ConfigError(f"data.{name}: {where} is a store of feedback, not a file of records. Leave it out.")
    return learn(where, kind, labels=data.labels, limit=limit)


def _as_judgements(where: str, records: list[Record]) -> list[Record]:
    """Rankings and comparisons as judgements, and a line that says so.

    Raises:
        DataError: all are tied.
    """
    found: list[Record] = []
    for record in records:
        if isinstance(record, Ranking):
            found += ranking_to_judgements(record)
        elif isinstance(record, Comparison):
            found += comparison_to_judgements(record)
    if not found:
        raise DataError(f"{where}: no judgement can be made of it; in every ranking all responses are tied.")
    kind = "rankings" if isinstance(records[0], Ranking) else "comparisons"
    left = sum(len(r.responses) if isinstance(r, Ranking) else 2 for r in records) - len(found)
    warnings.warn(
        f"{where}: {len(records):,} {kind} are read as {len(found):,} judgements: the best is desirable, the worst "
        f"undesirable; {left:,} responses between them or tied are left out. Better than another is not good: real "
        "judgements say more.",
        stacklevel=2,
    )
    return found


def _refuse_facts(config: RunConfig, records: list[Record]) -> None:
    """Before any work: the first record with a fact ("margin", "probability") that the method says it refuses."""
    method = config.method
    for fact in getattr(method.settings, "refuses", ()):
        plain = {"margin": (None, 0), "probability": (None, 1)}[fact]
        for record in records:
            if isinstance(record, Comparison) and getattr(record, fact) not in plain:
                known = {name: find_method(name).METHOD for name in method_names()}
                readers = {name: each for name, each in known.items() if each.reads == "comparisons"}
                fit = [name for name, each in readers.items() if fact not in getattr(each, "refuses", ())]
                raise DataError(
                    f'{record.source}: the comparison has a "{fact}", and {method.name} has no place for it. Remove '
                    f"that field, or take a method that uses it: {', '.join(fit)}."
                )


def opening(record: Record, words: int) -> Record:
    """A prompt that is plain text, cut to its first words, without white space after them; anything else as it is."""
    if not isinstance(record, Prompt) or not isinstance(record.prompt, str):
        return record
    kept = re.match(rf"\s*\S+(?:\s+\S+){{0,{words - 1}}}", record.prompt)
    return replace(record, prompt=kept.group()) if kept else record


def kind_of(where: str, *, format: str = "auto", split: str = "train", but: str = "") -> str | None:
    """The most particular kind as which the first record can be read; None without one, or where ``but`` can be read."""
    if but and _first(where, but, format, split) is not None:
        return None
    for kind in MOST_PARTICULAR:
        if _first(where, kind, format, split) is not None:
            return kind
    # Any object with a prompt can be read as one; it is meant as one only where nothing in it answers the prompt.
    prompt = _first(where, "prompts", format, split)
    return "prompts" if isinstance(prompt, Prompt) and not ANSWERS & prompt.fields.keys() else None


def kinds_of(where: str, *, format: str = "auto", split: str = "train") -> list[str]:
    """Every kind as which a method may read the file, by its first record; what is made of another kind included."""
    found = [kind for kind in KINDS if kind != "prompts" and _first(where, kind, format, split) is not None]
    if "comparisons" in found:
        found += [kind for kind in ("rankings", "judgements") if kind not in found]
    prompt = _first(where, "prompts", format, split)
    # Any record has a prompt to respond to.
    return [*found, "prompts"] if prompt is not None else found


def _first(where: str, kind: str, format: str, split: str) -> Record | None:
    try:
        return read_records(where, kind, format=format, split=split, limit=1)[0]
    except DataError:
        return None


def encode_sides(config: RunConfig, sides: Sides, chat: Chat, say: Say, aside: Say = _unsaid) -> Sides:
    """Items of both sides; what was cut and dropped is said.

    Args:
        say: told what became of the records, the same every time. aside: told when their tokens come from the cache.
    Raises:
        DataError: nothing is left to train on.
    """
    kind, data = config.method.settings.reads, config.data
    found: list[list[Item]] = []
    for name, records in (("train", sides.train), ("validation", sides.validation)):
        if not records:
            found.append([])
            say(f"{name:<11}none held out" if name == "validation" else f"{name:<11}nothing")
            continue
        try:
            items, report, from_cache = encode_or_recall(
                records,
                kind,
                chat,
                cache_folder(str(data.cache), "tokens"),
                max_length=data.max_length or 0,
                max_prompt_length=data.max_prompt_length,
                truncate=data.truncate,
            )
        except NothingLeft as error:
            where = data.validation or data.train if name == "validation" else data.train
            raise NothingLeft(f"{where} ({name}): {error}") from None
        say(f"{name:<11}{report}")
        if from_cache:
            aside(f"{name:<11}{from_cache}")
        found.append(items)
    return Sides(*found)


def pretraining_items(config: RunConfig, chat: Chat, say: Say, aside: Say = _unsaid) -> list[Item]:
    """Items of ``data.pretraining``: demonstrations, for a method that mixes in their loss; else none."""
    data = config.data
    if data.pretraining is None:
        return []
    records = read_records(data.pretraining, "demonstrations", split=data.split)
    folder, length = cache_folder(str(data.cache), "tokens"), data.max_length or 0
    items, report, from_cache = encode_or_recall(records, "demonstrations", chat, folder, max_length=length)
    say(f"{'pretraining':<11}{report}")
    if from_cache:
        aside(f"{'pretraining':<11}{from_cache}")
    return items
