"""Group Sequence Policy Optimization -- Zheng et al. 2025, arXiv:2507.18071.

    A_i = ( r_i - mean(r_1..r_G) ) / ( std(r_1..r_G) + std_eps )                                                (eq. 6)
    s_i = ( pi(y_i|x) / pi_old(y_i|x) )^(1/|y_i|) = exp( 1/|y_i| sum_t log pi(y_it|s_it)/pi_old(y_it|s_it) )   (eq. 7)
    L   = - 1/G sum_i min( s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i )                                (eq. 5)

The reward is of the whole response, so the ratio that corrects for stale samples is too; its |y|-th root keeps the
ratios of short and long responses in one range, and the clipping range is therefore far narrower than a token's. While
the policy is the one that sampled, the gradient is that of GRPO.

The paper leaves the KL term out of its formulas; ``kl_coef`` above 0 adds GRPO's to a response's loss (mean of k3 over
its tokens), or with ``kl = "reward"`` charges k1 in the reward (see grpo).

Roles: policy (trained), reward (frozen); with kl_coef above 0 reference (frozen). Data: prompts.
Left out: GSPO-token, with advantages of single tokens (section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.functional.advantages import group_relative
from palate.functional.divergences import k3
from palate.functional.masked import row_mean
from palate.functional.policy_gradient import MAX_LOG_RATIO, clipped_surrogate, is_clipped, probability_ratio
from palate.methods._sampled import (
    WITHOUT_REFERENCE,
    check_kl_place,
    check_settings,
    measure,
    policy_metrics,
    sequence_rewards,
    set_needs,
    trajectories,
    with_groups,
    with_missing_end,
)
from palate.models.forward import token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """s_i of eq. 7, [N]: the geometric mean of a response's token ratios; 1 for a response without a token.

    Args:
        logprobs, old_logprobs: [N, T], nats; masked slots may hold anything.
        mask: bool [N, T], the response.
    """
    return probability_ratio(row_mean(logprobs, mask), row_mean(old_logprobs, mask))


def gspo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Eq. 5, one loss per response, [N].

    Args:
        logprobs, old_logprobs: [N, T], nats.
        advantages: A_i, [N].
        mask: bool [N, T], the response.
        clip_low, clip_high: s_i is clipped to [1 - clip_low, 1 + clip_high]; 3e-4 and 4e-4 in the paper.
    """
    return clipped_surrogate(sequence_ratio(logprobs, old_logprobs, mask), advantages, clip_low, clip_high)


@dataclass(frozen=True)
class GSPO:
    """Settings.

    Attributes:
        clip_low: how far below 1 a response's ratio may go and still give a gradient.
        clip_high: how far above.
        std_eps: added to the standard deviation, >= 0.
        kl_coef: weight of a KL term, >= 0; 0 = none, and no reference is loaded.
        kl: "loss" = k3 as a term of the loss; "reward" = k1 summed over the response, charged in the reward.
        epochs: passes over each batch of samples.
        minibatches: optimizer steps in one pass; 4 in the paper. With one step a batch nothing is ever clipped.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    std_eps: float = 1e-4
    kl_coef: float = 0.0
    kl: str = "loss"
    epochs: int = 1
    minibatches: int = 4
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = WITHOUT_REFERENCE
    trains = ("policy",)
    reads = "prompts"
    off_policy = "weights"
    group_size = 8

    def __post_init__(self) -> None:
        check_settings("gspo", self)
        check_kl_place("gspo", self.kl)
        set_needs(self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old (and reference) log-probs, scores, z-scores within each group."""
        found = measure(models, batch, self.temperature)
        scores = with_missing_end("gspo", found.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        rewards = sequence_rewards(found, scores, batch.response_mask, self.kl_coef if self.kl == "reward" else 0.0)
        advantages = group_relative(rewards, batch.group, eps=self.std_eps)
        return with_groups("gspo", trajectories(batch, found, rewards, advantages, self.kl_coef))

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses; one without a token weighs nothing."""
        assert models.policy is not None
        mask, old = batch.tokens.response_mask, batch.logprobs
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        advantages, answered = row_mean(batch.advantages, mask), mask.any(-1)
        loss = gspo_loss(logprobs, old, advantages, mask, self.clip_low, self.clip_high)
        if self.kl_coef and self.kl == "loss":
            reference = batch.reference_logprobs
            assert reference is not None
            loss = loss + self.kl_coef * row_mean(
                k3(torch.maximum(logprobs, reference - MAX_LOG_RATIO), reference), mask
            )
        ratio = sequence_ratio(logprobs, old, mask)
        clipped = is_clipped(ratio, advantages, self.clip_low, self.clip_high)
        return {"loss": Mean.of(loss, answered)} | policy_metrics(batch, logprobs, entropy, ratio, clipped, answered)


METHOD = GSPO
