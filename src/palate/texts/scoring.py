"""What a reward says of responses: the number that training saw."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from palate.data import files
from palate.data.chat import Chat
from palate.data.collate import Item, collate, encode_records
from palate.data.formats.detect import convert_record
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, Ranking, Record
from palate.errors import ConfigError, DataError
from palate.models.forward import score_responses
from palate.models.load import load_tokenizer
from palate.models.rewards import first_folder, load_reward
from palate.settings_tree import spelled_out
from palate.stage.chats import chat_of
from palate.texts.common import LONGEST, Progress, context_of, device_of, say_cut
from palate.types import moved

ROWS = 64  # a batch of scoring


class Scorable(NamedTuple):
    """A record with responses, and what stood beside it."""

    record: Record
    finished: bool = True  # False: the response was cut off, and is scored without an end of text, as in training
    fields: Mapping[str, Any] = {}  # for reward functions that take more than prompts and responses


class Scores(NamedTuple):
    """What ``score_records`` found."""

    lines: list[dict[str, Any]]  # one a record, in order
    accuracy: float | None  # over pairs, ties 1/2; None without pairs
    pairs: int


def read_scorable(where: str, *, format: str = "auto", limit: int | None = None) -> list[Scorable]:
    """Records that hold responses: rankings, comparisons, judgements or demonstrations, as the first object is.

    Raises:
        DataError: the first object has no response.
    """
    found: list[Scorable] = []
    kind = ""
    for source, row in files.rows(where):
        kind = kind or _scorable_kind(row, source, format)
        fields = {key: value for key, value in row.items() if key not in ("prompt", "response", "responses")}
        records = convert_record(row, kind, source, format=format)
        found += [Scorable(record, row.get("finished") is not False, fields) for record in records]
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


def _scorable_kind(found: dict[str, Any], source: str, format: str) -> str:
    for kind in ("rankings", "comparisons", "judgements", "demonstrations"):
        try:
            if convert_record(found, kind, source, format=format):
                return kind
        except DataError:
            continue
    keys = ", ".join(repr(key) for key in found)
    raise DataError(
        f'{source}: no response to score. Found: {keys}. Expected "prompt" with "response", with "chosen" and "rejected", or '
        'with "responses" and "ranks".'
    )


def score_records(
    reward: Any,
    records: Sequence[Scorable],
    *,
    tokenizer: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress = None,
) -> Scores:
    """Score every response; the same number as in training.

    Args:
        reward: what ``models.rewards.load_reward`` takes: a folder or hub name, "module:function", a mapping; or a text
            that holds one, or names a .yaml file with one (a run's config.yaml too).
        records: with responses, all of one kind.
        tokenizer: folder or hub name of the policy's, for a reward that has none of its own.
        max_length: tokens of prompt and response; None = what the reward can hold, at most 1024. Longer prompts are cut
            at their beginning, with a warning that counts them.
    Raises:
        ConfigError: the reward has no tokenizer and none is named, or ``max_length`` is more than the reward can hold.
    """
    if not records:
        raise DataError("no record to score.")
    reward = spelled_out(reward, "reward")
    chat = _reward_chat(reward, tokenizer, chat_template)
    place = device_of(device)
    judge = load_reward(reward, chat, dtype=dtype, device=place)
    room = context_of(judge) if isinstance(judge, torch.nn.Module) else LONGEST
    if max_length is not None and isinstance(judge, torch.nn.Module) and max_length > room:
        raise ConfigError(f"max_length is {max_length}, and the reward model holds {room} tokens. Give at most that.")
    scores = _scores(judge, records, chat, max_length or min(room, LONGEST), torch.device(place), progress)
    return _unflat(records, scores)


def _reward_chat(reward: Any, tokenizer: str | None, template: str | None) -> Chat:
    """The chat of the tokenizer that is named, else of the first model that the reward names."""
    where = tokenizer or first_folder(reward)
    if where is None:
        raise ConfigError("this reward has no tokenizer of its own. Name the policy's: --tokenizer FOLDER.")
    return chat_of(where, load_tokenizer(where), template)


def responses_of(record: Record) -> list[str]:
    """A record's responses; of a comparison the chosen one first."""
    if isinstance(record, Comparison):
        return [record.chosen, record.rejected]
    if isinstance(record, Ranking):
        return list(record.responses)
    if isinstance(record, (Demonstration, Judgement)):
        return [record.response]
    return []


def _scores(
    judge: Any, records: Sequence[Scorable], chat: Chat, longest: int, device: torch.device, progress: Progress
) -> list[float | None]:
    """One score a response, record by record; None where it is empty."""
    whose = [scorable for scorable in records for _ in responses_of(scorable.record)]
    texts = [text for scorable in records for text in responses_of(scorable.record)]
    # The source is the response's number, because empty responses are left out on the way.
    numbered: list[Record] = [
        Demonstration(scorable.record.prompt, text, source=str(i))
        for i, (scorable, text) in enumerate(zip(whose, texts, strict=True))
    ]
    if not any(text.strip() for text in texts):
        _say_empty(len(texts), len(texts))
        return [None] * len(texts)
    try:
        items, report = encode_records(numbered, "demonstrations", chat, max_length=longest)
    except DataError as error:
        raise DataError(f"{records[0].record.source}: {error}") from None
    say_cut(report, longest)
    _say_empty(len(texts) - len(items), len(texts))
    found: list[float | None] = [None] * len(texts)
    with torch.no_grad():
        for start in range(0, len(items), ROWS):
            part = [int(item.record.source) for item in items[start : start + ROWS]]
            rows = [
                _as_sampled(item, whose[i], chat) for i, item in zip(part, items[start : start + ROWS], strict=True)
            ]
            tokens = moved(collate(rows, "demonstrations"), device)
            for i, value in zip(part, score_responses(judge, tokens).scores.tolist(), strict=True):
                found[i] = value
            if progress is not None:
                progress(min(start + ROWS, len(items)), len(items))
    return found


def _say_empty(count: int, of: int) -> None:
    if count:
        warnings.warn(f"{count:,} of {of:,} responses are empty: no score (null).", stacklevel=3)


def _as_sampled(item: Item, scorable: Scorable, chat: Chat) -> Item:
    """The row as the sampler would have left it: with its record's fields, and no stop token where it was cut off."""
    row, record = item.rows[0], scorable.record
    if not scorable.finished and row.finished and row.ids[-1] in chat.stop_token_ids and row.response_mask[-2]:
        row = replace(row, ids=row.ids[:-1], response_mask=row.response_mask[:-1])
    row = replace(row, finished=row.finished and scorable.finished)
    return replace(item, rows=(row,), record=Prompt(record.prompt, scorable.fields, record.source))


def _unflat(records: Sequence[Scorable], scores: Sequence[float | None]) -> Scores:
    lines, wins, pairs, at = [], 0.0, 0, 0
    for record, _, fields in records:
        count = len(responses_of(record))
        own = list(scores[at : at + count])
        at += count
        line: dict[str, Any] = {"prompt": record.prompt}
        if isinstance(record, Comparison):
            line |= {"chosen": record.chosen, "rejected": record.rejected}
            line |= {"chosen_score": own[0], "rejected_score": own[1]}
            ordered = [(0, 1)]
        elif isinstance(record, Ranking):
            line |= {"responses": list(record.responses), "ranks": list(record.ranks), "scores": own}
            ordered = [(i, j) for i in range(count) for j in range(count) if record.ranks[i] < record.ranks[j]]
        else:
            line |= {"response": responses_of(record)[0], "score": own[0]}
            ordered = []
        for better, worse in ordered:
            good, bad = own[better], own[worse]
            if good is not None and bad is not None:
                wins += 1.0 if good > bad else 0.5 if good == bad else 0.0
                pairs += 1
        lines.append(line | {key: value for key, value in fields.items() if key not in line})
    return Scores(lines, wins / pairs if pairs else None, pairs)
