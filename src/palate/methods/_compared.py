"""What the methods share that learn from comparisons of sampled responses: asking the reward about pairs, and the batch.

No method by itself; see ``online_dpo``, ``xpo`` and ``nash_md``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.functional.masked import row_sum
from palate.methods._sampled import Measured, with_missing_end
from palate.models.forward import response_logprobs
from palate.models.preferences import bradley_terry, compare_responses, compares
from palate.types import Comparisons, Models, Scored, Tokens


class Said(NamedTuple):
    """What the reward says of a batch and its pairs."""

    probability: Tensor  # [P], that the first is preferred
    scored: Scored  # of the rows, as the reward gave them; of one that compares, how often each wins
    ranked: Tensor  # [N], scores after the end-of-text rules: by what rows are put in order


def compared(
    name: str,
    method: Any,
    models: Models,
    tokens: Tokens,
    first: Tensor,
    second: Tensor,
    scored: Scored | None = None,
) -> Said:
    """Ask the reward how surely the first row of every pair is preferred.

    Args:
        name, method: its settings ``missing_eos_score`` and ``missing_eos_penalty`` change the scores.
        first, second: row numbers, int64 [P].
        scored: what it said of the rows, where it was asked before.
    Raises:
        ConfigError: an end-of-text rule is set, and the reward has no scores to change.
    """
    assert models.reward is not None
    rules = method.missing_eos_score is not None or method.missing_eos_penalty > 0
    if compares(models.reward):
        if rules:
            raise ConfigError(
                f"{name}: missing_eos_* changes scores, and this reward compares two responses. Let the comparison look at "
                "how a response ends, or leave missing_eos_* out."
            )
        found = compare_responses(models.reward, tokens, first, second)
        return Said(found.probability, scored or found.scored, (scored or found.scored).scores)
    if scored is None:
        scored = compare_responses(models.reward, tokens, first, second).scored
    ranked = with_missing_end(name, scored.scores, tokens, method.missing_eos_score, method.missing_eos_penalty)
    return Said(bradley_terry(ranked, first, second), scored, ranked)


def of_rows(scored: Scored, rows: Tensor) -> Scored:
    """What the reward said of some rows."""
    return Scored(scored.scores[rows], {name: part[rows] for name, part in scored.parts.items()})


def reference_sums(models: Models, tokens: Tokens, found: Measured, temperature: float) -> Tensor:
    """The reference's log-probability of every response at temperature 1, [N], nats; measured ones are used again."""
    assert models.reference is not None and found.reference_logprobs is not None
    if temperature == 1:
        return row_sum(found.reference_logprobs, tokens.response_mask)
    return response_logprobs(models.reference, tokens)


def with_pairs_only(batch: Comparisons) -> Comparisons:
    """The batch without the rows that stand in no pair: they would be run for nothing."""
    used = torch.zeros(len(batch), dtype=torch.bool, device=batch.chosen.device)
    used[batch.chosen], used[batch.rejected] = True, True
    return batch if bool(used.all()) else batch.select(used.nonzero()[:, 0])
