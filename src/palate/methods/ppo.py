"""Proximal Policy Optimization for language models -- Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019,
arXiv:1909.08593; Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155.

    R_t   = - kl_coef * [ log pi_old(y_t|s_t) - log pi_ref(y_t|s_t) ]  +  1[t = last] * r(x, y)       (Ziegler eq. 2)
    A_t   = sum_l (gamma lam)^l delta_{t+l},   delta_t = R_t + gamma V(s_{t+1}) - V(s_t)     (arXiv:1506.02438 eq. 16)
    L_pi  = - E_t min( rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t )                                    (PPO eq. 7)
    L_V   = 1/2 E_t max( (V - G_t)^2, (clip(V, V_old - value_clip, V_old + value_clip) - G_t)^2 )
    L     = L_pi + value_coef * L_V - entropy_coef * E_t H(pi(.|s_t))                                      (PPO eq. 9)
              [ + ptx_coef * L_SFT(pre-training text) ]                                            (InstructGPT eq. 2)

    rho_t = pi(y_t|s_t) / pi_old(y_t|s_t),     G_t = A_t + V_old(s_t)

The KL charge is in the reward, where its expected gradient is that of the sequence KL; the fixed point is
pi_ref exp(r / kl_coef) / Z. Every E_t is a mean over all response tokens of the minibatch. The advantage is whitened
over the batch after the returns are formed, so the value model learns in reward units. pi_old is the trainer's, whatever
sampled (``training.old_logprobs``); all log-probabilities are those of the sampling distribution (temperature).

Adaptive coefficient:  e = clip(KL/target - 1, -0.2, 0.2),  kl_coef *= 1 + e * episodes/horizon  (Ziegler section
2.2 has K_beta = 0.1 in place of episodes/horizon, which is its released code's).

Roles: policy (trained), reference (frozen), reward (frozen), value (trained). Data: prompts.
Policy and value are two models, as InstructGPT has it; on one trunk they are where docs/roles.md says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from palate.functional.advantages import gae
from palate.functional.divergences import k2
from palate.functional.masked import Moments, whiten
from palate.functional.policy_gradient import clipped_surrogate, is_clipped, probability_ratio, token_rewards
from palate.methods._sampled import check_settings, rollout_metrics, sampled_logprobs, with_missing_end
from palate.models.forward import score_responses, token_logprobs, token_logprobs_and_entropy, token_values
from palate.types import Mean, Models, Tokens, Trajectories


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float, dual_clip: float | None = None
) -> Tensor:
    """max( -A rho, -A clip(rho, 1 - clip, 1 + clip) ), one loss per token (PPO eq. 7); any shape.

    Args:
        logprobs: of the policy being trained, nats; old_logprobs: when the tokens were sampled.
        advantages: reward units or whitened.
        clip: > 0; the paper uses 0.2.
        dual_clip: where A < 0 the loss is at most -dual_clip * A (arXiv:1912.09729 eq. 5); > 1, often 3; None = off.
    """
    loss = clipped_surrogate(probability_ratio(logprobs, old_logprobs), advantages, clip, clip)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float | None) -> Tensor:
    """1/2 max( (V - G)^2, (clip(V, V_old +- value_clip) - G)^2 ), one loss per token; any shape.

    Source: OpenAI's lm-human-preferences; value_clip 0.2 there, None = plain squared error.
    """
    loss = (values - returns).square()
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The next KL coefficient (Ziegler section 2.2).

    Args:
        kl: measured mean over sequences of the summed log-ratio to the reference, nats.
        target: wanted KL, nats a sequence, > 0; 6 in the released code's text continuation.
        episodes: responses in the batch.
        horizon: responses over which the coefficient can change by about a fifth, for e is at most 0.2; 10000.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)


@dataclass(frozen=True)
class PPO:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.02 to 0.2, on normalised scores.
        adaptive_kl_target: steer ``kl_coef`` towards this KL to the reference, nats a sequence; None = it is fixed.
        adaptive_kl_horizon: responses over which the coefficient can change by about a fifth; 10000.
        target_kl: leave a batch alone once KL(old, new) exceeds 1.5 times this, nats a token; 0.01 to 0.05; None =
            never.
        kl_budget: end the run once the KL to the reference exceeds this, nats a sequence; None = never.
        epochs: passes over each batch of samples; 1 to 4.
        minibatches: optimizer steps in one pass.
        clip: of the probability ratio; 0.1 to 0.3.
        dual_clip: bound on the loss of a negative advantage, > 1; None = off.
        value_clip: how far a value may move from its old one, reward units; None = no clipping.
        value_coef: weight of the value loss (which has the factor 1/2); 0.1.
        entropy_coef: weight of the entropy bonus; 0 to 0.01.
        gamma: discount a token; 1.
        lam: of the advantage estimate; 0.95.
        whiten_advantages: zero mean and unit variance over all response tokens of the batch.
        whiten_rewards: unit variance of per-token rewards, mean kept, as OpenAI 2019; rescales score and KL charge
            together, and shifts every token's reward by (1 - 1/std) mean, so that the fixed point moves a little.
        normalise_scores: running mean 0 and standard deviation 1 over the run; for rewards without a fixed scale.
        score_clip: scores are cut to [-score_clip, score_clip]; None = not.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        ptx_coef: weight of a language-modelling loss on ``data.pretraining`` (PPO-ptx); InstructGPT 27.8; 0 = off.
        ptx_batch_size: pre-training texts an optimizer step, when ``ptx_coef`` is set.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
        score_moments: running moments of the scores; part of the run's state.
    """

    kl_coef: float = 0.05
    adaptive_kl_target: float | None = None
    adaptive_kl_horizon: float = 10_000.0
    target_kl: float | None = None
    kl_budget: float | None = None
    epochs: int = 4
    minibatches: int = 1
    clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    normalise_scores: bool = False
    score_clip: float | None = None
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    ptx_coef: float = 0.0
    ptx_batch_size: int = 32
    temperature: float = 1.0
    score_moments: Moments = field(default_factory=Moments)

    needs = ("policy", "reference", "reward", "value")
    trains = ("policy", "value")
    reads = "prompts"
    off_policy = "weights"

    def __post_init__(self) -> None:
        check_settings("ppo", self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Old and reference log-probs, scores, values, token rewards, advantages; the whole batch, no gradient."""
        assert models.policy is not None and models.reference is not None
        assert models.reward is not None and models.value is not None
        mask = batch.response_mask
        logprobs = sampled_logprobs(models.policy, batch, self.temperature)
        reference = token_logprobs(models.reference, batch, temperature=self.temperature)
        values = token_values(models.value, batch)
        scored = score_responses(models.reward, batch)
        scores = self.shaped_scores(scored.scores, batch)
        rewards = token_rewards(logprobs, reference, scores, mask, self.kl_coef)
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        metrics = {f"score/{name}": Mean.of(part) for name, part in scored.parts.items()}
        metrics |= rollout_metrics(batch, logprobs, reference, scored.scores)
        metrics |= {
            "reward/total": Mean.of(torch.where(mask, rewards, 0).sum(-1)),
            "kl/coef": Mean.of(torch.tensor(self.kl_coef, dtype=torch.float64)),
            "value/explained_variance": Mean.of(explained_variance(values[mask], returns[mask])),
        }
        return Trajectories(batch, logprobs, reference, advantages, scored.scores, values, returns, metrics)

    def shaped_scores(self, scores: Tensor, batch: Tokens) -> Tensor:
        """Scores as the reward uses them, [N]: normalised, then cut, then a missing end of text replaced or charged."""
        if self.normalise_scores:
            moments = self.score_moments.including(scores)
            scores = (scores - moments.mean) / moments.std
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return with_missing_end("ppo", scores, batch, self.missing_eos_score, self.missing_eos_penalty)

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Clipped surrogate, clipped value error, entropy: means over the response tokens of the minibatch."""
        assert models.policy is not None and models.value is not None
        assert batch.values is not None and batch.returns is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = (
            column[mask]  # [M], as everything below
            for column in token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        )
        old, advantages = batch.logprobs[mask], batch.advantages[mask]
        policy = ppo_policy_loss(logprobs, old, advantages, self.clip, self.dual_clip)
        values = token_values(models.value, batch.tokens)[mask]
        value = ppo_value_loss(values, batch.values[mask], batch.returns[mask], self.value_clip)
        total = policy + self.value_coef * value - self.entropy_coef * entropy
        ratio = probability_ratio(logprobs.detach(), old)
        clipped = is_clipped(ratio, advantages, self.clip, self.clip)
        ones = torch.ones_like(policy)
        return {
            "loss": Mean.of(total, ones),
            "loss/policy": Mean.of(policy.detach(), ones),
            "loss/value": Mean.of(value.detach(), ones),
            "entropy": Mean.of(entropy.detach(), ones),
            "kl/old": Mean.of(k2(logprobs, old).detach(), ones),
            "clip_fraction": Mean.of(clipped.to(policy.dtype), ones),
            "ratio": Mean.of(ratio, ones),
        }

    def stop(self, metrics: dict[str, float]) -> bool:
        """Leave this batch alone: the policy has moved far enough from the one that sampled it."""
        return self.target_kl is not None and metrics["kl/old"] > 1.5 * self.target_kl

    def finished(self, metrics: dict[str, float]) -> str | None:
        """Why the run should end, or None: the KL budget is spent."""
        if self.kl_budget is not None and metrics["kl/reference"] > self.kl_budget:
            return f"kl/reference {metrics['kl/reference']:.2f} exceeds kl_budget {self.kl_budget:g} nats a sequence"
        return None

    def adapt(self, batch: Trajectories) -> PPO:
        """The method for the next batch: KL coefficient and running moments, both kept by the run."""
        method = self
        if self.adaptive_kl_target is not None:
            assert batch.reference_logprobs is not None
            log_ratio = torch.where(batch.tokens.response_mask, batch.logprobs - batch.reference_logprobs, 0)
            kl = log_ratio.sum(-1).mean().item()
            # A batch longer than the horizon counts as the horizon: one step never changes more than a fifth.
            episodes, horizon = min(len(batch), int(self.adaptive_kl_horizon) or 1), self.adaptive_kl_horizon
            coef = adapted_kl_coef(self.kl_coef, kl, self.adaptive_kl_target, episodes, horizon)
            method = replace(method, kl_coef=coef)
        if self.normalise_scores:
            method = replace(method, score_moments=self.score_moments.including(batch.scores))
        return method


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(G - V)/Var(G): 1 = the value model knows the return, 0 = no better than a constant, or where Var(G) is 0."""
    variance = returns.var(unbiased=False)
    return torch.where(variance > 0, 1 - (returns - values).var(unbiased=False) / variance.clamp(min=1e-12), 0)


METHOD = PPO
