"""Group Relative Policy Optimization -- Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300.

    A_i = ( r_i - mean(r_1..r_G) ) / ( std(r_1..r_G) + std_eps ),     the same for every token of y_i   (section 4.1.2)
    L   = - 1/G sum_i 1/|y_i| sum_t { min( rho_it A_i, clip(rho_it, 1 - clip, 1 + clip) A_i ) - kl_coef k3_it }  (eq. 3)
    k3  = pi_ref(y_t|s_t)/pi(y_t|s_t) - log pi_ref(y_t|s_t)/pi(y_t|s_t) - 1                                    (eq. 4)
    rho_it = pi(y_it|s_it) / pi_old(y_it|s_it)

The standard deviation divides by G - 1. A group whose scores are all equal has advantage 0.

On its KL term. k3 estimates KL(pi || pi_ref) without bias, but its gradient is not that KL's: as a term of the loss it
pulls towards the reference by the *forward* KL at every state, and what a token does to the KL of later tokens is
dropped. With the division by the standard deviation, which weighs every prompt differently, training ends at a policy
of its own, near pi_ref exp(r / kl_coef') / Z of no kl_coef'. ``kl = "reward"`` charges the exact KL instead,

    r_i -> r_i - kl_coef * sum_t [ log pi_old(y_it|s_it) - log pi_ref(y_it|s_it) ],

and then the fixed point is pi_ref exp(r / kl_coef) / Z: there all r_i of a prompt are equal. k1 as a term of the loss,
which has no expected gradient, cannot be asked for.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: process rewards; an iteratively renewed reference.
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


def token_losses(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float,
    high: float,
    kl_coef: float = 0.0,
) -> Tensor:
    """The inside of eq. 3's sums, negated: one loss per token, [N, T], zero outside the response.

    Args:
        logprobs, old_logprobs, reference_logprobs: [N, T], nats; masked slots may hold anything. The last may be None
            where ``kl_coef`` is 0.
        advantages: [N, T].
        mask: bool [N, T], the response.
        low, high: the ratio is clipped to [1 - low, 1 + high].
        kl_coef: weight of k3, >= 0.
    """
    logprobs, old = torch.where(mask, logprobs, 0), torch.where(mask, old_logprobs, 0)
    advantages = torch.where(mask, advantages, 0)
    loss = clipped_surrogate(probability_ratio(logprobs, old), advantages, low, high)
    if kl_coef:
        assert reference_logprobs is not None
        reference = torch.where(mask, reference_logprobs, 0)
        # No gradient where the policy gives a token less than exp(-40) of the reference's probability: it draws none.
        loss = loss + kl_coef * k3(torch.maximum(logprobs, reference - MAX_LOG_RATIO), reference)
    return loss


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    kl_coef: float,
) -> Tensor:
    """Eq. 3: the mean over a response's own tokens, one loss per response, [N]. Arguments as ``token_losses``."""
    each = token_losses(
        logprobs, old_logprobs, reference_logprobs, advantages, mask, low=clip, high=clip, kl_coef=kl_coef
    )
    return row_mean(each, mask)


@dataclass(frozen=True)
class GRPO:
    """Settings.

    Attributes:
        kl_coef: weight of the KL term, >= 0; 0 = none, and no reference is loaded.
        kl: "loss" = k3 as a term of the loss, as printed; "reward" = k1 summed over the response, in the reward.
        std_eps: added to the standard deviation, >= 0; 1e-4 in TRL, 1e-6 in verl.
        epochs: passes over each batch of samples.
        minibatches: optimizer steps in one pass.
        clip: of a token's probability ratio; 0.1 to 0.3.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.04
    kl: str = "loss"
    std_eps: float = 1e-4
    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.2
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = ("policy", "reference", "reward")
    trains = ("policy",)
    reads = "prompts"
    off_policy = "weights"
    group_size = 8

    def __post_init__(self) -> None:
        check_settings("grpo", self)
        check_kl_place("grpo", self.kl)
        set_needs(self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old and reference log-probs, scores, z-scores within each group."""
        found = measure(models, batch, self.temperature)
        scores = with_missing_end("grpo", found.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        rewards = sequence_rewards(found, scores, batch.response_mask, self.kl_coef if self.kl == "reward" else 0.0)
        advantages = group_relative(rewards, batch.group, eps=self.std_eps)
        return with_groups("grpo", trajectories(batch, found, rewards, advantages, self.kl_coef))

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses of the mean over their tokens; a response without a token weighs nothing."""
        assert models.policy is not None
        mask, old = batch.tokens.response_mask, batch.logprobs
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        kl_coef = self.kl_coef if self.kl == "loss" else 0.0
        loss = grpo_loss(logprobs, old, batch.reference_logprobs, batch.advantages, mask, self.clip, kl_coef)
        ratio = probability_ratio(logprobs, old)
        clipped = is_clipped(ratio, batch.advantages, self.clip, self.clip)
        return {"loss": Mean.of(loss, mask.any(-1))} | policy_metrics(batch, logprobs, entropy, ratio, clipped, mask)


METHOD = GRPO
