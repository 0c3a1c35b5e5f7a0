"""The only place that calls a transformer for training or scoring.

Callers hand in rows and get [N, T] or [N]; how it is computed is nobody else's business:

* rows are sorted by length and run in small buckets, so that padding costs little and no batch is ever too large;
* real tokens are moved to the front of their row first, so that padding on either side, and whatever padded slots hold,
  never changes a result; a causal model then needs no attention mask, which is the fast path of every kernel;
* the vocabulary projection is made only where a response token is, in chunks (``functional.logprobs``);
* the one shift of the library is here: the state at token t - 1 speaks about token t.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.functional.logprobs import logprobs_and_entropy
from palate.models.heads import scalar_head
from palate.types import Reward, Scored, Tokens

BUCKET_TOKENS = {"cpu": 1024, "cuda": 16384}  # padded tokens of one trunk call; larger only costs memory


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


def token_logprobs_and_entropy(
    model: nn.Module, tokens: Tokens, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``token_logprobs`` and the entropy of the whole next-token distribution there; [N, T] each, nats."""
    return _logprobs(model, tokens, temperature, with_entropy=True)


def response_logprobs(model: nn.Module, tokens: Tokens) -> Tensor:
    """log p(response | prompt), summed over response tokens; float32 [N], nats."""
    return token_logprobs(model, tokens).sum(-1)


def token_values(model: nn.Module, tokens: Tokens) -> Tensor:
    """The scalar model's value of the state in which each response token was chosen; [N, T], zero elsewhere."""
    return _scatter(
        tokens,
        [
            (bucket.source_row, bucket.source_column, _scalar(model, hidden[bucket.row, bucket.position - 1]))
            for bucket, hidden in _run(model, tokens)
        ],
    )


def response_scores(model: nn.Module, tokens: Tokens) -> Tensor:
    """The scalar model's score of each whole response, read at its last token; float32 [N], reward units."""
    parts = []
    for bucket, hidden in _run(model, tokens):
        last = torch.ones_like(bucket.row, dtype=torch.bool)
        last[:-1] = bucket.row[1:] != bucket.row[:-1]
        state = hidden[bucket.row[last], bucket.position[last]]
        parts.append((bucket.source_row[last], torch.zeros_like(bucket.row[last]), _scalar(model, state)))
    return _scatter(tokens, parts)[:, 0]


def score_responses(reward: nn.Module | Reward, tokens: Tokens) -> Scored:
    """Scores from any kind of reward: a scalar model on the same ids, or a ``Reward`` that reads text."""
    if isinstance(reward, nn.Module):
        return Scored(response_scores(reward, tokens), {})
    return reward(tokens)


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


def _buckets(tokens: Tokens) -> Iterator[_Bucket]:
    """Rows by length, longest first, each bucket of at most ``BUCKET_TOKENS`` padded tokens."""
    budget = BUCKET_TOKENS.get(tokens.ids.device.type, 16384)
    lengths = tokens.attention_mask.sum(-1)
    order = torch.argsort(lengths, descending=True, stable=True)
    sorted_lengths = lengths[order].tolist()
    start = 0
    while start < len(order) and sorted_lengths[start]:
        stop = start + max(1, budget // sorted_lengths[start])
        yield _bucket(tokens, order[start:stop], sorted_lengths[start])
        start = stop


def _bucket(tokens: Tokens, rows: Tensor, width: int) -> _Bucket:
    real = tokens.attention_mask[rows]
    source = torch.argsort(~real, dim=-1, stable=True)[:, :width]  # real tokens first, in their order
    ids = tokens.ids[rows].gather(1, source).masked_fill(~real.gather(1, source), 0)
    row, position = (tokens.response_mask[rows] & real).gather(1, source).nonzero(as_tuple=True)
    assert not (position == 0).any(), "a row begins with a response token: nothing comes before it to predict it from"
    return _Bucket(ids, row, position, rows[row], source[row, position])


def _run(model: nn.Module, tokens: Tokens) -> Iterator[tuple[_Bucket, Tensor]]:
    """Each bucket with the trunk's last hidden states [n, W, H]."""
    inner, adapter = _unwrap(model)
    for bucket in _buckets(tokens):
        with adapter(), _autocast(inner, bucket.ids.device):
            hidden = inner.base_model(input_ids=bucket.ids, use_cache=False).last_hidden_state
        yield bucket, hidden


def _unwrap(model: nn.Module) -> tuple[Any, Callable[[], contextlib.AbstractContextManager[Any]]]:
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
    """Head, in float32, and normalisation: [M, H] -> [M], reward units."""
    inner, _ = _unwrap(model)
    raw = scalar_head(inner)(states.float()).squeeze(-1)
    return (raw - getattr(inner.config, "score_mean", 0.0)) / getattr(inner.config, "score_std", 1.0)


def _logprobs(model: nn.Module, tokens: Tokens, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
    inner, adapter = _unwrap(model)
    head = _plain_head(inner)
    logprobs, entropies = [], []
    for bucket, (logprob, entropy) in (
        _whole_model(inner, adapter, tokens, temperature)
        if head is None
        else (
            (bucket, head(hidden[bucket.row, bucket.position - 1], _targets(bucket), temperature, with_entropy))
            for bucket, hidden in _run(model, tokens)
        )
    ):
        logprobs.append((bucket.source_row, bucket.source_column, logprob))
        entropies.append((bucket.source_row, bucket.source_column, entropy))
    return _scatter(tokens, logprobs), _scatter(tokens, entropies if with_entropy else [])


def _targets(bucket: _Bucket) -> Tensor:
    return bucket.ids[bucket.row, bucket.position]


_Head = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _plain_head(model: Any) -> _Head | None:
    """The model's own head as a chunked function, or None when it does something that we do not know of.

    Known: a linear layer, Gemma's soft cap, Cohere's and Granite's scale. Whether that is all is found out by trying, once
    a model.
    """
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(linear) is not nn.Linear:
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def head(states: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor]:
        states = states if scale == 1.0 else states * scale
        return logprobs_and_entropy(
            states,
            linear.weight,
            targets,
            bias=linear.bias,
            temperature=temperature,
            softcap=softcap,
            with_entropy=with_entropy,
        )

    if model not in _plain:
        _plain[model] = _agrees(model, head)
    return head if _plain[model] else None


@torch.no_grad()
def _agrees(model: Any, head: _Head) -> bool:
    """Does ``head`` on the trunk's states give the log-probs of the model's own logits?"""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.get_output_embeddings().weight.shape[0]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
    ours, _ = head(hidden[0, :-1], ids[0, 1:], 1.0, False)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
    return bool(torch.allclose(ours.float(), own.gather(-1, ids[0, 1:, None]).squeeze(-1), atol=tolerance, rtol=tolerance))


def _whole_model(
    model: Any, adapter: Callable[[], Any], tokens: Tokens, temperature: float
) -> Iterator[tuple[_Bucket, tuple[Tensor, Tensor]]]:
    """The slow way, right for any model: all logits of a bucket, then the response tokens' rows."""
    for bucket in _buckets(tokens):
        with adapter(), _autocast(model, bucket.ids.device):
            logits = model(input_ids=bucket.ids, use_cache=False).logits
        logp = (logits[bucket.row, bucket.position - 1].float() / temperature).log_softmax(-1)
        yield bucket, (logp.gather(-1, _targets(bucket)[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1))

