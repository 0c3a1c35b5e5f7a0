"""The types that flow between the rooms: rows of tokens, judgements about rows, four roles, sums with counts.

Two conventions hold everywhere.

*Column t is about token t.*  ``logprobs[:, t] = log p(ids[:, t] | ids[:, <t])``, ``values[:, t]`` is the value of
the state in which ``ids[:, t]`` was chosen, ``rewards[:, t]`` is paid for ``ids[:, t]``. Column 0 is zero. Masks are
bool, made from lengths, True = counts; what a masked slot holds (zero, junk, NaN) never changes a result.

*An average is* ``Mean(total, count)`` *until the loop divides*, so that cutting a batch differently never changes it.

A batch is rows, and a comparison is two row numbers: every response stands once in ``Tokens``; rows that answer the
same prompt share a group number; a batch is cut at group boundaries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn


class Mean(NamedTuple):
    """A weighted sum and the sum of its weights; added over microbatches and ranks, divided once by the loop."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody counts with

    @classmethod
    def of(cls, values: Tensor, weight: Tensor | None = None) -> Mean:
        """Sum ``values`` where ``weight`` counts.

        Args:
            values: any shape.
            weight: the same shape or None. Bool: True = counts, and a False slot may hold NaN. Float: a weight >= 0,
                and a slot of weight 0 may hold NaN.

        Sums are in float32 at least: a count of more than 256 is no bf16 number.
        """
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if weight is None:
            return cls(values.sum(), values.new_tensor(float(values.numel())))
        kept = weight if weight.dtype == torch.bool else weight != 0
        weight = weight.to(values.dtype)
        return cls((torch.where(kept, values, 0) * weight).sum(), weight.sum())

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    def __mul__(self, factor: float) -> Mean:  # type: ignore[override]
        """Scale the average, not its weight."""
        return Mean(self.total * factor, self.count)

    def __rmul__(self, factor: float) -> Mean:  # type: ignore[override]
        """The same: a tuple's own would repeat it."""
        return self * factor

    def detach(self) -> Mean:
        return Mean(self.total.detach(), self.count.detach())

    def item(self) -> float:
        """The average; 0 when nothing was counted."""
        count = float(self.count)
        return float(self.total.detach()) / count if count else 0.0


@dataclass(frozen=True)
class Tokens:
    """Right-padded prompt+response rows. Every [N, T] array is aligned with the token it is about.

    Attributes:
        ids: int64 [N, T].
        attention_mask: bool [N, T], True = a real token.
        response_mask: bool [N, T], True = a token that the policy answers for: response tokens, with their end of
            text when there is one. Never True in column 0, never outside ``attention_mask``.
        group: int64 [N], rows with equal numbers answer the same prompt; ascending.
        extras: further facts about rows, each a tensor or sequence of length N, carried along untouched. Known names:
            ``finished`` bool [N], the response ended with a stop token; ``sampler_logprobs`` float [N, T], what the
            sampler said when it drew the token; ``importance`` float [N, T], how often the token's gradient counts, where
            an older policy drew it (``training.ahead``); ``changed`` bool [N, T], a token of what a correction changed;
            ``records``, the prompt's record of each row; ``drawn_by``, who drew each row, where it was not the policy
            alone (``training.rollouts``).
    """

    ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    group: Tensor
    extras: Mapping[str, Tensor | Sequence[Any]] = field(default_factory=dict)

    @property
    def tokens(self) -> Tokens:
        """Itself, so that every batch has ``.tokens``."""
        return self

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, rows: Tensor) -> Tokens:
        """The given rows, in the given order, without the columns that pad all of them on the right."""
        real = self.attention_mask[rows].any(0).nonzero()
        width = int(real[-1]) + 1 if len(real) else 1
        return Tokens(
            self.ids[rows, :width],
            self.attention_mask[rows, :width],
            self.response_mask[rows, :width],
            self.group[rows],
            {name: _pick(value, rows, self.ids.shape, width) for name, value in self.extras.items()},
        )


def _pick(value: Any, rows: Tensor, shape: torch.Size, width: int) -> Any:
    """Rows (and, of an [N, T] array, the first ``width`` columns) of a per-row value."""
    if isinstance(value, Tensor):
        return value[rows, :width] if value.ndim >= 2 and value.shape[:2] == shape else value[rows]
    return [value[i] for i in rows.tolist()]


class _Rows:
    """Cutting a batch by rows, for batches whose fields are all per row or (``_pairs``) per pair of rows."""

    _pairs: tuple[str, ...] = ()
    tokens: Tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order, with the pairs whose two rows are both among them."""
        tokens = self.tokens.select(rows)
        changes: dict[str, Any] = {"tokens": tokens}
        if self._pairs:
            new_number = rows.new_full((len(self.tokens),), -1)
            new_number[rows] = torch.arange(len(rows), device=rows.device)
            chosen, rejected = new_number[self.chosen], new_number[self.rejected]  # type: ignore[attr-defined]
            kept = (chosen >= 0) & (rejected >= 0)
            changes |= {"chosen": chosen[kept], "rejected": rejected[kept]}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.name in changes or not isinstance(value, Tensor):
                continue
            if f.name in self._pairs:
                changes[f.name] = value[kept]
            else:
                changes[f.name] = _pick(value, rows, self.tokens.ids.shape, tokens.ids.shape[1])
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class Comparisons(_Rows):
    """Which of two rows was preferred.

    Attributes:
        tokens: the rows; both rows of a pair have the same group.
        chosen, rejected: int64 [P], row numbers.
        weight: float [P] >= 0 or None (= 1 each). Each pair of a ranking of K weighs 1/(number of its pairs), which is
            1/C(K,2) without ties.
        probability: float [P] in [0, 1] or None (= 1): how surely ``chosen`` is preferred.
        margin: float [P] in reward units or None (= 0): by how much.
        reference_logprobs: float [N], summed over the response; filled by ``prepare``.
        scores: float [N], what the reward says of the rows, where they were sampled.
    """

    tokens: Tokens
    chosen: Tensor
    rejected: Tensor
    weight: Tensor | None = None
    probability: Tensor | None = None
    margin: Tensor | None = None
    reference_logprobs: Tensor | None = None
    scores: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)

    _pairs = ("chosen", "rejected", "weight", "probability", "margin")


@dataclass(frozen=True)
class Rankings(_Rows):
    """The order of all rows of a group.

    Attributes:
        tokens: the rows.
        rank: int64 [N], 1 = best, equal = tie within the group.
        reference_logprobs: float [N], filled by ``prepare``.
    """

    tokens: Tokens
    rank: Tensor
    reference_logprobs: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgements(_Rows):
    """Each row on its own: good or bad.

    Attributes:
        tokens: the rows.
        desirable: bool [N].
        reference_logprobs: float [N], filled by ``prepare``.
        kl: float [N] or None, the batch's divergence as one number a row; filled by ``prepare`` (KTO).
        rewards: float [N] or None, implicit rewards of the policy as it is; filled by ``prepare`` (BCO).
    """

    tokens: Tokens
    desirable: Tensor
    reference_logprobs: Tensor | None = None
    kl: Tensor | None = None
    rewards: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectories(_Rows):
    """Sampled responses with all that a policy-gradient loss needs; made by ``prepare``.

    Attributes:
        tokens: the rows.
        logprobs: float [N, T], of the policy that sampled, nats, zero outside the response.
        reference_logprobs: the same of the reference; None for methods without one.
        advantages: float [N, T], zero outside the response.
        scores: float [N], what the reward model says of the response, in its units.
        values, returns: float [N, T] or None for methods without a value model.
        metrics: what ``prepare`` measured.
    """

    tokens: Tokens
    logprobs: Tensor
    reference_logprobs: Tensor | None
    advantages: Tensor
    scores: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)


Batch = Tokens | Comparisons | Rankings | Judgements | Trajectories
B = TypeVar("B", bound=Any)


class Scored(NamedTuple):
    """What a reward says of N responses: the scores to optimise, and the named parts they were made of."""

    scores: Tensor  # float [N], reward units
    parts: Mapping[str, Tensor]  # name -> float [N], unweighted; empty when there is only one


class Reward(Protocol):
    """A reward that is not a scalar head on ids: a function, a classifier with its own tokenizer, a weighted sum."""

    def __call__(self, tokens: Tokens) -> Scored: ...


@dataclass
class Models:
    """The four roles. A role that a method does not need is None.

    Attributes:
        policy: a causal language model, trained.
        reference: a frozen causal language model, or ``models.roles.AdapterOff(policy)``.
        reward: a sequence classifier with one label on any backbone, or a ``Reward``.
        value: a sequence classifier with one label on any backbone, read at every token.
    """

    policy: nn.Module | None = None
    reference: nn.Module | None = None
    reward: nn.Module | Reward | None = None
    value: nn.Module | None = None


@runtime_checkable
class Method(Protocol):
    """What the loop asks of a method. For the type checker: nothing inherits from it.

    ``needs`` and ``trains`` name roles. ``reads`` names the records: "demonstrations", "comparisons", "corrections",
    "rankings", "judgements" or "prompts"; a method that reads prompts is handed sampled ``Tokens``. Where a setting
    decides whether a role is needed, the class says what the defaults need and an instance what it needs itself.

    What a method may have besides: ``refuses``, names of facts about pairs ("margin", "probability") that its loss has
    no place for; ``asks_reference``, "rows" = nothing but the summed log-probs of the batch's own rows, which are then
    computed once before training, "rows and more" = other things too; ``at_reference()``, what its metrics are while
    policy and reference are the same weights; ``adapt``, ``stop`` and ``finished``; ``trust_region``, how far the policy
    may move at once (``training.trust_region``); ``group_size``, responses to a prompt unless ``samples_per_prompt`` is
    set, and above 1 of a method that cannot do with one; ``refills``, how often a batch may be filled up with further
    prompts when ``prepare`` leaves groups out; ``drawn_by``, who draws the responses to each prompt, where that is not
    the policy alone, and ``mixture``, the reference's share in a mixture (``training.rollouts``; docs/decisions/0002); ``off_policy``,
    what makes its loss right for responses that an older policy drew: "weights" = an importance weight on the gradient of
    each response, "nothing" = it is right whoever drew them; without it ``training.rollouts_ahead`` is refused; ``first_look``,
    what in its loss's metrics says once more how probable the policy's own rows are, so that log-probs of the draw may stand for a
    forward pass: "ratio" (and kl/old; with ``off_policy`` "weights" it is understood) or "pairs" (logprob/chosen, logprob/rejected).
    """

    needs: tuple[str, ...]
    trains: tuple[str, ...]
    reads: str

    def prepare(self, models: Models, batch: Any) -> Any:
        """What needs no gradient or looks across the whole batch; once per batch, under ``torch.no_grad``."""

    def loss(self, models: Models, batch: Any) -> dict[str, Mean]:
        """What has a gradient; once per microbatch (some groups). Contains ``"loss"``; the rest are metrics."""


def groups(batch: Batch) -> list[Tensor]:
    """Row numbers of each group, in order of group number: int64 [rows of the group] each."""
    group = batch.tokens.group
    _, counts = torch.unique(group, return_counts=True)
    order = torch.argsort(group, stable=True)
    return list(torch.split(order, counts.tolist()))


def joined(first: B, second: B) -> B:
    """Two batches of sampled rows as one: group numbers go on counting, narrow rows are padded, sums are added."""
    one, two = first.tokens, second.tokens
    begin = int(one.group.max()) + 1 if len(one) else 0
    width = max(one.ids.shape[1], two.ids.shape[1])
    extras = {
        name: _stacked(value, two.extras[name], (one, two), width)
        for name, value in one.extras.items()
        if name in two.extras
    }
    ids, attention_mask, response_mask = (
        _stacked(getattr(one, name), getattr(two, name), (one, two), width)
        for name in ("ids", "attention_mask", "response_mask")
    )
    tokens = Tokens(ids, attention_mask, response_mask, torch.cat([one.group, two.group + begin]), extras)
    if isinstance(first, Tokens):
        return tokens  # type: ignore[return-value]
    assert not first._pairs, "rows that were sampled are in no pairs yet"
    changes: dict[str, Any] = {"tokens": tokens, "metrics": dict(first.metrics)}
    for name, mean in second.metrics.items():
        changes["metrics"][name] = changes["metrics"][name] + mean if name in first.metrics else mean
    for f in fields(first):
        value = getattr(first, f.name)
        if isinstance(value, Tensor):
            changes[f.name] = _stacked(value, getattr(second, f.name), (one, two), width)
    return replace(first, **changes)


def _stacked(above: Any, below: Any, rows: tuple[Tokens, Tokens], width: int) -> Any:
    """One per-row value below the other; an [N, T] array gets zero columns on the right up to ``width``."""
    if not isinstance(above, Tensor):
        return [*above, *below]
    parts = []
    for part, tokens in zip((above, below), rows, strict=True):
        if part.ndim >= 2 and part.shape[:2] == tokens.ids.shape:
            part = torch.cat([part, part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])], 1)
        parts.append(part)
    return torch.cat(parts)


def microbatches(batch: B, max_tokens: int) -> Iterator[B]:
    """Cut a batch at group boundaries into parts of at most ``max_tokens`` real tokens.

    Groups are taken by length, so that rows of a part pad little; a group is never cut, even when it alone is longer.
    """
    parts = groups(batch)
    lengths = batch.tokens.attention_mask.sum(-1)
    size = [int(lengths[rows].sum()) for rows in parts]
    longest = [int(lengths[rows].max()) for rows in parts]
    current: list[Tensor] = []
    held = 0
    for i in sorted(range(len(parts)), key=lambda i: (longest[i], i)):
        if current and held + size[i] > max_tokens:
            yield batch.select(torch.cat(current))
            current, held = [], 0
        current.append(parts[i])
        held += size[i]
    if current:
        yield batch.select(torch.cat(current))


def moved(value: Any, device: torch.device) -> Any:
    """A batch, or anything inside one, with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, Tokens | _Rows):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})  # type: ignore
    return value
