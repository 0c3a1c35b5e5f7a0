"""Dr. GRPO, GRPO done right -- Liu et al. 2025, arXiv:2503.20783.

    A_i = r_i - mean(r_1..r_G)
    L   = - 1/G sum_i 1/max_new_tokens sum_t { min( rho_it A_i, clip(rho_it, 1 - clip, 1 + clip) A_i ) - kl_coef k3_it }

GRPO without its two divisions. By the response's length: it makes the tokens of a long wrong response cheaper than
those of a short one, so that wrong responses grow. By the group's standard deviation: it weighs prompts that are nearly
always, or nearly never, answered well more than the others. The constant in place of the length is that of the longest
possible response; a constant changes nothing but the step size.

The mean holds r_i itself, so the gradient is (G - 1)/G of the exact one: with k3 in the loss the KL term weighs as
kl_coef G/(G - 1) would. The paper has kl_coef = 0. ``kl = "reward"`` charges k1 in the reward (see grpo); then the
fixed point is pi_ref exp(r / kl_coef) / Z for every G.

Roles: policy (trained), reward (frozen); with kl_coef above 0 reference (frozen). Data: prompts.
Left out: the paper's chat templates and verifiers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palate.functional.advantages import group_relative
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
    with_missing_end,
)
from palate.methods.grpo import token_losses
from palate.models.forward import token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def dr_grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    max_tokens: int,
    clip: float,
    kl_coef: float = 0.0,
) -> Tensor:
    """The sum over a response's tokens by one constant, one loss per response, [N].

    Args:
        max_tokens: the constant: tokens of the longest possible response, >= 1. The others as in ``grpo.token_losses``.
    """
    each = token_losses(
        logprobs, old_logprobs, reference_logprobs, advantages, mask, low=clip, high=clip, kl_coef=kl_coef
    )
    return each.sum(-1) / max_tokens


@dataclass(frozen=True)
class DrGRPO:
    """Settings.

    Attributes:
        kl_coef: weight of the KL term, >= 0; 0 = none, as in the paper, and no reference is loaded.
        kl: "loss" = k3 as a term of the loss; "reward" = k1 summed over the response, charged in the reward.
        epochs: passes over each batch of samples.
        minibatches: optimizer steps in one pass.
        clip: of a token's probability ratio; 0.1 to 0.3.
        max_new_tokens: the constant that token sums are divided by; set from ``sampling.max_new_tokens``.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.0
    kl: str = "loss"
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    max_new_tokens: int = 64
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = WITHOUT_REFERENCE
    trains = ("policy",)
    reads = "prompts"
    off_policy = "weights"
    group_size = 8

    def __post_init__(self) -> None:
        check_settings("dr_grpo", self)
        check_kl_place("dr_grpo", self.kl)
        set_needs(self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old (and reference) log-probs, scores less their group's mean."""
        found = measure(models, batch, self.temperature)
        scores = with_missing_end("dr_grpo", found.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        rewards = sequence_rewards(found, scores, batch.response_mask, self.kl_coef if self.kl == "reward" else 0.0)
        advantages = group_relative(rewards, batch.group, scale=False)
        return with_groups("dr_grpo", trajectories(batch, found, rewards, advantages, self.kl_coef))

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses of their token sums by one constant; a response without a token weighs nothing."""
        assert models.policy is not None
        mask, old, reference = batch.tokens.response_mask, batch.logprobs, batch.reference_logprobs
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        kl_coef = self.kl_coef if self.kl == "loss" else 0.0
        loss = dr_grpo_loss(
            logprobs, old, reference, batch.advantages, mask, self.max_new_tokens, self.clip, kl_coef=kl_coef
        )
        ratio = probability_ratio(logprobs, old)
        clipped = is_clipped(ratio, batch.advantages, self.clip, self.clip)
        return {"loss": Mean.of(loss, mask.any(-1))} | policy_metrics(batch, logprobs, entropy, ratio, clipped, mask)


METHOD = DrGRPO
