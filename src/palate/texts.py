"""Trained models at work on texts: sampling, scoring, talking, and looking at what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from palate.data import files
from palate.data.chat import Chat
from palate.data.collate import Item, collate, encode_records, prompt_ids
from palate.data.formats.convert import write_lines
from palate.data.formats.detect import convert_record
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, PromptText, Ranking, Record
from palate.data.records import read_records
from palate.errors import ConfigError, DataError
from palate.generation.sampler import SamplingSettings, sample
from palate.models.forward import score_responses
from palate.models.load import load_policy, load_tokenizer
from palate.models.rewards import load_reward
from palate.stage.chats import chat_of
from palate.training.order import seeded
from palate.types import moved

__all__ = [
    "Conversation",
    "check_tokens",
    "read_prompts",
    "read_scorable",
    "sample_records",
    "score_records",
    "write_lines",
]

Progress = Callable[[int, int], None] | None
LONGEST = 1024  # tokens of a row where neither the caller nor the model says
ROWS = 64


def device_of(name: str) -> str:
    """ "auto" = cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# -- sampling ----------------------------------------------------------------------------------------------------------


def read_prompts(where: str, *, format: str = "auto", limit: int | None = None) -> list[Record]:
    """Prompts of any records that have them; a plain text file's or stdin's lines must be JSON objects."""
    return read_records(where, "prompts", format=format, limit=limit)


def sample_records(
    model: str,
    prompts: Sequence[PromptText | Record],
    *,
    decoding: Mapping[str, Any] | None = None,
    samples_per_prompt: int = 1,
    seed: int = 0,
    chat_template: str | None = None,
    system: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress = None,
) -> list[dict[str, Any]]:
    """Responses to prompts, ``samples_per_prompt`` each, in the order of the prompts.

    Args:
        model: folder or hub name.
        prompts: strings, conversations or records; a record's other fields are handed on.
        decoding: fields of ``SamplingSettings``.
    Returns:
        {"prompt", "response", "finished", and the record's fields} for each response.
    """
    if not prompts:
        raise DataError("no prompt to respond to.")
    policy, chat = _policy(model, chat_template, system, dtype, device)
    settings = SamplingSettings(**(decoding or {}))
    records = [p if hasattr(p, "source") else Prompt(p) for p in prompts]  # type: ignore[arg-type]
    room = _context(policy) - settings.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in the model's {_context(policy)} tokens."
        )
    items, _ = encode_records(records, "prompts", chat, max_length=max(2, room))  # type: ignore[arg-type]
    tokens = sample(
        policy,
        prompt_ids(items),
        settings,
        samples_per_prompt=samples_per_prompt,
        stop_token_ids=chat.stop_token_ids,
        generator=seeded(seed),
        records=[item.record for item in items],
        progress=progress,
    )
    lines = []
    for row, record in enumerate(tokens.extras["records"]):
        response = chat.text(tokens.ids[row][tokens.response_mask[row]].tolist())
        made = {"prompt": record.prompt, "response": response, "finished": bool(tokens.extras["finished"][row])}
        lines.append(made | {k: v for k, v in getattr(record, "fields", {}).items() if k not in made})
    return lines


def _policy(
    model: str, chat_template: str | None, system: str | None, dtype: str, device: str
) -> tuple[torch.nn.Module, Chat]:
    tokenizer = load_tokenizer(model)
    chat = chat_of(model, tokenizer, chat_template, system)
    return load_policy(model, dtype=dtype, device=device_of(device), trainable=False, tokenizer=tokenizer), chat


def _context(model: Any) -> int:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    return int(getattr(config, "max_position_embeddings", None) or 1_000_000)


# -- scoring -----------------------------------------------------------------------------------------------------------


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
        reward: what ``models.rewards.load_reward`` takes: a folder or hub name, "module:function", a mapping.
        records: with responses, all of one kind.
        tokenizer: folder or hub name of the policy's, for a reward that has none of its own.
        max_length: tokens of prompt and response; None = 1024. Longer prompts are cut at their beginning.
    Raises:
        ConfigError: the reward has no tokenizer and none is named.
    """
    if not records:
        raise DataError("no record to score.")
    chat = _reward_chat(reward, tokenizer, chat_template)
    place = device_of(device)
    judge = load_reward(reward, chat, dtype=dtype, device=place)
    scores = _scores(judge, records, chat, max_length or LONGEST, torch.device(place), progress)
    return _unflat(records, scores)


def _reward_chat(reward: Any, tokenizer: str | None, template: str | None) -> Chat:
    """The chat of the tokenizer that is named, else of the first model that the reward names."""
    where = tokenizer or _first_folder(reward)
    if where is None:
        raise ConfigError("this reward has no tokenizer of its own. Name the policy's: --tokenizer FOLDER.")
    return chat_of(where, load_tokenizer(where), template)


def _first_folder(reward: Any) -> str | None:
    if isinstance(reward, Mapping):
        for key in ("model", "classifier"):
            if key in reward:
                return str(reward[key])
        parts: Sequence[Any] = [] if "function" in reward else list(reward.values())
    elif isinstance(reward, (list, tuple)):
        parts = reward
    elif callable(reward):
        return None
    else:
        from palate.models.rewards import FUNCTION

        return None if FUNCTION.match(str(reward)) else str(reward)
    return next((found for part in parts if (found := _first_folder(part))), None)


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
    try:
        items, _ = encode_records(numbered, "demonstrations", chat, max_length=longest)
    except DataError as error:
        raise DataError(f"{records[0].record.source}: {error}") from None
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


# -- talking -----------------------------------------------------------------------------------------------------------


class Conversation:
    """A conversation with a model; one without a chat template continues what was said, as one text."""

    def __init__(
        self,
        model: str,
        decoding: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        system: str | None = None,
        chat_template: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.policy, self.chat = _policy(model, chat_template, system, dtype, device)
        self.settings, self.seed = SamplingSettings(**(decoding or {})), seed
        self.turns: list[dict[str, Any]] = []
        self.said = 0

    def restart(self) -> None:
        """Forget what was said."""
        self.turns = []

    def say(self, text: str) -> str:
        """The model's answer, which is remembered; the oldest turns are cut when its context is full."""
        turns = (*self.turns, {"role": "user", "content": text})
        plain = self.chat.template is None
        prompt: PromptText = "".join(str(turn["content"]) for turn in turns) if plain else turns
        room = max(2, _context(self.policy) - self.settings.max_new_tokens)
        items, _ = encode_records([Prompt(prompt)], "prompts", self.chat, max_length=room)
        tokens = sample(
            self.policy,
            prompt_ids(items),
            self.settings,
            stop_token_ids=self.chat.stop_token_ids,
            generator=seeded(self.seed, self.said),
        )
        answer = self.chat.text(tokens.ids[0][tokens.response_mask[0]].tolist())
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        self.said += 1
        return answer


# -- looking at tokens -------------------------------------------------------------------------------------------------


class ShownRow(NamedTuple):
    """A row as its tokens' texts, and which of them are trained."""

    source: str
    tokens: list[str]
    trained: list[bool]


@dataclass(frozen=True)
class Checked:
    """What ``check_tokens`` found; ``findings`` is empty where all is well."""

    findings: list[str]
    report: str = ""
    counts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[ShownRow] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"findings": self.findings, "report": dict(self.counts), "rows": [row._asdict() for row in self.rows]}


def check_tokens(
    model: str,
    data: str | None = None,
    *,
    kind: str = "demonstrations",
    count: int = 3,
    max_length: int | None = None,
    limit: int | None = None,
    format: str = "auto",
    chat_template: str | None = None,
) -> Checked:
    """Try the tokenizer and its template, and show the first records token by token. No model is loaded.

    Args:
        model: folder or hub name; only its tokenizer and configs are read.
        data: records to encode; None = the template only.
        count: records to show.
        max_length: tokens of a row; None = 1024.
    """
    chat = chat_of(model, load_tokenizer(model), chat_template)
    findings = chat.check()
    if data is None:
        return Checked(findings)
    records = read_records(data, kind, format=format, limit=limit)
    items, report = encode_records(records, kind, chat, max_length=max_length or LONGEST)
    shown = [_shown(row, chat) for item in items[:count] for row in item.rows]
    return Checked(findings + report.warnings, str(report), report.counts(), shown)


def _shown(row: Any, chat: Chat) -> ShownRow:
    """Each token as the text that it adds; one that only shows with its neighbours as its name in the vocabulary."""
    ids = row.ids.tolist()
    texts = []
    for i, number in enumerate(ids):
        before = chat.tokenizer.decode(ids[max(0, i - 4) : i], skip_special_tokens=False)
        whole = chat.tokenizer.decode(ids[max(0, i - 4) : i + 1], skip_special_tokens=False)
        added = whole[len(before) :] if whole.startswith(before) else ""
        texts.append(added if added and "�" not in added else str(chat.tokenizer.convert_ids_to_tokens(number)))
    return ShownRow(row.source, texts, row.response_mask.tolist())
