"""REINFORCE with a baseline -- Williams 1992; for language models Ahmadian et al. 2024, arXiv:2402.14740; with the
greedy response as baseline (ReMax) Li et al. 2023, arXiv:2310.10505.

    R(x, y) = r(x, y) - kl_coef * sum_t [ log pi(y_t|s_t) - log pi_ref(y_t|s_t) ]
    L = - E_(x, y) ( R(x, y) - b ) log pi(y|x)                                       log pi(y|x) = sum_t log pi(y_t|s_t)

    b     running   moving average of the batches' mean R; of the first batch its own mean
          batch     mean R of the batch, the response's own among them: the gradient is (N - 1)/N of the exact one
          greedy    r(x, y_greedy), of the most probable token at every step (ReMax)

Every y is used once, by the policy that it was drawn from: there is no ratio and no clipping. Any b that does not
depend on y leaves the expected gradient as it is. The KL charge is in the reward, so the fixed point is
pi_ref exp(r / kl_coef) / Z. The mean is over responses.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: a discount; per-token rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palate.functional.masked import row_sum
from palate.functional.policy_gradient import probability_ratio
from palate.methods._sampled import (
    Measured,
    check_choice,
    check_settings,
    measure,
    policy_metrics,
    rows_drawn_by,
    sequence_rewards,
    trajectories,
    with_missing_end,
)
from palate.models.forward import score_responses, token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


def reinforce_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """- A log pi(y|x), one loss per response, [N].

    Args:
        logprobs: of the policy being trained, [N, T], nats.
        advantages: R - b, [N, T], the same at every token of a response.
        mask: bool [N, T], the response.
    """
    return -row_sum(advantages * torch.where(mask, logprobs, 0), mask)


@dataclass(frozen=True)
class Reinforce:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.02 to 0.2, on normalised scores.
        baseline: "running", "batch" or "greedy"; greedy draws one more response to each prompt.
        baseline_decay: of the moving average, a batch; in [0, 1].
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
        running_reward: moving average of the mean reward, None before the first batch; part of the run's state.
    """

    kl_coef: float = 0.05
    baseline: str = "running"
    baseline_decay: float = 0.9
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0
    running_reward: float | None = None

    needs = ("policy", "reference", "reward")
    trains = ("policy",)
    reads = "prompts"
    off_policy = "weights"

    def __post_init__(self) -> None:
        check_settings("reinforce", self)
        check_choice("reinforce", "baseline", self.baseline, ("running", "batch", "greedy"))

    @property
    def drawn_by(self) -> tuple[str, ...]:
        """The sampler draws the greedy response to each prompt too, where it is the baseline."""
        return ("policy", "greedy") if self.baseline == "greedy" else ("policy",)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old and reference log-probs, scores, rewards less the baseline; greedy responses end here."""
        greedy_scores = None
        if self.baseline == "greedy":
            batch, greedy_scores = self._without_greedy(models, batch)
        found = measure(models, batch, self.temperature)
        rewards = sequence_rewards(found, self._shaped(found.scores, batch), batch.response_mask, self.kl_coef)
        advantages = rewards - self._baseline(rewards, greedy_scores)
        if greedy_scores is not None:
            found = Measured(*found[:3], {**found.metrics, "score/greedy": Mean.of(greedy_scores)})
        return trajectories(batch, found, rewards, advantages, self.kl_coef)

    def _baseline(self, rewards: Tensor, greedy_scores: Tensor | None) -> Tensor | float:
        if greedy_scores is not None:
            return greedy_scores
        if self.baseline == "running" and self.running_reward is not None:
            return self.running_reward
        return rewards.mean()

    def _without_greedy(self, models: Models, batch: Tokens) -> tuple[Tokens, Tensor]:
        """The sampled rows, and for each the score of the greedy response to its prompt, [N]."""
        greedy, sampled = (batch.select(rows_drawn_by("reinforce", batch, who)) for who in ("greedy", "policy"))
        assert models.reward is not None
        scores = self._shaped(score_responses(models.reward, greedy).scores, greedy)
        place = torch.searchsorted(greedy.group, sampled.group)  # one a group, ascending
        assert torch.equal(greedy.group[place], sampled.group), "a prompt without its greedy response"
        return sampled, scores[place]

    def _shaped(self, scores: Tensor, tokens: Tokens) -> Tensor:
        return with_missing_end("reinforce", scores, tokens, self.missing_eos_score, self.missing_eos_penalty)

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses; one without a token weighs nothing."""
        assert models.policy is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        loss = reinforce_loss(logprobs, batch.advantages, mask)
        ratio = probability_ratio(logprobs, batch.logprobs)
        return {"loss": Mean.of(loss, mask.any(-1))} | policy_metrics(
            batch, logprobs, entropy, ratio, torch.zeros_like(mask), mask
        )

    def adapt(self, batch: Trajectories) -> Reinforce:
        """The method for the next batch, with its moving average; kept by the run."""
        if self.baseline != "running":
            return self
        mean, before = batch.metrics["reward/total"].item(), self.running_reward
        if before is not None:
            mean = self.baseline_decay * before + (1 - self.baseline_decay) * mean
        return replace(self, running_reward=mean)


METHOD = Reinforce
