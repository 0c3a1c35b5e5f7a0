"""Rows of tokens as people and text models read them: prompt, response, and the prompt's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from palate.errors import ModelError
from palate.types import Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


@dataclass(frozen=True)
class Sample:
    """One row in words.

    Attributes:
        prompt: as the record has it (a string or a conversation), else decoded.
        response: text without special tokens; of several turns, the last.
        text: prompt and response as one text: joined as they are where the policy continues plain text, a line each
            where a template (whose own words are left out) stands between them.
        finished: the response ended by itself, as far as the sampler says.
        fields: the record's other fields.
        source: "file:line" of the record, or "".
    """

    prompt: Any
    response: str
    text: str
    finished: bool
    fields: Mapping[str, Any]
    source: str

    def show(self, limit: int = 300) -> str:
        """For the end of an error message: where the sample came from, and both texts, shortened."""
        where = f" ({self.source})" if self.source else ""
        return f"\n  sample{where}:\n    prompt: {_short(said(self.prompt), limit)}\n    response: {_short(self.response, limit)}"


def read_samples(tokens: Tokens, chat: Chat) -> list[Sample]:
    """Every row as a ``Sample``.

    Args:
        tokens: rows [N, T]; ``extras["records"]`` and ``extras["finished"]`` are used where there are any.
        chat: whose tokenizer the ids belong to.
    """
    records = tokens.extras.get("records") or [None] * len(tokens)
    finished = tokens.extras.get("finished")
    ends = [True] * len(tokens) if finished is None else [bool(end) for end in finished]
    ids, real, response = tokens.ids.cpu(), tokens.attention_mask.cpu(), tokens.response_mask.cpu()
    samples = []
    for i, record in enumerate(records):
        answered = (response[i] & real[i]).tolist()
        start = _last_turn(answered)
        before = ids[i, :start][real[i, :start]].tolist()
        reply = chat.text(
            [token for token, counts in zip(ids[i, start:].tolist(), answered[start:], strict=True) if counts]
        )
        prompt = getattr(record, "prompt", None)
        if prompt is None:
            prompt = chat.text(before).lstrip(" ")
        between = "" if isinstance(prompt, str) and chat.template is None else "\n"
        samples.append(
            Sample(
                prompt=prompt,
                response=reply,
                text=said(prompt) + between + reply,
                finished=ends[i],
                fields=getattr(record, "fields", None) or {},
                source=getattr(record, "source", ""),
            )
        )
    return samples


def finite(scores: Tensor, samples: Sequence[Sample], name: str) -> Tensor:
    """The scores [N] as they are, or an error that shows the first sample with a NaN or Inf."""
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f'reward "{name}" gave {scores[bad[0]].item()} ({len(bad)} of {len(samples)} scores are NaN or Inf); finite '
            f"numbers were expected.{samples[bad[0]].show()}"
        )
    return scores


def check_scores(scores: Tensor, tokens: Tokens, reward: Any, name: str = "") -> None:
    """One finite score [N] for each row, whatever the reward is; it may have a ``chat`` to show samples with.

    Raises:
        ModelError: another number of scores, or a NaN or Inf; the first bad sample is shown.
    """
    name = name or str(getattr(reward, "name", "") or type(reward).__name__)
    if tuple(scores.shape) != (len(tokens),):
        raise ModelError(
            f'reward "{name}" gave scores of shape {list(scores.shape)} for {len(tokens)} responses; one number for each '
            f"was expected.{_show(tokens, 0, reward) if len(tokens) else ''}"
        )
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ModelError(
            f'reward "{name}" gave {scores[bad[0]].item()} ({len(bad)} of {len(scores)} scores are NaN or Inf); finite '
            f"numbers were expected.{_show(tokens, bad[0], reward)}"
        )


def _show(tokens: Tokens, row: int, reward: Any) -> str:
    """A row for the end of an error message: in words where the reward has a chat, else as ids."""
    one = tokens.select(tokens.group.new_tensor([row]))
    chat = getattr(reward, "chat", None)
    if chat is not None:
        return read_samples(one, chat)[0].show()
    records: Any = one.extras.get("records") or [None]
    record = records[0]
    source = f" ({record.source})" if getattr(record, "source", "") else ""
    prompt = getattr(record, "prompt", None)
    ids = one.ids[0][one.response_mask[0]].tolist()
    shown = "" if prompt is None else f"\n    prompt: {_short(said(prompt), 300)}"
    return f"\n  sample{source}:{shown}\n    response: token ids {_short(str(ids), 300)}"


def said(prompt: Any) -> str:
    """A prompt's words: the string itself, or what each turn of a conversation says, a line each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(str(message["content"]) for message in prompt)


def _last_turn(answered: list[bool]) -> int:
    """Where the last run of True begins; the end when there is none."""
    for i in range(len(answered) - 1, -1, -1):
        if answered[i] and (i == 0 or not answered[i - 1]):
            return i
    return len(answered)


def _short(text: str, limit: int) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}")
