"""How far a policy moves when its weights do: full-vocabulary KL at response tokens, and products with its Hessian.

Everything here goes through the model's own forward in plain operations, because a second derivative is asked of it; the
fast kernels of ``forward`` and ``trunk`` have a first one only. Logits of one bucket of rows are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from palate.models.forward import _buckets, _unwrap
from palate.types import Tokens


def response_distributions(model: nn.Module, tokens: Tokens, *, temperature: float = 1.0) -> Iterator[Tensor]:
    """Log-probabilities of every token of the vocabulary at each response token, some rows at a time: [M, V], nats.

    Twice differentiable. The order of rows depends on lengths only, so two calls for the same rows agree.
    """
    inner, adapter = _unwrap(model)
    for bucket in _buckets(tokens, inner):
        with adapter(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            logits = inner(input_ids=bucket.ids, use_cache=False).logits
        yield (logits[bucket.row, bucket.position - 1] / temperature).log_softmax(-1)


def fisher_product(
    model: nn.Module, tokens: Tokens, parameters: Sequence[Tensor], vector: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """F v, with F = sum over response tokens of the Hessian of KL(pi_old(.|s) || pi(.|s)) at pi = pi_old; [D].

    The gradient of (gradient of the KL) . v: the KL is of the whole vocabulary, not of sampled tokens, whose Hessian is
    F only on average (Schulman et al. 2015, arXiv:1502.05477, appendix C).

    Args:
        parameters: what F is over; their sizes add up to D.
        vector: [D].
    """
    total = torch.zeros_like(vector)
    parts = _cut(vector, parameters)
    for log_p in response_distributions(model, tokens, temperature=temperature):
        kl = (log_p.detach().exp() * (log_p.detach() - log_p)).sum()
        slopes = torch.autograd.grad(kl, parameters, create_graph=True, allow_unused=True)
        along = [(slope * part).sum() for slope, part in zip(slopes, parts, strict=True) if slope is not None]
        if not along:
            continue
        products = torch.autograd.grad(torch.stack(along).sum(), parameters, allow_unused=True, materialize_grads=True)
        total += flat(products)
    return total


@torch.no_grad()
def kl_to_moved(
    model: nn.Module,
    tokens: Tokens,
    parameters: Sequence[Tensor],
    old: Tensor,
    new: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Sum over response tokens of KL(pi_old(.|s) || pi_new(.|s)), whole vocabulary, nats; the model is left at ``new``.

    Args:
        old, new: weights, [D], as ``flat`` gives them.
    """
    before, after = (response_distributions(model, tokens, temperature=temperature) for _ in range(2))
    total = torch.zeros((), dtype=torch.float64, device=old.device)
    while True:
        put(parameters, old)
        log_p = next(before, None)
        put(parameters, new)
        log_q = next(after, None)
        if log_p is None or log_q is None:
            return total
        total += (log_p.exp() * (log_p - log_q)).double().sum()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of them all, [D]."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def put(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Set the weights to a vector that ``flat`` made."""
    for parameter, part in zip(parameters, _cut(vector, parameters), strict=True):
        parameter.copy_(part)


def _cut(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.view_as(tensor) for part, tensor in zip(parts, like, strict=True)]
