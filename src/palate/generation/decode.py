"""Rows of many prompts, token by token, until each has stopped; new ones take the places of those that have.

Rows come in batches: some prompts of like length with some samples each. A batch is read as soon as there is room for
it. Models that ``flat.py`` runs take a small batch whenever so many rows have ended; the others take a large one when
all have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palate.generation.draw import draw
from palate.generation.settings import SamplingSettings
from palate.generation.voices import Voice, mixed


@dataclass(frozen=True)
class Drawn:
    """What was sampled, row by row: prompt by prompt, its K samples next to each other.

    Attributes:
        ids: int64 [N, S]; right of a row's length: junk.
        logprobs: float32 [N, S], nats; see ``draw``.
        length: int64 [N], tokens drawn, stop token included.
        finished: bool [N], the last one is a stop token.
    """

    ids: Tensor
    logprobs: Tensor
    length: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device) -> Drawn:
        return cls(
            torch.zeros(rows, steps, dtype=torch.long, device=device),
            torch.zeros(rows, steps, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )


class Batch(NamedTuple):
    """Rows that begin together: the prompts, the shortest first, and their rows' numbers, prompt by prompt."""

    prompts: list[Sequence[int]]
    rows: Tensor  # int64 [P K]


class Rows(NamedTuple):
    """What every row is given.

    Attributes:
        uniform: rows' numbers int64 [R] -> their random numbers float64 [R, S], one for each step.
        limit: int64 [N], tokens that a row may draw, 1 to S.
        before: int64 [N], tokens of its prompt.
    """

    uniform: Callable[[Tensor], Tensor]
    limit: Tensor
    before: Tensor


class Steps(Protocol):
    """One model and the keys and values of the rows that it is reading. All row orders are the callers' and agree."""

    refills: bool  # more rows may come while others are on their way

    def read(self, prompts: Sequence[Sequence[int]], copies: int, steps: int) -> Tensor:
        """Take ``copies`` rows more of each prompt, behind those that are there; the logits [P, V] after the prompts."""

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Read one token more of every row, int64 [R], at its position in the row; the logits [R, V] after it."""

    def drop(self, done: Tensor) -> Tensor:
        """Forget rows, bool [R]; returns of each row that is left its number before."""


def decode(
    voices: Sequence[Voice],
    steps: Sequence[Steps],
    batches: Iterable[Batch],
    rows: Rows,
    settings: SamplingSettings,
    *,
    stop: Tensor,
    max_rows: int,
    ended: Callable[[int], None],
) -> Drawn:
    """Sample every row. To be called under ``torch.no_grad`` with the models in eval mode.

    Args:
        voices: the models whose distribution is drawn from, with their ``steps``.
        batches: of at most ``max_rows`` rows each.
        stop: int64 [any], tokens that end a response.
        max_rows: that are decoded at once.
        ended: called with the number of rows that ended, whenever some did.
    """
    device = rows.limit.device
    drawn = Drawn.empty(len(rows.limit), int(rows.limit.max()) if len(rows.limit) else 0, device)
    waiting, alive = deque(batches), _Alive.none(device)
    while waiting or len(alive.row):
        if len(alive.row):
            position = rows.before[alive.row] + alive.step - 1
            alive = alive.draw(mixed(voices, [each.step(alive.token, position) for each in steps]), settings, stop)
            alive = _note(drawn, alive, rows, steps, stop, ended)
        while waiting and _fits(len(waiting[0].rows), len(alive.row), steps, max_rows):
            batch = waiting.popleft()
            copies, most = len(batch.rows) // len(batch.prompts), int(rows.limit[batch.rows].max())
            logits = mixed(voices, [each.read(batch.prompts, copies, most) for each in steps])
            new = _Alive.begin(batch.rows, rows).draw(logits.repeat_interleave(copies, 0), settings, stop)
            alive = _note(drawn, alive.and_then(new), rows, steps, stop, ended)
    return drawn


def _fits(more: int, alive: int, steps: Sequence[Steps], max_rows: int) -> bool:
    return not alive or (alive + more <= max_rows and all(each.refills for each in steps))


class _Alive(NamedTuple):
    """Rows on their way."""

    row: Tensor  # int64 [R], their numbers
    step: Tensor  # int64 [R], tokens drawn
    token: Tensor  # int64 [R], the last of them
    logprob: Tensor  # float32 [R], of that
    uniform: Tensor  # float64 [R, S], random numbers

    @classmethod
    def none(cls, device: torch.device) -> _Alive:
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return cls(nothing, nothing, nothing, nothing.float(), nothing.double())

    @classmethod
    def begin(cls, row: Tensor, rows: Rows) -> _Alive:
        zero = torch.zeros_like(row)
        return cls(row, zero, zero, zero.float(), rows.uniform(row))

    def draw(self, logits: Tensor, settings: SamplingSettings, stop: Tensor) -> _Alive:
        """One token more in every row."""
        held = self.step < settings.min_new_tokens
        forbidden = stop if settings.min_new_tokens and len(stop) and bool(held.any()) else None
        uniform = self.uniform.gather(1, self.step[:, None])[:, 0]
        token, logprob = draw(logits, uniform, settings, forbidden, held)
        return self._replace(step=self.step + 1, token=token, logprob=logprob)

    def and_then(self, new: _Alive) -> _Alive:
        return _Alive(*(torch.cat(pair) for pair in zip(self, new, strict=True))) if len(self.row) else new


def _note(
    drawn: Drawn, alive: _Alive, rows: Rows, steps: Sequence[Steps], stop: Tensor, ended: Callable[[int], None]
) -> _Alive:
    """Write down what was drawn; the rows that go on."""
    drawn.ids[alive.row, alive.step - 1], drawn.logprobs[alive.row, alive.step - 1] = alive.token, alive.logprob
    stopped = (alive.token[:, None] == stop).any(-1)
    done = stopped | (alive.step == rows.limit[alive.row])
    if not done.any():
        return alive
    drawn.length[alive.row[done]], drawn.finished[alive.row[done]] = alive.step[done], stopped[done]
    left, *_ = [each.drop(done) for each in steps]  # the same of all
    ended(len(alive.row) - len(left))
    return _Alive(*(each[left] for each in alive))
