"""From logits to tokens: temperature, top-k, top-p, and one draw by the inverse of the distribution function."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.generation.settings import SamplingSettings


def draw(
    logits: Tensor, uniform: Tensor, settings: SamplingSettings, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row.

    Args:
        logits: float32 [R, V], the model's.
        uniform: float64 [R] in [0, 1), the row's random number; not read when ``settings.temperature`` is 0.
        settings: temperature, top-k and top-p.
        forbidden: int64 [F], tokens that must not be drawn; None = none.

    Returns:
        tokens int64 [R] and their log-probs float32 [R], nats: log-softmax(logits / temperature) over *all* tokens,
        before anything is forbidden or cut off, which is what the trainer computes. Temperature 0 counts as 1 there.
    """
    scaled = logits / settings.temperature if settings.temperature not in (0, 1) else logits
    logprobs = scaled.log_softmax(-1)
    if settings.temperature == 0:
        tokens = _without(logits, forbidden).argmax(-1)
    else:
        probabilities, ids = truncate(_without(logprobs, forbidden), top_k=settings.top_k, top_p=settings.top_p)
        tokens = inverse_cdf(probabilities, uniform)
        if ids is not None:
            tokens = ids.gather(-1, tokens[:, None])[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _without(logits: Tensor, forbidden: Tensor | None) -> Tensor:
    return logits if forbidden is None else logits.index_fill(-1, forbidden, float("-inf"))


def truncate(logprobs: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn and their probabilities.

    First the ``top_k`` most probable tokens are kept, then, of those and with their probabilities made to sum to one,
    the fewest most probable ones that together hold ``top_p``: a token is kept when those before it hold less. At
    least one token is kept. Of equally probable tokens at the border, some are kept, so that never more than ``top_k``
    remain. This is the order and meaning of ``transformers``' top-k and top-p (Holtzman et al. 2019, arXiv:1904.09751).

    Args:
        logprobs: float [R, V], nats; need not be normalised; -inf = never drawn.
        top_k: 0 = all.
        top_p: in (0, 1], 1 = all.

    Returns:
        probabilities float [R, C], not normalised, 0 = not kept; and the ids int64 [R, C] of the columns, None when
        the columns are the vocabulary.
    """
    if top_k:
        values, ids = logprobs.topk(min(top_k, logprobs.shape[-1]))
        return _nucleus(values.softmax(-1), top_p), ids
    if top_p < 1:
        probabilities, ids = _most_probable(logprobs.softmax(-1), top_p)
        return _nucleus(probabilities, top_p), ids
    return logprobs.exp(), None


def _most_probable(probabilities: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """So many tokens of each row, most probable first, that every row's hold ``mass``; a sort of all is slow."""
    size = 64
    while True:
        size = min(size, probabilities.shape[-1])
        values, ids = probabilities.topk(size)
        if size == probabilities.shape[-1] or bool((values.sum(-1) >= mass).all()):
            return values, ids
        size *= 8


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero what follows the nucleus. probabilities: [R, C], falling along a row."""
    if top_p >= 1:
        return probabilities
    before = probabilities.cumsum(-1) - probabilities
    return torch.where(before < top_p, probabilities, 0)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column whose running sum exceeds ``uniform`` of the row's sum; int64 [R].

    One random number a row instead of one a token: drawing 8,192 exponentials a row (``torch.multinomial``) costs more
    than the model's vocabulary projection. Sums are float64, or the tail of a large vocabulary would be rounded away.

    Args:
        weights: float [R, C] >= 0, not all zero. A column of weight 0 is never chosen.
        uniform: float64 [R] in [0, 1 - 2^-52], so that the product below stays under the row's sum.
    """
    running = weights.cumsum(-1, dtype=torch.float64)
    column = torch.searchsorted(running, uniform[:, None] * running[:, -1:], right=True)[:, 0]
    return column.clamp_(max=weights.shape[-1] - 1)  # a row of NaN, reported later, has no such column
