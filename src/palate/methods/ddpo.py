"""Dense DPO on corrections -- Yu et al. 2023 (RLHF-V), arXiv:2312.00849.

    L = -E log sigmoid( beta * [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ] )

    log pi(y|x) = (1/N) * [ sum_(unchanged) log p(y_t|x, y_<t) + gamma * sum_(changed) log p(y_t|x, y_<t) ]     (eq. 3)
    N           = |unchanged| + gamma * |changed|,     for pi and pi_ref alike

    normalise = false   the same with N = 1: a weighted sum, as the authors' released code runs
    anchor              + anchor * ( -log pi(y_w|x) / |y_w| ), unweighted              Pang et al. 2024, arXiv:2404.19733

The tokens of what a person corrected count gamma times. With gamma = 1 this is DPO (N = 1), or DPO on means (ln_dpo). A
weight is the same wherever its prefix is, so the tokens before the first change cancel when N = 1; with N as printed
they do not, because chosen and rejected have different N.

Roles: policy (trained), reference (frozen). Data: corrections. No sampling.
Left out: pictures (the paper's models see them); margins and soft labels (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palate.errors import ConfigError, DataError
from palate.methods.dpo import check_positive, dpo_loss, pair_metrics, pair_weight, refuse_facts, response_lengths
from palate.models.forward import token_logprobs
from palate.types import Comparisons, Mean, Models, Tokens


def segment_logprobs(
    logprobs: Tensor, response_mask: Tensor, changed: Tensor, gamma: float, normalise: bool = True
) -> Tensor:
    """Eq. 3, one number a response, [N].

    Args:
        logprobs: log p of each token in nats, [N, T]; what stands outside the response does not count.
        response_mask: bool [N, T], True = a response token.
        changed: bool [N, T], True = a token of what was changed; read inside the response only.
        gamma: how many times a changed token counts, > 0. The paper uses 5.
        normalise: divide by the sum of weights. A response without a token is 0.
    """
    weight = torch.where(response_mask, torch.where(changed, gamma, 1.0), 0.0).to(logprobs.dtype)
    total = (torch.where(response_mask, logprobs, 0) * weight).sum(-1)
    return total / weight.sum(-1).clamp(min=min(gamma, 1.0)) if normalise else total


@dataclass(frozen=True)
class DDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.5 in the paper. With ``normalise`` a log-ratio is a mean
            a token, so that 2 to 10 is what 0.1 is to sums; without it 0.01 to 0.5.
        gamma: how many times a changed token counts, > 0; 1 to 5.
        normalise: divide by the sum of the weights, as the paper prints it; false = a weighted sum, as its code runs.
        anchor: weight of the chosen response's negative log-likelihood a token, >= 0; 0.2 where chosen responses lose
            probability.
    """

    beta: float = 0.5
    gamma: float = 5.0
    normalise: bool = True
    anchor: float = 0.0

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "corrections"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("ddpo", beta=self.beta, gamma=self.gamma)
        if not 0 <= self.anchor < math.inf:
            raise ConfigError(f"ddpo: anchor = {self.anchor!r}, expected a number >= 0.")

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """The reference's weighted log-probs of every row, once, [N]."""
        refuse_facts("ddpo", batch, self.refuses)
        assert models.reference is not None
        return replace(batch, reference_logprobs=self._weighted(token_logprobs(models.reference, batch.tokens), batch))

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Mean over pairs."""
        assert models.policy is not None and batch.reference_logprobs is not None
        each = token_logprobs(models.policy, batch.tokens)  # [N, T]
        log_ratio = self._weighted(each, batch) - batch.reference_logprobs  # [N]
        logprobs, weight = each.sum(-1), pair_weight(batch)
        loss = dpo_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta)
        total = loss
        if self.anchor:
            total = loss - self.anchor * (logprobs / response_lengths(batch.tokens))[batch.chosen]
        return {
            "loss": Mean.of(total, weight),
            "loss/preference": Mean.of(loss.detach(), weight),
        } | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights every log-ratio is 0 and the loss that of a coin."""
        return {"loss/preference": math.log(2), "reward/margin": 0.0}

    def _weighted(self, logprobs: Tensor, batch: Comparisons) -> Tensor:
        changed = changed_of(batch.tokens)
        return segment_logprobs(logprobs, batch.tokens.response_mask, changed, self.gamma, self.normalise)


def changed_of(tokens: Tokens) -> Tensor:
    """Which tokens were changed, bool [N, T].

    Raises:
        DataError: the batch does not say.
    """
    changed = tokens.extras.get("changed")
    if not isinstance(changed, Tensor):
        raise DataError(
            'ddpo: the batch does not say which tokens were changed. Expected tokens.extras["changed"], bool [N, T]; '
            'collate(items, "corrections") makes it.'
        )
    return changed


METHOD = DDPO
