"""DAPO, decoupled clip and dynamic sampling policy optimization -- Yu et al. 2025, arXiv:2503.14476.

    A_i = ( r_i - mean(r_1..r_G) ) / ( std(r_1..r_G) + std_eps )                                                 (eq. 9)
    L   = - 1/(sum_i |y_i|) sum_i sum_t min( rho_it A_i, clip(rho_it, 1 - clip_low, 1 + clip_high) A_i )         (eq. 8)
          over groups whose scores are not all equal
    r_i = score + P(|y_i|),    P(n) = 0                                    n <= M - B
                                      ((M - B) - n) / B            M - B < n <= M = max_new_tokens             (eq. 13)

GRPO with four changes. *Clip higher*: an unlikely token may grow by more than a likely one may shrink, which keeps
entropy. *Dynamic sampling*: a group of equal scores says nothing; it is left out, and further prompts are sampled in
its place (``refills`` times a batch at most). *Token mean*: every token of the batch weighs the same, so that long
responses count by their length. *Soft overlong penalty*: the last B tokens before the limit are charged, up to 1 reward
unit at the limit. No KL term, so no reference.

Roles: policy (trained), reward (frozen); with kl_coef above 0 reference (frozen). Data: prompts.
Left out: masking of truncated responses (the penalty takes its place, as in the paper).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palate.functional.advantages import all_equal, group_relative
from palate.functional.policy_gradient import is_clipped, probability_ratio
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
)
from palate.methods.grpo import token_losses
from palate.models.forward import token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def overlong_penalty(lengths: Tensor, max_tokens: float, buffer: float) -> Tensor:
    """P of eq. 13, in [-1, 0], the shape of ``lengths``.

    Args:
        lengths: tokens of each response.
        max_tokens: the longest possible response, > 0; 20,480 in the paper.
        buffer: tokens before it over which the penalty grows, 0 to ``max_tokens``; 4,096 in the paper; 0 = no penalty.
    """
    if not buffer:
        return lengths.new_zeros(lengths.shape).float()
    return -((lengths - (max_tokens - buffer)) / buffer).clamp(0, 1)


@dataclass(frozen=True)
class DAPO:
    """Settings.

    Attributes:
        clip_low: how far below 1 a token's probability ratio may go and still give a gradient.
        clip_high: how far above.
        overlong_buffer: tokens before ``max_new_tokens`` over which a penalty of up to 1 grows; a number below 1 is a
            share of ``max_new_tokens``; 0 = no penalty.
        refills: batches of further prompts sampled at most in place of groups whose scores are all equal; 0 = they are
            only left out.
        std_eps: added to the standard deviation, >= 0.
        kl_coef: weight of a KL term, >= 0; 0 = none, as in the paper, and no reference is loaded.
        kl: "loss" = k3 as a term of the loss; "reward" = k1 summed over the response, charged in the reward.
        epochs: passes over each batch of samples.
        minibatches: optimizer steps in one pass; the paper makes 16 with a batch of 512 prompts.
        max_new_tokens: the longest possible response; set from ``sampling.max_new_tokens``.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    overlong_buffer: float = 0.2
    refills: int = 4
    std_eps: float = 1e-4
    kl_coef: float = 0.0
    kl: str = "loss"
    epochs: int = 1
    minibatches: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0

    needs = WITHOUT_REFERENCE
    trains = ("policy",)
    reads = "prompts"
    off_policy = "weights"
    group_size = 16

    def __post_init__(self) -> None:
        check_settings("dapo", self)
        check_kl_place("dapo", self.kl)
        set_needs(self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old (and reference) log-probs, scores with their penalty, z-scores; groups of equal scores are left out."""
        found = measure(models, batch, self.temperature)
        mask = batch.response_mask
        buffer = self.overlong_buffer * (self.max_new_tokens if self.overlong_buffer < 1 else 1)
        penalty = overlong_penalty(mask.sum(-1), self.max_new_tokens, min(buffer, self.max_new_tokens))
        scores = found.scores + penalty
        rewards = sequence_rewards(found, scores, mask, self.kl_coef if self.kl == "reward" else 0.0)
        advantages = group_relative(rewards, batch.group, eps=self.std_eps)
        found.metrics["reward/overlong"] = Mean.of(penalty)
        whole = with_groups("dapo", trajectories(batch, found, rewards, advantages, self.kl_coef))
        return whole.select((~all_equal(found.scores, batch.group)).nonzero()[:, 0])

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over all response tokens of the minibatch."""
        assert models.policy is not None
        mask, old = batch.tokens.response_mask, batch.logprobs
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        loss = token_losses(
            logprobs,
            old,
            batch.reference_logprobs,
            batch.advantages,
            mask,
            low=self.clip_low,
            high=self.clip_high,
            kl_coef=self.kl_coef if self.kl == "loss" else 0.0,
        )
        ratio = probability_ratio(logprobs, old)
        clipped = is_clipped(ratio, batch.advantages, self.clip_low, self.clip_high)
        return {"loss": Mean.of(loss, mask)} | policy_metrics(batch, logprobs, entropy, ratio, clipped, mask)


METHOD = DAPO
