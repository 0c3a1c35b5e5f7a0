"""Responses of a model to prompts, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from palate.data.collate import encode_records, prompt_ids
from palate.data.kinds import Prompt, PromptText, Record
from palate.data.records import read_records
from palate.errors import ConfigError, DataError
from palate.generation.engines import check_engine, engine_of
from palate.generation.settings import SamplingSettings
from palate.settings_tree import closest
from palate.texts.common import Progress, context_of, policy_with_chat, say_cut
from palate.training.order import seeded


def read_prompts(where: str, *, format: str = "auto", limit: int | None = None) -> list[Record]:
    """Prompts of any records that have them; a plain text file's or stdin's lines must be JSON objects."""
    return read_records(where, "prompts", format=format, limit=limit)


def _settings(decoding: Mapping[str, Any]) -> SamplingSettings:
    known = [field.name for field in fields(SamplingSettings)]
    for key in decoding:
        if key not in known:
            near = closest(key, known)
            hint = f' Did you mean "{near}"?' if near else ""
            raise ConfigError(f'unknown setting "{key}" of sampling.{hint} Known: {", ".join(known)}.')
    return SamplingSettings(**decoding)


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
    engine: str = "embedded",
    progress: Progress = None,
) -> list[dict[str, Any]]:
    """Responses to prompts, ``samples_per_prompt`` each, in the order of the prompts.

    Args:
        model: folder or hub name.
        prompts: strings, conversations or records; a record's other fields are handed on.
        decoding: fields of ``SamplingSettings``.
        engine: what samples, "embedded" or "vllm".
    Returns:
        {"prompt", "response", "finished", and the record's fields} for each response.
    """
    if not prompts:
        raise DataError("no prompt to respond to.")
    check_engine(engine)
    settings = _settings(decoding or {})
    policy, chat = policy_with_chat(model, chat_template, system, dtype, device)
    records = [p if hasattr(p, "source") else Prompt(p) for p in prompts]  # type: ignore[arg-type]
    room = context_of(policy) - settings.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in the model's {context_of(policy)} tokens."
        )
    items, report = encode_records(records, "prompts", chat, max_length=max(2, room))  # type: ignore[arg-type]
    say_cut(report, room)
    ids = prompt_ids(items)
    longest = max((len(prompt) for prompt in ids), default=1) + settings.max_new_tokens
    tokens = engine_of(engine, max_length=longest)(
        policy,
        ids,
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
