"""Conversations of several turns as a rollout: the policy speaks, an environment answers, the policy goes on.

A row is the prompt's ids, then turn by turn what the policy drew and what stands between its turns. Ids go in and ids come
out: no turn is tokenised twice, so the log-probabilities that are trained are those of the very tokens that were drawn.
``response_mask`` is True on the policy's tokens only, their stop tokens included; the environment's tokens, and what the
template puts around them, are read and never trained on.

A turn that is cut at ``max_new_tokens`` ends the conversation, and so does one after which nothing more fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch

from palate.data.collate import Item, prompt_ids
from palate.data.kinds import Conversation, Message, Prompt, PromptText, at
from palate.environment import Environment
from palate.errors import DataError, ModelError
from palate.generation.checks import check_angles, context_length
from palate.training.order import seeded
from palate.training.rollouts import Rollout
from palate.types import Tokens


@dataclass(kw_only=True)
class Conversations(Rollout):
    """Prompts to sampled conversations: a ``Rollout`` whose every row may have several turns.

    Attributes:
        environment: what answers.
        max_turns: of the policy, at most; >= 1.
        max_length: tokens of a whole conversation at most; None = the policy's context.

    What comes back is what ``Rollout`` gives, and of each row: ``finished``, its last turn ended with a stop token and
    the conversation was not cut at its longest; ``turns`` int64 [N], of the policy; ``asked``, the record's own prompt;
    and ``records``, in which the prompt is all that was said before the last turn, so that a reward reads a
    conversation as it would read one from a file. Their fields have, besides the record's own, ``conversation`` (all
    that was said after the prompt) and ``environment_reward`` (the sum over the turns).
    """

    environment: Environment
    max_turns: int = 4
    max_length: int | None = None

    def _drawn(
        self,
        who: str,
        items: Sequence[Item],
        seed: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> Tokens:
        sampling, copies = self.sampling, self.samples_per_prompt
        if who == "greedy":
            sampling, copies = replace(sampling, temperature=0.0), 1
        talks = [
            _Talk(p, s, ids, _prompt_of(item), Random(f"{[*seed]} {p} {s}"), self.environment.begin(), _fields_of(item))
            for p, (item, ids) in enumerate(zip(items, prompt_ids(items), strict=True))
            for s in range(copies)
        ]
        self.check_angles(items)
        generator, longest = seeded(*seed), self._longest()
        for turn in range(self.max_turns):
            speakers = [talk for talk in talks if talk.goes_on]
            if not speakers:
                break
            first = turn == 0  # prompts are read once for all their samples
            drawn = self.engine(
                self.policy,
                prompt_ids(items) if first else [talk.ids for talk in speakers],
                sampling,
                samples_per_prompt=copies if first else 1,
                numbers=None if first else [(talk.prompt, talk.sample) for talk in speakers],
                stop_token_ids=self.chat.stop_token_ids,
                generator=generator,
                max_length=longest,
                records=[item.record for item in items] if first else [items[t.prompt].record for t in speakers],
                other=self.reference if who in ("reference", "mixture") else None,
                mixture={"reference": 1.0, "mixture": self.mixture}.get(who, 0.0),
            )
            for talk, (ids, logprobs, stopped) in zip(speakers, _responses(drawn), strict=True):
                talk.speak(ids, logprobs, stopped, self.chat.text(ids))
                self._answer(talk, longest, getattr(items[talk.prompt].record, "source", ""))
            if progress is not None:
                progress(sum(not talk.goes_on for talk in talks), len(talks))
        return self._rows(talks, items)

    def check_angles(self, items: Sequence[Item]) -> None:
        """A conversation may grow to its longest, whoever speaks."""
        longest = self._longest()
        check_angles(self.speakers, prompt_ids(items), longest, longest, [item.record for item in items])

    def _longest(self) -> int:
        longest = min(map(context_length, self.speakers))
        return longest if self.max_length is None else min(longest, self.max_length)

    def _answer(self, talk: _Talk, longest: int, source: str) -> None:
        """Let the environment speak, unless the policy's turn was cut."""
        if not talk.finished and self.chat.stop_token_ids:
            talk.goes_on = False
            return
        turn = self.environment.answer(
            talk.answers,
            prompt=talk.asked,
            conversation=talk.said,
            fields=talk.fields,
            rng=talk.rng,
            source=source,
        )
        talk.reward += float(turn.reward)
        talk.goes_on = not turn.ends and talk.turns < self.max_turns
        if turn.text is None:
            return
        talk.said.append({"role": turn.role, "content": turn.text})
        if not talk.goes_on:
            return
        try:
            ids = self.chat.encode_reply(talk.asked, talk.said)
        except (DataError, ModelError) as error:
            raise type(error)(at(source, str(error))) from None
        if len(talk.ids) + len(ids) >= longest:
            talk.goes_on = talk.finished = False
        else:
            talk.hear(ids)

    def _rows(self, talks: Sequence[_Talk], items: Sequence[Item]) -> Tokens:
        device = next(self.policy.parameters()).device
        lengths = torch.tensor([len(talk.ids) for talk in talks], dtype=torch.long)
        real = torch.arange(int(lengths.max()) if talks else 0) < lengths[:, None]
        ids, response, logprobs = torch.zeros(real.shape, dtype=torch.long), torch.zeros_like(real), real.float() * 0
        for row, talk in enumerate(talks):
            ids[row, : len(talk.ids)] = torch.tensor(talk.ids)
            response[row, : len(talk.ids)] = torch.tensor(talk.spoken)
            logprobs[row, : len(talk.ids)] = torch.tensor(talk.logprobs)
        extras: dict[str, Any] = {
            "finished": torch.tensor([talk.finished for talk in talks], dtype=torch.bool, device=device),
            "sampler_logprobs": logprobs.to(device),
            "records": [self._record(talk, items[talk.prompt].record) for talk in talks],
            "turns": torch.tensor([talk.turns for talk in talks], dtype=torch.long, device=device),
            "asked": [talk.asked for talk in talks],
        }
        group = torch.tensor([talk.prompt for talk in talks], dtype=torch.long, device=device)
        return Tokens(ids.to(device), real.to(device), response.to(device), group, extras)

    def _record(self, talk: _Talk, record: Any) -> Prompt:
        """The record of a row: what was said before the last turn is its prompt."""
        last = max(i for i, turn in enumerate(talk.said) if turn["role"] == "assistant")
        told = {"conversation": tuple(talk.said), "environment_reward": talk.reward}
        return Prompt(
            self._before(talk.asked, talk.said[:last]), {**talk.fields, **told}, getattr(record, "source", "")
        )

    def _before(self, prompt: PromptText, turns: Sequence[Message]) -> PromptText:
        if not turns:
            return prompt
        if isinstance(prompt, str) and self.chat.template is None:
            return prompt + "".join(turn["content"] for turn in turns)
        beginning: Conversation = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
        return (*beginning, *turns)

    def texts(self, tokens: Tokens, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The whole conversation of the given rows: prompt and response are what ``palate score`` reads, all but the last
        turn and the last; ``asked`` is the prompt that it began with, where there is more than one."""
        records: Any = tokens.extras["records"]
        entries = []
        for row in rows:
            record = records[row]
            entry: dict[str, Any] = {"prompt": record.prompt}
            entry["response"] = [t for t in record.fields["conversation"] if t["role"] == "assistant"][-1]["content"]
            entry["finished"] = bool(tokens.extras["finished"][row])
            if int(tokens.extras["turns"][row]) > 1:
                entry["asked"] = tokens.extras["asked"][row]
            entries.append(entry)
        return entries


@dataclass
class _Talk:
    """One conversation while it goes on."""

    prompt: int  # numbers of the prompt and of its sample
    sample: int
    ids: list[int]
    asked: PromptText
    rng: Random
    answers: Callable[..., Any]
    fields: Mapping[str, Any]
    spoken: list[bool] = field(default_factory=list)  # of every id, whether the policy drew it
    logprobs: list[float] = field(default_factory=list)
    said: list[Message] = field(default_factory=list)
    turns: int = 0
    reward: float = 0.0
    finished: bool = False
    goes_on: bool = True

    def __post_init__(self) -> None:
        self.spoken, self.logprobs = [False] * len(self.ids), [0.0] * len(self.ids)

    def speak(self, ids: list[int], logprobs: list[float], stopped: bool, text: str) -> None:
        self._add(ids, True, logprobs)
        self.said.append({"role": "assistant", "content": text})
        self.turns, self.finished = self.turns + 1, stopped

    def hear(self, ids: list[int]) -> None:
        self._add(ids, False, [0.0] * len(ids))

    def _add(self, ids: list[int], spoken: bool, logprobs: list[float]) -> None:
        self.ids = self.ids + ids
        self.spoken = self.spoken + [spoken] * len(ids)
        self.logprobs = self.logprobs + logprobs


def _responses(drawn: Tokens) -> list[tuple[list[int], list[float], bool]]:
    """Ids, log-probs and whether a stop token ended them, of each row's response."""
    ids, mask, logprobs = (x.cpu() for x in (drawn.ids, drawn.response_mask, drawn.extras["sampler_logprobs"]))  # type: ignore[union-attr]
    ends: Any = drawn.extras["finished"]
    return [(ids[i][mask[i]].tolist(), logprobs[i][mask[i]].tolist(), end) for i, end in enumerate(ends.cpu().tolist())]


def _prompt_of(item: Item) -> PromptText:
    return item.record.prompt  # type: ignore[no-any-return]


def _fields_of(item: Item) -> Mapping[str, Any]:
    return getattr(item.record, "fields", None) or {}
