"""REINFORCE++ -- Hu et al. 2025, arXiv:2501.03262.

    R_t = 1[t = last] * r(x, y) - kl_coef * [ log pi_old(y_t|s_t) - log pi_ref(y_t|s_t) ]
    G_t = sum_{s >= t} gamma^(s - t) R_s
    A_t = ( G_t - mean G ) / std G                                      over all response tokens of the batch
    L   = - E_t min( rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t ),      rho_t = pi(y_t|s_t) / pi_old(y_t|s_t)

PPO's reward and clipping without a value model: what is expected is the mean of the whole batch, of all prompts
together, so one response to each prompt is enough. ``baseline = "group"`` takes the mean score of the responses to the
same prompt from each score first (REINFORCE++-baseline), which helps where prompts differ in how well they can be
answered.

The KL charge is in the reward, token by token, and counts from its token on: its expected gradient is that of the
sequence KL, and the fixed point is pi_ref exp(r / kl_coef) / Z. With the group's mean the score, but not the KL charge,
shrinks by (G - 1)/G, as if kl_coef were kl_coef G/(G - 1). Every E_t is a mean over all response tokens of the
minibatch.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: k2 in the loss, which the paper's group variant has in place of k1 in the reward (see docs/kl.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from palate.functional.advantages import discounted_returns, group_relative
from palate.functional.masked import row_sum, whiten
from palate.functional.policy_gradient import is_clipped, probability_ratio, token_rewards
from palate.methods._sampled import (
    check_choice,
    check_settings,
    measure,
    policy_metrics,
    trajectories,
    with_groups,
    with_missing_end,
)
from palate.methods.ppo import ppo_policy_loss
from palate.models.forward import token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def reinforce_pp_advantages(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """A_t, [N, T]: the reward to go, whitened over all True slots; zero elsewhere.

    Args:
        rewards: R_t, [N, T], reward units; masked slots may hold anything.
        mask: bool [N, T], the response.
        gamma: discount per token, in [0, 1]; 1 for language.
    """
    return whiten(discounted_returns(rewards, mask, gamma=gamma), mask)


@dataclass(frozen=True)
class ReinforcePP:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.001 to 0.1.
        baseline: "none" = one response a prompt is enough; "group" = each group's mean score is taken off first.
        gamma: discount a token; 1.
        epochs: passes over each batch of samples.
        minibatches: optimizer steps in one pass.
        clip: of a token's probability ratio; 0.1 to 0.3.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.01
    baseline: str = "none"
    gamma: float = 1.0
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

    def __post_init__(self) -> None:
        check_settings("reinforce_pp", self)
        check_choice("reinforce_pp", "baseline", self.baseline, ("none", "group"))

    @property
    def group_size(self) -> int:
        """Responses to a prompt unless ``samples_per_prompt`` is set."""
        return 8 if self.baseline == "group" else 1

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old and reference log-probs, scores, token rewards, whitened rewards to go; the whole batch."""
        found = measure(models, batch, self.temperature)
        assert found.reference_logprobs is not None
        mask, kl_coef = batch.response_mask, self.kl_coef
        scores = with_missing_end("reinforce_pp", found.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        paid = row_sum(token_rewards(found.logprobs, found.reference_logprobs, scores, mask, kl_coef), mask)
        if self.baseline == "group":
            scores = group_relative(scores, batch.group, scale=False)
        rewards = token_rewards(found.logprobs, found.reference_logprobs, scores, mask, kl_coef)
        advantages = reinforce_pp_advantages(rewards, mask, self.gamma)
        made = trajectories(batch, found, paid, advantages, kl_coef)
        return with_groups("reinforce_pp", made) if self.baseline == "group" else made

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over the response tokens of the minibatch."""
        assert models.policy is not None
        mask, old, advantages = batch.tokens.response_mask, batch.logprobs, batch.advantages
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        loss = ppo_policy_loss(logprobs, old, advantages, self.clip)
        ratio = probability_ratio(logprobs, old)
        clipped = is_clipped(ratio, advantages, self.clip, self.clip)
        return {"loss": Mean.of(loss, mask)} | policy_metrics(batch, logprobs, entropy, ratio, clipped, mask)


METHOD = ReinforcePP
