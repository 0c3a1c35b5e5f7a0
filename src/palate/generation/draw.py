"""From logits to tokens: temperature, top-k, top-p, and one draw by the inverse of the distribution function."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.generation.settings import SamplingSettings


def draw(
    logits: Tensor,
    uniform: Tensor,
    settings: SamplingSettings,
    forbidden: Tensor | None = None,
    held: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row.

    Args:
        logits: float32 [R, V], the model's.
        uniform: float64 [R] in [0, 1), the row's random number; not read when ``settings.temperature`` is 0.
        settings: temperature, top-k and top-p.
        forbidden: int64 [F], tokens that must not be drawn; None = none.
        held: bool [R], rows in which that holds; None = all.

    Returns:
        tokens int64 [R] and their log-probs float32 [R], nats: log-softmax(logits / temperature) over *all* tokens,
        before anything is forbidden or cut off, which is what the trainer computes. Temperature 0 counts as 1 there.
    """
    scaled = logits / settings.temperature if settings.temperature not in (0, 1) else logits
    probabilities = scaled.softmax(-1)
    allowed = scaled if forbidden is None else _without(scaled, forbidden, held)
    if settings.temperature == 0:
        tokens = allowed.argmax(-1)
    elif settings.top_k or settings.top_p < 1:
        kept, ids = truncate(allowed, top_k=settings.top_k, top_p=settings.top_p)
        tokens = inverse_cdf(kept, uniform)
        if ids is not None:
            tokens = ids.gather(-1, tokens[:, None])[:, 0]
    else:
        tokens = inverse_cdf(probabilities if allowed is scaled else allowed.softmax(-1), uniform)
    # log-softmax of one token: the most probable one has exp(0) / sum, whatever becomes of small probabilities.
    above = scaled.gather(-1, tokens[:, None])[:, 0] - scaled.amax(-1)
    return tokens, above + probabilities.amax(-1).log()


def _without(logits: Tensor, forbidden: Tensor, held: Tensor | None) -> Tensor:
    fewer = logits.index_fill(-1, forbidden, float("-inf"))
    return fewer if held is None else torch.where(held[:, None], fewer, logits)


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


_BLOCK = 64  # columns whose sum is made first


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column whose running sum exceeds ``uniform`` of the row's sum; int64 [R].

    One random number a row instead of one a token: drawing 8,192 exponentials a row (``torch.multinomial``) costs more
    than the model's vocabulary projection. Sums are float64, or the tail of a large vocabulary would be rounded away.
    A running sum over all columns takes four times as long as their sums block by block, which find the block.

    Args:
        weights: float [R, C] >= 0, not all zero. A column of weight 0 is never chosen.
        uniform: float64 [R] in [0, 1 - 2^-52], so that the product below stays under the row's sum.
    """
    columns = weights.shape[-1]
    if columns % _BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -columns % _BLOCK))
    blocks = weights.unflatten(-1, (-1, _BLOCK))
    running = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    sought = uniform[:, None] * running[:, -1:]
    # A row of NaN, reported later, has no such block and no such column.
    block = torch.searchsorted(running, sought, right=True).clamp_(max=running.shape[-1] - 1)
    before = torch.where(block > 0, running.gather(-1, (block - 1).clamp_(min=0)), 0)
    inside = blocks.gather(1, block[..., None].expand(-1, 1, _BLOCK))[:, 0].cumsum(-1, dtype=torch.float64)
    column = torch.searchsorted(inside, sought - before, right=True)
    # Two roundings may leave what is sought a hair above the block's sum: then it is the block's last weight.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return (block * _BLOCK + torch.minimum(column, last))[:, 0].clamp_(max=columns - 1)
