"""Looking at rows token by token: what is trained, what is masked, and what is wrong with the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.records import Record, read_records
from palate.errors import DataError
from palate.models.load import load_tokenizer
from palate.stage.chats import chat_of
from palate.stage.records import kind_of
from palate.texts.common import LONGEST

REST = "⋯"  # a token that only adds to the character before it
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what half a character is decoded to
LONGEST_SPLIT = 8  # tokens; a character has four bytes at most, but a token may end one and begin the next


class ShownRow(NamedTuple):
    """A row as its tokens' texts, which of them are trained, and of a correction, which are of what was changed."""

    source: str
    tokens: list[str]
    trained: list[bool]
    changed: list[bool] | None = None


@dataclass(frozen=True)
class Checked:
    """What ``check_tokens`` found; ``findings`` is empty where all is well.

    ``template`` is False where string prompts are continued as plain text.
    """

    findings: list[str]
    report: str = ""
    counts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[ShownRow] = ()
    template: bool = True

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
        max_length: tokens of a row; None = the model's context, as in training.
    """
    chat = chat_of(model, load_tokenizer(model), chat_template)
    findings = chat.check()
    if data is None:
        return Checked(findings, template=chat.template is not None)
    records = _read(data, kind, format, limit)
    items, report = encode_records(records, kind, chat, max_length=max_length or _context(model))
    shown = [_shown(row, chat) for item in items[:count] for row in item.rows]
    return Checked(findings + report.warnings, str(report), report.counts(), shown, chat.template is not None)


def _read(where: str, kind: str, format: str, limit: int | None) -> list[Record]:
    try:
        return read_records(where, kind, format=format, limit=limit)
    except DataError as error:
        other = None if where == "-" else kind_of(where, format=format, but=kind)
        if other is None:
            raise
        raise DataError(f"{error}\n{where} looks like {other}. Give --kind {other}.") from None


def _context(model: str) -> int:
    """Tokens that the model's config says it can hold; 1024 where there is no config that says so."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError, KeyError):  # a tokenizer alone can be looked at, too
        return LONGEST
    return int(getattr(config, "max_position_embeddings", None) or LONGEST)


def _shown(row: Any, chat: Chat) -> ShownRow:
    ids = row.ids.tolist()
    changed = None if row.changed is None else row.changed.tolist()
    return ShownRow(row.source, token_texts(chat.tokenizer, ids), row.response_mask.tolist(), changed)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the text that it adds.

    A character that several tokens make up (most tokenizers split the rarer Chinese ones into bytes) stands at the first
    of them, and the others are ``REST``. A token that is no text at all is its name in the vocabulary.
    """
    texts: list[str] = []
    while len(texts) < len(ids):
        start, more = len(texts), 0
        text = _added(tokenizer, ids, start, start + 1)
        while UNKNOWN in text and more < LONGEST_SPLIT and start + more + 1 < len(ids):
            more += 1
            text = _added(tokenizer, ids, start, start + 1 + more)
        if not text or UNKNOWN in text:  # no character of any kind
            text, more = str(tokenizer.convert_ids_to_tokens(ids[start])), 0
        texts += [text, *[REST] * more]
    return texts


def _added(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """What the tokens from ``start`` to ``end`` add to the text of the few before them."""
    before = tokenizer.decode(ids[max(0, start - 4) : start], skip_special_tokens=False)
    whole = tokenizer.decode(ids[max(0, start - 4) : end], skip_special_tokens=False)
    return str(whole[len(before) :]) if whole.startswith(before) else ""
