"""The only place that calls a transformer for training or scoring.

Callers hand in rows and get [N, T] or [N]; how it is computed is nobody else's business:

* models that ``trunk.py`` knows run on real tokens alone, with a group's shared prompt computed once; of others rows are
  sorted by length and run in small buckets, so that padding costs little and no batch is ever too large;
* real tokens are moved to the front of their row first, so that padding on either side, and whatever padded slots hold,
  never changes a result; a causal model then needs no attention mask, which is the fast path of every kernel;
* the vocabulary projection is made only where a response token is, in chunks (``functional.logprobs``);
* the one shift of the library is here: the state at token t - 1 speaks about token t.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from palate.errors import ModelError
from palate.functional.divergences import exact_kl
from palate.functional.importance import gradient_times
from palate.functional.logprobs import logprobs_and_kl
from palate.models import trunk
from palate.models.activations import Context, checkpointing_layers, checkpoints_activations
from palate.models.heads import scalar_head
from palate.models.memo import read_once
from palate.models.plain_head import plain_head
from palate.models.rotary import turning_length
from palate.models.samples import check_scores
from palate.types import Reward, Scored, Tokens, groups

_NOTHING_BEFORE = "a row begins with a response token: nothing comes before it to predict it from"
BUCKET_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens of one trunk call; larger only costs memory


def token_logprobs(model: nn.Module, tokens: Tokens, *, temperature: float = 1.0) -> Tensor:
    """log p(ids[:, t] | ids[:, <t]) at response tokens, zero elsewhere.

    Args:
        model: a causal language model, ``AdapterOff`` or an adapter around one.
        tokens: rows [N, T].
        temperature: of the sampling distribution.

    Returns:
        float32 [N, T], nats.
    """
    return _logprobs(model, tokens, temperature, with_entropy=False)[0]


def token_logprobs_and_entropy(model: nn.Module, tokens: Tokens, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` and the entropy of the whole next-token distribution there; [N, T] each, nats.

    The gradient through a token counts ``extras["importance"]`` times, where the rows have it: an older policy drew them.
    """
    logprobs, entropy = _logprobs(model, tokens, temperature, with_entropy=True)
    weights = tokens.extras.get("importance")
    if isinstance(weights, Tensor):
        return gradient_times(logprobs, weights), gradient_times(entropy, weights)
    return logprobs, entropy


def token_kl(model: nn.Module, other: nn.Module, tokens: Tokens, *, temperature: float = 1.0) -> Tensor:
    """KL(other || model) of the whole next-token distributions in which response tokens stood, zero elsewhere.

        KL_t = sum_v other(v | ids[:, <t]) * log( other(v | ids[:, <t]) / model(v | ids[:, <t]) )

    The expectation is under ``other``: with the reference as other it is TDPO's KL(ref || pi), with the policy as it was
    before an update TRPO's KL(old || new). Exact, over all V tokens; [N, T, V] is never held.

    Args:
        model: a causal language model; the gradient goes to its weights alone, and can be taken once.
        other: a model of the same vocabulary, or ``AdapterOff(model)``; no gradient.
        tokens: rows [N, T].
        temperature: of both distributions.

    Returns:
        float32 [N, T], nats.

    Raises:
        ModelError: the two models have vocabularies of unlike size.
    """
    return token_logprobs_and_kl(model, other, tokens, temperature=temperature)[1]


def token_logprobs_and_kl(
    model: nn.Module, other: nn.Module, tokens: Tokens, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` of ``model`` and ``token_kl``, with one pass of each model; [N, T] each, nats."""
    parts = list(_logprobs_and_kl(model, other, tokens, temperature))
    logprobs = [(row, column, logprob) for row, column, logprob, _ in parts]
    return _scatter(tokens, logprobs), _scatter(tokens, [(row, column, kl) for row, column, _, kl in parts])


def response_logprobs(model: nn.Module, tokens: Tokens) -> Tensor:
    """log p(response | prompt), summed over response tokens; float32 [N], nats."""
    return token_logprobs(model, tokens).sum(-1)


def token_values(model: nn.Module, tokens: Tokens) -> Tensor:
    """The scalar model's value of the state in which each response token was chosen; [N, T], zero elsewhere."""
    return _scatter(tokens, [(read.row, read.column, _scalar(model, read.states)) for read in _run(model, tokens)])


def response_scores(model: nn.Module, tokens: Tokens) -> Tensor:
    """The scalar model's score of each whole response, read at its last token; float32 [N], reward units."""
    parts = [
        (read.row, torch.zeros_like(read.column), _scalar(model, read.states))
        for read in _run(model, tokens, at_last=True)
    ]
    return _scatter(tokens, parts)[:, 0]


def context_length(model: nn.Module) -> int | None:
    """Tokens of a row that the model has positions for; None = it names no limit."""
    inner, _ = _unwrap(model)
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    return getattr(config, "max_position_embeddings", None)


def score_responses(reward: nn.Module | Reward, tokens: Tokens, name: str = "") -> Scored:
    """Scores from any kind of reward: a scalar model on the same ids, or a ``Reward`` that reads text.

    Args:
        name: for errors; the reward's own by default.
    Raises:
        ModelError: not one finite score for each row; the first bad sample is shown.
    """
    scored = Scored(response_scores(reward, tokens), {}) if isinstance(reward, nn.Module) else reward(tokens)
    check_scores(scored.scores, tokens, reward, name)
    return scored


class _Bucket(NamedTuple):
    """Some rows, real tokens first, and where their response tokens are here and in the caller's arrays."""

    ids: Tensor  # int64 [n, W]
    row: Tensor  # int64 [M], of each response token, in order of row and position
    position: Tensor  # int64 [M]
    source_row: Tensor  # int64 [M]
    source_column: Tensor  # int64 [M]


def _scatter(tokens: Tokens, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """(rows, columns, values) of every bucket, put where they belong in zeros [N, T]."""
    device = tokens.ids.device
    if not parts:
        return torch.zeros(tokens.ids.shape, device=device)
    rows, columns, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return torch.zeros(tokens.ids.shape, dtype=values.dtype, device=device).index_put((rows, columns), values)


def _buckets(tokens: Tokens, *models: Any) -> Iterator[_Bucket]:
    """Rows by length, longest first, each bucket of at most ``BUCKET_TOKENS`` padded tokens.

    No bucket holds rows on both sides of a length that changes the rotary angles of one of the models that run it.
    """
    budget = BUCKET_TOKENS.get(tokens.ids.device.type, 16384)
    lengths = tokens.attention_mask.sum(-1)
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    limits = [turning_length(model) for model in models]
    turned = [sum(length > limit for length in sorted_lengths) for limit in limits]
    start = 0
    while start < len(order) and sorted_lengths[start]:
        stop = start + max(1, budget // sorted_lengths[start])
        stop = min([stop, *(rows for rows in turned if rows > start)])
        yield _bucket(tokens, order[start:stop], sorted_lengths[start])
        start = stop


def _bucket(tokens: Tokens, rows: Tensor, width: int) -> _Bucket:
    real = tokens.attention_mask[rows]
    source = torch.argsort(~real, dim=-1, stable=True)[:, :width]  # real tokens first, in their order
    ids = tokens.ids[rows].gather(1, source).masked_fill(~real.gather(1, source), 0)
    row, position = (tokens.response_mask[rows] & real).gather(1, source).nonzero(as_tuple=True)
    assert not (position == 0).any(), _NOTHING_BEFORE
    return _Bucket(ids, row, position, rows[row], source[row, position])


class _Read(NamedTuple):
    """Last hidden states, and the response tokens that they speak about."""

    states: Tensor  # [M, H]
    row: Tensor  # int64 [M], in the caller's arrays
    column: Tensor  # int64 [M]
    target: Tensor  # int64 [M], the token


def _run(model: nn.Module, tokens: Tokens, *, at_last: bool = False) -> Iterator[_Read]:
    """The state before every response token, or (``at_last``) the one at each row's last, some rows at a time."""
    inner, adapter = _unwrap(model)
    way = _flat if _has_flat_trunk(inner) else _padded
    if at_last or adapter is not contextlib.nullcontext:
        yield from way(inner, adapter, tokens, at_last)
    else:
        yield from read_once(inner, tokens, lambda: way(inner, adapter, tokens, at_last))


_flat_trunk: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _has_flat_trunk(model: Any) -> bool:
    """Can ``trunk`` run the model, and does it give the model's own states? Found out by trying, once a model."""
    if not trunk.supported(model):
        return False
    if model not in _flat_trunk:
        _flat_trunk[model] = _agrees_flat(model)
    return _flat_trunk[model]


@torch.no_grad()
def _agrees_flat(model: Any) -> bool:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(36).view(3, 12) * 7) % vocabulary
    ids[1, :5] = ids[0, :5]  # two rows that share a prompt, and one alone
    column = torch.arange(12).expand(3, 12)
    real, response = column < torch.tensor([[12], [9], [10]]), column > 4
    tokens = Tokens(ids, real, real & response, torch.tensor([0, 0, 1]))
    ways = [[*way(model, contextlib.nullcontext, tokens, False)] for way in (_padded, _flat)]
    own, flat = (_wide(_scatter_states(tokens, reads)) for reads in ways)
    low = torch.bfloat16 in (next(model.parameters()).dtype, getattr(model, "compute_dtype", None))
    if low:  # of all states together: every layer rounds twice, and the largest of thousands of differences says little
        return bool((own - flat).norm() <= 5e-2 * own.norm())
    return bool(torch.allclose(own, flat, atol=1e-3, rtol=1e-3))


def _scatter_states(tokens: Tokens, reads: list[_Read]) -> Tensor:
    """States of several reads in the order of the caller's rows and columns: [M, H]."""
    row, column, states = (torch.cat(part) for part in zip(*((r.row, r.column, r.states) for r in reads), strict=True))
    return states[torch.argsort(row * tokens.ids.shape[1] + column)]


def _padded(model: Any, adapter: Context, tokens: Tokens, at_last: bool) -> Iterator[_Read]:
    """Through the model's own forward, bucket by bucket."""
    for bucket in _buckets(tokens, model):
        with adapter(), _autocast(model, bucket.ids.device), checkpointing_layers(model, adapter):
            hidden = model.base_model(input_ids=bucket.ids, use_cache=False).last_hidden_state
        row, position = bucket.row, bucket.position
        chosen = torch.ones_like(row, dtype=torch.bool)
        if at_last:
            chosen[:-1] = row[1:] != row[:-1]
        row, position = row[chosen], position[chosen]
        yield _Read(
            hidden[row, position if at_last else position - 1],
            bucket.source_row[chosen],
            bucket.source_column[chosen],
            bucket.ids[row, position],
        )


def _flat(model: Any, adapter: Context, tokens: Tokens, at_last: bool) -> Iterator[_Read]:
    """Through ``trunk``, some groups at a time."""
    if not tokens.response_mask.any():  # nothing is read; a loss over nothing still has a gradient, zero
        weight, nothing = model.get_input_embeddings().weight, tokens.ids.new_zeros(0)
        yield _Read(weight[:0], nothing, nothing, nothing)
        return
    for rows in _some_groups(tokens):
        plan: list[list[trunk.Row]] = []
        numbers, columns, targets, wanted = [], [], [], []
        begun = 0
        for group in rows:
            plan.append([])
            for number in group:
                source = tokens.attention_mask[number].nonzero()[:, 0]
                positions = tokens.response_mask[number, source].nonzero()[:, 0]
                if not len(positions):
                    continue
                if at_last:
                    positions = positions[-1:]
                assert int(positions[0]) > 0, _NOTHING_BEFORE
                where = positions if at_last else positions - 1
                ids = tokens.ids[number, source]
                first, last = int(where[0]), int(where[-1])
                plan[-1].append(trunk.Row(ids[: last + 1].tolist(), first))
                wanted.append(where - first + begun)
                begun += last + 1 - first
                numbers.append(torch.full_like(positions, number))
                columns.append(source[positions])
                targets.append(ids[positions])
        if numbers:
            with adapter(), _autocast(model, tokens.ids.device):
                again = adapter if checkpoints_activations(model) else None
                states = trunk.states(model, trunk.layout([group for group in plan if group]), again)
            index = torch.cat(wanted)
            states = states if len(index) == len(states) else states[index]
            yield _Read(states, torch.cat(numbers), torch.cat(columns), torch.cat(targets))


def _some_groups(tokens: Tokens) -> Iterator[list[list[int]]]:
    """Row numbers, group by group, of at most ``BUCKET_TOKENS`` tokens."""
    budget = BUCKET_TOKENS["cpu"]
    lengths = tokens.attention_mask.sum(-1).tolist()
    held = 0
    part: list[list[int]] = []
    for rows in groups(tokens):
        size = sum(lengths[row] for row in rows.tolist())
        if part and held + size > budget:
            yield part
            held, part = 0, []
        part.append(rows.tolist())
        held += size
    if part:
        yield part


def _unwrap(model: nn.Module) -> tuple[Any, Context]:
    """The Hugging Face model inside an adapter or ``AdapterOff``, and the context to run it in."""
    context = getattr(model, "context", contextlib.nullcontext)
    model = getattr(model, "policy", model) if context is not contextlib.nullcontext else model
    get_base_model = getattr(model, "get_base_model", None)
    return (get_base_model() if get_base_model else model), context


def _autocast(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products over fp32 weights, when the model was loaded so (``compute_dtype``)."""
    dtype = getattr(model, "compute_dtype", None)
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def _scalar(model: nn.Module, states: Tensor) -> Tensor:
    """Head, in float32 at least, and normalisation: [M, H] -> [M], reward units."""
    inner, _ = _unwrap(model)
    head = scalar_head(inner)
    states = _wide(states)
    if isinstance(head, nn.Linear) and head.weight.dtype != states.dtype:  # a bf16 model not from ``load_scalar``
        bias = None if head.bias is None else head.bias.to(states.dtype)
        raw = functional.linear(states, head.weight.to(states.dtype), bias).squeeze(-1)
    else:
        raw = head(states).squeeze(-1)
    return (raw - getattr(inner.config, "score_mean", 0.0)) / getattr(inner.config, "score_std", 1.0)


def _logprobs(model: nn.Module, tokens: Tokens, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    inner, adapter = _unwrap(model)
    head = plain_head(inner)
    found = (
        _whole_model(inner, adapter, tokens, temperature)
        if head is None
        else (
            (read.row, read.column, *head(read.states, read.target, temperature, with_entropy))
            for read in _run(model, tokens)
        )
    )
    logprobs, entropies = [], []
    for row, column, logprob, entropy in found:
        logprobs.append((row, column, logprob))
        entropies.append((row, column, entropy))
    return _scatter(tokens, logprobs), _scatter(tokens, entropies if with_entropy else [])


def _whole_model(
    model: Any, adapter: Context, tokens: Tokens, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The slow way, right for any model: all logits of a bucket, then the response tokens' rows."""
    for bucket in _buckets(tokens, model):
        with adapter(), _autocast(model, bucket.ids.device), checkpointing_layers(model, adapter):
            logits = model(input_ids=bucket.ids, use_cache=False).logits
        logp = (_wide(logits[bucket.row, bucket.position - 1]) / temperature).log_softmax(-1)
        entropy = -(logp.exp() * torch.where(logp > -torch.inf, logp, 0)).sum(-1)
        target = bucket.ids[bucket.row, bucket.position]
        yield bucket.source_row, bucket.source_column, logp.gather(-1, target[:, None]).squeeze(-1), entropy


def _logprobs_and_kl(
    model: nn.Module, other: nn.Module, tokens: Tokens, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, columns, log-probs of ``model``, KL(other || model)."""
    head, other_head = plain_head(_unwrap(model)[0]), plain_head(_unwrap(other)[0])
    if head is None or other_head is None:
        yield from _whole_models(model, other, tokens, temperature)
        return
    _check_vocabularies(len(head.weight), len(other_head.weight))
    reads = list(_run(model, tokens))
    if not reads:
        return
    with torch.no_grad():
        other_states = _scatter_states(tokens, list(_run(other, tokens)))
    row, column = tokens.response_mask.nonzero(as_tuple=True)  # in the order of _scatter_states
    logprobs, kl = logprobs_and_kl(
        head.scaled(_scatter_states(tokens, reads)),
        head.weight,
        tokens.ids[row, column],
        other_head.scaled(other_states),
        other_head.weight,
        bias=head.bias,
        other_bias=other_head.bias,
        temperature=temperature,
        softcap=head.softcap,
        other_softcap=other_head.softcap,
    )
    yield row, column, logprobs, kl


def _whole_models(
    model: nn.Module, other: nn.Module, tokens: Tokens, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The same, the slow way: all logits of a bucket, of both models."""
    for bucket in _buckets(tokens, _unwrap(model)[0], _unwrap(other)[0]):
        found = []
        for role, gradient in ((model, torch.is_grad_enabled()), (other, False)):
            inner, adapter = _unwrap(role)
            with torch.set_grad_enabled(gradient), adapter(), _autocast(inner, bucket.ids.device):
                logits = inner(input_ids=bucket.ids, use_cache=False).logits
                found.append(_wide(logits[bucket.row, bucket.position - 1]) / temperature)
        logits, other_logits = found
        _check_vocabularies(logits.shape[-1], other_logits.shape[-1])
        target = bucket.ids[bucket.row, bucket.position]
        logprobs = logits.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        yield bucket.source_row, bucket.source_column, logprobs, exact_kl(other_logits, logits)


def _check_vocabularies(size: int, other_size: int) -> None:
    if size != other_size:
        raise ModelError(
            f"The KL over the whole vocabulary compares the two models token by token, but the policy has {size} logits and "
            f"the reference {other_size}. Take a reference with the policy's own vocabulary (without --reference it is a copy)."
        )


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
