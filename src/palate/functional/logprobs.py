"""Log-probabilities, entropy and KL from hidden states, without ever holding [N, T, V].

The projection to the vocabulary is the largest tensor of a training step. Here it is made for a few hundred tokens at a
time, used, and forgotten; the backward pass makes it again. What is kept for the backward is one number a token --
unless all of it together is small, as with a small vocabulary: then it is kept, and a quarter of the products is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21  # logits alive at once: 8 MB in float32, so that they stay near the processor's cache
KEPT_ELEMENTS = 1 << 23  # so many log-probabilities, 32 MB in float32, are kept for the backward instead of made again


def logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature) at ``targets``, and the entropy of the whole distribution.

    Args:
        hidden: [M, H], the state *before* each target token.
        weight: [V, H], the language model's head; bias [V] or None.
        targets: int64 [M].
        temperature: of the sampling distribution, > 0.
        softcap: logits become softcap * tanh(logits / softcap) before the temperature (Gemma 2), or None.
        with_entropy: False saves a pass and gives zeros.

    Returns:
        log-probabilities [M] and entropies [M], nats, float32 (float64 for float64 input), differentiable in hidden,
        weight and bias; matrix products in hidden's type, all else and the sums of gradients in float32.
    """
    trained = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    keep = trained and softcap is None and len(hidden) * weight.shape[0] <= KEPT_ELEMENTS
    found: tuple[Tensor, Tensor] = _HeadLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, temperature, softcap, with_entropy, keep
    )
    return found


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """Float logits of one chunk [m, V], at the sampling temperature."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits if temperature == 1.0 else logits.div_(temperature)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        weight_, bias_ = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        logprobs, entropies, normalisers, kept = [], [], [], []
        for h, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
            logits = _logits(h, weight_, bias_, temperature, softcap)
            if with_entropy:
                picked = logits.gather(-1, y[:, None]).squeeze(-1)
                top = logits.amax(-1, keepdim=True)
                logits.sub_(top)
                p = logits.exp()
                total = p.sum(-1)
                normaliser = total.log() + top.squeeze(-1)
                entropies.append(total.log() - p.mul_(logits).sum(-1) / total)
                logprobs.append(picked - normaliser)
                if keep:
                    kept.append(logits.sub_(total.log()[:, None]))
            else:
                log_p = logits.log_softmax(-1)  # one kernel, five times as fast as logsumexp
                logprobs.append(log_p.gather(-1, y[:, None]).squeeze(-1))
                normaliser = logits.amax(-1) - log_p.amax(-1)
                entropies.append(torch.zeros_like(normaliser))
                if keep:
                    kept.append(log_p)
            normalisers.append(normaliser)
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        entropy = torch.cat([empty, *entropies])
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat([empty, *normalisers]), entropy, *kept)
        ctx.settings = (temperature, softcap, with_entropy, chunk)
        return torch.cat([empty, *logprobs]), entropy

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong
    def backward(ctx: Any, logprob_grad: Tensor, entropy_grad: Tensor) -> tuple[Tensor | None, ...]:
        """d logp/d logit = onehot - p;   d H/d logit = -p (log p + H);   the chain through tanh and temperature."""
        hidden, weight, bias, targets, normalisers, entropies, *kept = ctx.saved_tensors
        temperature, softcap, with_entropy, chunk = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight_, bias_ = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        use_entropy = with_entropy and bool(entropy_grad.any())
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        float_type = torch.promote_types(weight.dtype, torch.float32)
        low_sum = wants_weight and hidden.dtype != float_type and len(hidden) > 0
        waiting: list[Tensor] = []  # in bf16: slopes of chunks whose product with their states is still to be made
        weight_grad = None
        if wants_weight and not low_sum:
            weight_grad = torch.zeros(weight.shape, dtype=float_type, device=weight.device)
        bias_grad = torch.zeros_like(bias, dtype=float_type) if wants_bias and bias is not None else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            slope = None
            if kept:
                log_p = kept[start // chunk]
            else:
                log_p = _logits(hidden[rows], weight_, bias_, temperature, softcap)
                slope = None if softcap is None else 1 - (log_p * (temperature / softcap)).square_()
                log_p.sub_(normalisers[rows, None])
            p = log_p.exp()
            if use_entropy:
                grad = (log_p + entropies[rows, None]).mul_(-entropy_grad[rows, None]).sub_(logprob_grad[rows, None])
                grad.mul_(p)
            else:
                grad = p.mul_(-logprob_grad[rows, None])
            grad.scatter_add_(-1, targets[rows, None], logprob_grad[rows, None].to(grad.dtype))
            if temperature != 1.0:
                grad.div_(temperature)
            if slope is not None:
                grad.mul_(slope)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            low = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(low, weight_, out=hidden_grad[rows])
            if low_sum:
                waiting.append(low)
                stop, held = min(start + chunk, len(hidden)), sum(map(len, waiting))
                if stop == len(hidden) or held * weight.shape[0] >= KEPT_ELEMENTS:
                    product = torch.cat(waiting).T @ hidden[stop - held : stop]
                    weight_grad = product if weight_grad is None else weight_grad.to(float_type).add_(product)
                    waiting.clear()
            elif weight_grad is not None:
                weight_grad.addmm_(low.T, hidden[rows])
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            *(None,) * 5,
        )


def logprobs_and_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    other_hidden: Tensor,
    other_weight: Tensor,
    *,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    other_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log p at ``targets``, and KL(q || p), of p = softmax(hidden W^T / temperature) and q, the same of the other head.

    Args:
        hidden: [M, H], the state *before* each target token; with weight [V, H] and bias [V] or None.
        targets: int64 [M].
        other_hidden: [M, H'], the other model's states before the same tokens; with other_weight [V, H'] and other_bias.
            They get no gradient.
        temperature: of both distributions, > 0.
        softcap, other_softcap: logits become softcap * tanh(logits / softcap) before the temperature, or None.

    Returns:
        log-probabilities [M] and KL [M] over the whole vocabulary, the expectation taken under q; nats, float32 (float64
        for float64 input), differentiable once in hidden, weight and bias.
    """
    found: tuple[Tensor, Tensor] = _HeadKL.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        targets,
        other_hidden.detach(),
        other_weight.detach(),
        None if other_bias is None else other_bias.detach(),
        temperature,
        softcap,
        other_softcap,
    )
    return found


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        other_hidden: Tensor,
        other_weight: Tensor,
        other_bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        other_softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        weight_, bias_ = _as_states(hidden, weight, bias)
        other_weight_, other_bias_ = _as_states(other_hidden, other_weight, other_bias)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        empty = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        logprobs, divergences, normalisers, other_normalisers = [empty], [empty], [empty], [empty]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p = _logits(hidden[rows], weight_, bias_, temperature, softcap)
            log_q = _logits(other_hidden[rows], other_weight_, other_bias_, temperature, other_softcap)
            top, other_top = log_p.amax(-1), log_q.amax(-1)
            log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)  # one kernel, five times as fast as logsumexp
            normalisers.append(top - log_p.amax(-1))
            other_normalisers.append(other_top - log_q.amax(-1))
            logprobs.append(log_p.gather(-1, targets[rows, None]).squeeze(-1))
            q = log_q.exp()
            divergences.append(log_q.sub_(log_p).masked_fill_(q == 0, 0).mul_(q).sum(-1))  # 0 log 0 = 0
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            targets,
            other_hidden,
            other_weight,
            other_bias,
            torch.cat(normalisers),
            torch.cat(other_normalisers),
        )
        ctx.settings = (temperature, softcap, other_softcap, chunk)
        return torch.cat(logprobs), torch.cat(divergences).to(empty.dtype)

    @staticmethod
    @once_differentiable  # a second derivative would be silently wrong
    def backward(ctx: Any, logprob_grad: Tensor, kl_grad: Tensor) -> tuple[Tensor | None, ...]:
        """d logp/d logit = onehot - p;   d KL(q || p)/d logit = p - q;   the chain through tanh and temperature."""
        hidden, weight, bias, targets, other_hidden, other_weight, other_bias, normalisers, other_normalisers = (
            ctx.saved_tensors
        )
        temperature, softcap, other_softcap, chunk = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight_, bias_ = _as_states(hidden, weight, bias)
        other_weight_, other_bias_ = _as_states(other_hidden, other_weight, other_bias)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        float_type = torch.promote_types(weight.dtype, torch.float32)
        weight_grad = torch.zeros(weight.shape, dtype=float_type, device=weight.device) if wants_weight else None
        bias_grad = torch.zeros_like(bias, dtype=float_type) if wants_bias and bias is not None else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            log_p = _logits(hidden[rows], weight_, bias_, temperature, softcap)
            slope = None if softcap is None else 1 - (log_p * (temperature / softcap)).square_()
            q = _logits(other_hidden[rows], other_weight_, other_bias_, temperature, other_softcap)
            q.sub_(other_normalisers[rows, None]).exp_()
            p = log_p.sub_(normalisers[rows, None]).exp_()
            # By difference first: where p is q nothing is left, however large the factors.
            grad = (p - q.to(p.dtype)).mul_(kl_grad[rows, None]).sub_(p.mul_(logprob_grad[rows, None]))
            grad.scatter_add_(-1, targets[rows, None], logprob_grad[rows, None].to(grad.dtype))
            if temperature != 1.0:
                grad.div_(temperature)
            if slope is not None:
                grad.mul_(slope)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            low = grad.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(low, weight_, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad += low.T @ hidden[rows]
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
            *(None,) * 7,
        )


def _as_states(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head in the type of the states that it reads."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
