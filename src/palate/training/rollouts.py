"""Sampling the batch that an online method learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from palate.data.chat import Chat
from palate.data.collate import Item, prompt_ids
from palate.generation.checks import check_angles, context_length
from palate.generation.engines import Engine
from palate.generation.sampler import SamplingSettings, sample
from palate.training.order import seeded
from palate.types import Tokens, joined

# Who may draw a row, and what is added to the seed: policy and reference begin as the same weights, and with the same
# random numbers they would draw the same responses.
DRAWERS: dict[str, tuple[int, ...]] = {"policy": (), "greedy": (), "reference": (0x4EF0,), "mixture": (0x3180,)}


@dataclass
class Rollout:
    """Prompts to sampled rows.

    Attributes:
        policy: samples the responses.
        chat: for the stop tokens and for turning ids into text.
        sampling: temperature, lengths, filters.
        samples_per_prompt: K >= 1; the rows of a prompt share a group.
        drawn_by: who draws, in this order: "policy", K rows a prompt; "greedy", one of the policy's most probable token at
            every step; "reference", K rows; "mixture", K rows, token by token from policy^(1-b) reference^b. Where
            there are several, ``extras["drawn_by"]`` has each row's.
        reference: the frozen model, or ``AdapterOff(policy)``, where it draws.
        mixture: b, the reference's share, in [0, 1].
        engine: what samples, ``sampler.sample`` or another that is called like it.
        keeps_logprobs: the log-probs of the policy's draw are also ``extras["policy_logprobs"]``, and not computed again;
            NaN in the rows of others.
    """

    policy: nn.Module
    chat: Chat
    sampling: SamplingSettings
    samples_per_prompt: int = 1
    drawn_by: tuple[str, ...] = ("policy",)
    reference: nn.Module | None = None
    mixture: float = 0.0
    engine: Engine = sample
    keeps_logprobs: bool = False

    def __call__(self, items: Sequence[Item], *seed: int, progress: Callable[[int, int], None] | None = None) -> Tokens:
        """Responses to each prompt; the same seed numbers give the same samples, whoever draws beside."""
        parts = [self._drawn(who, items, (*seed, *DRAWERS[who]), progress) for who in self.drawn_by]
        if self.keeps_logprobs:
            parts = [_with_kept_logprobs(part, who) for who, part in zip(self.drawn_by, parts, strict=True)]
        if len(parts) == 1:
            return parts[0]
        rows = reduce(joined, parts)
        group = torch.cat([part.group for part in parts])
        whose = [who for who, part in zip(self.drawn_by, parts, strict=True) for _ in range(len(part))]
        rows = replace(rows, group=group, extras={**rows.extras, "drawn_by": whose})
        return rows.select(torch.argsort(group, stable=True))

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
        with torch.no_grad():
            return self.engine(
                self.policy,
                prompt_ids(items),
                sampling,
                samples_per_prompt=copies,
                stop_token_ids=self.chat.stop_token_ids,
                generator=seeded(*seed),
                records=[item.record for item in items],
                progress=progress,
                other=self.reference if who in ("reference", "mixture") else None,
                mixture={"reference": 1.0, "mixture": self.mixture}.get(who, 0.0),
            )

    @property
    def speakers(self) -> list[nn.Module]:
        """The models that draw."""
        models = [self.policy, *([self.reference] if {"reference", "mixture"} & {*self.drawn_by} else [])]
        return [getattr(model, "policy", model) for model in models if model is not None]

    def check_angles(self, items: Sequence[Item]) -> None:
        """Before anything is drawn: refuse prompts whose rows may cross LongRoPE's length; see ``checks.check_angles``."""
        context, records = min(map(context_length, self.speakers)), [item.record for item in items]
        check_angles(self.speakers, prompt_ids(items), self.sampling.max_new_tokens, context, records)

    def texts(self, tokens: Tokens, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Prompt, response and whether it ended by itself, of the given rows: what ``palate score`` reads again."""
        records: Any = tokens.extras["records"]
        return [
            {
                "prompt": records[row].prompt,
                "response": self.chat.text(tokens.ids[row][tokens.response_mask[row]].tolist()),
                "finished": bool(tokens.extras["finished"][row]),
            }
            for row in rows
        ]


def _with_kept_logprobs(tokens: Tokens, who: str) -> Tokens:
    drawn: Any = tokens.extras["sampler_logprobs"]
    kept = drawn if who == "policy" else torch.full_like(drawn, torch.nan)
    return replace(tokens, extras={**tokens.extras, "policy_logprobs": kept})
