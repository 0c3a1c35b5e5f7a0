"""REINFORCE leave-one-out (RLOO) -- Ahmadian et al. 2024, arXiv:2402.14740.

    R_i = r(x, y_i) - kl_coef * sum_t [ log pi(y_it|s_it) - log pi_ref(y_it|s_it) ]
    A_i = R_i - 1/(G - 1) sum_{j != i} R_j                                         the other responses are the baseline
    L   = - 1/G sum_i A_i log pi(y_i|x)                                               one update a batch
    L   = - 1/G sum_i min( rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i )           more than one
    rho_i = pi(y_i|x) / pi_old(y_i|x), of the whole response

A response is one action: its reward, its baseline and its ratio are of the sequence. The baseline of y_i does not
depend on y_i, so the gradient is that of the expected reward less kl_coef * KL for every G >= 2; the fixed point is
pi_ref exp(r / kl_coef) / Z. The mean is over responses.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: division by the standard deviation (see grpo).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.functional.advantages import leave_one_out
from palate.functional.masked import row_mean, row_sum
from palate.functional.policy_gradient import clipped_surrogate, is_clipped, probability_ratio
from palate.methods._sampled import (
    check_settings,
    measure,
    policy_metrics,
    sequence_rewards,
    trajectories,
    with_groups,
    with_missing_end,
)
from palate.methods.reinforce import reinforce_loss
from palate.models.forward import token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def rloo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped surrogate of whole responses, one loss each, [N].

    Args:
        logprobs, old_logprobs: log pi(y|x), summed over the response, [N], nats.
        advantages: A_i, [N].
        clip: > 0.
    """
    return clipped_surrogate(probability_ratio(logprobs, old_logprobs), advantages, clip, clip)


@dataclass(frozen=True)
class RLOO:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.02 to 0.2, on normalised scores.
        epochs: passes over each batch of samples; 1 is on policy.
        minibatches: optimizer steps in one pass.
        clip: of the whole response's probability ratio, where there is more than one update a batch.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.05
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
    group_size = 4

    def __post_init__(self) -> None:
        check_settings("rloo", self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old and reference log-probs, scores, rewards less the mean of the others'."""
        found = measure(models, batch, self.temperature)
        scores = with_missing_end("rloo", found.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        rewards = sequence_rewards(found, scores, batch.response_mask, self.kl_coef)
        advantages = leave_one_out(rewards, batch.group)
        return with_groups("rloo", trajectories(batch, found, rewards, advantages, self.kl_coef))

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses; one without a token weighs nothing."""
        assert models.policy is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        new, old = row_sum(logprobs, mask), row_sum(batch.logprobs, mask)
        advantages, answered = row_mean(batch.advantages, mask), mask.any(-1)
        ratio = probability_ratio(new, old)
        if self.epochs * self.minibatches == 1:
            loss, clipped = reinforce_loss(logprobs, batch.advantages, mask), torch.zeros_like(answered)
        else:
            loss = rloo_loss(new, old, advantages, self.clip)
            clipped = is_clipped(ratio, advantages, self.clip, self.clip)
        return {"loss": Mean.of(loss, answered)} | policy_metrics(batch, logprobs, entropy, ratio, clipped, answered)


METHOD = RLOO
