"""Trust Region Policy Optimization for language models -- Schulman et al. 2015, arXiv:1502.05477.

    maximise  E_t [ rho_t A_t ]   subject to   E_t KL( pi_old(.|s_t) || pi(.|s_t) ) <= delta                        (eq. 14)

    x     = F^-1 g,   g the gradient of the first, F the Hessian of the second at pi_old     (conjugate gradient, appendix C)
    theta = theta_old + shrink^k sqrt(2 delta / x^T F x) x,   the first k for which the surrogate improves and KL <= delta

    rho_t = pi(y_t|s_t) / pi_old(y_t|s_t);  token rewards R_t (KL charge to the reference, score at the last token) and
    advantages A_t as in ppo (Ziegler et al. 2019, arXiv:1909.08593, eq. 2)

The KL of the constraint is that of the whole vocabulary, averaged over the response tokens of the batch; it bounds one step,
and has nothing to do with the KL to the reference, which is charged in the reward. The policy moves once a batch; the value
model learns by AdamW, ``epochs`` times. The step does not depend on the size of the gradient, and so on no learning rate.
The fixed point is pi_ref exp(r / kl_coef) / Z.

Roles: policy (trained), reference (frozen), reward (frozen), value (trained). Data: prompts.
Left out: bfloat16 (conjugate gradient fails in it), several policy steps a batch, a subsample of states for F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palate.errors import ConfigError
from palate.functional.divergences import k2
from palate.functional.policy_gradient import probability_ratio
from palate.functional.trust_region import TrustRegion
from palate.methods.ppo import PPO, ppo_value_loss
from palate.models.forward import token_logprobs_and_entropy, token_values
from palate.types import Mean, Models, Tokens, Trajectories


@dataclass(frozen=True)
class TRPO:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.02 to 0.2, on normalised scores.
        delta: largest mean KL(old, new) of one step, nats a token, > 0; 0.001 to 0.01.
        damping: added to the diagonal of the Fisher matrix, >= 0; 0.1. Larger = more like the plain gradient.
        iterations: of conjugate gradient; 10.
        backtracks: how often a step that is too long or does not help is shortened before it is given up; 10.
        shrink: by which factor, in (0, 1); 0.5 to 0.8.
        epochs: passes over each batch of samples for the value model; the policy moves in the first.
        value_clip: how far a value may move from its old one, reward units; None = no clipping.
        gamma: discount a token; 1.
        lam: of the advantage estimate; 0.95.
        whiten_advantages: zero mean and unit variance over all response tokens of the batch; changes no step but where
            the mean was not zero.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.05
    delta: float = 0.01
    damping: float = 0.1
    iterations: int = 10
    backtracks: int = 10
    shrink: float = 0.8
    epochs: int = 4
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = ("policy", "reference", "reward", "value")
    trains = ("policy", "value")
    reads = "prompts"

    def __post_init__(self) -> None:
        self._like_ppo()  # what the two have in common is checked there
        wanted = {
            "delta": self.delta > 0,
            "damping": self.damping >= 0,
            "iterations": self.iterations >= 1,
            "backtracks": self.backtracks >= 0,
            "shrink": 0 < self.shrink < 1,
        }
        for name, holds in wanted.items():
            if not holds:
                raise ConfigError(
                    f"trpo: {name} = {getattr(self, name)!r}, expected delta > 0, damping >= 0, iterations >= 1, "
                    "backtracks >= 0 and shrink between 0 and 1."
                )

    def _like_ppo(self) -> PPO:
        return PPO(
            kl_coef=self.kl_coef,
            epochs=self.epochs,
            value_clip=self.value_clip,
            gamma=self.gamma,
            lam=self.lam,
            whiten_advantages=self.whiten_advantages,
            missing_eos_score=self.missing_eos_score,
            missing_eos_penalty=self.missing_eos_penalty,
            temperature=self.temperature,
        )

    @property
    def trust_region(self) -> TrustRegion:
        """What the loop asks for the policy's step."""
        return TrustRegion(self.delta, self.damping, self.iterations, self.backtracks, self.shrink)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Exactly what ppo measures of a batch."""
        return self._like_ppo().prepare(models, batch)

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Unclipped surrogate (eq. 14) and value error: means over the response tokens of the minibatch."""
        assert models.policy is not None and models.value is not None
        assert batch.values is not None and batch.returns is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = (
            column[mask]  # [M], as everything below
            for column in token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        )
        old = batch.logprobs[mask]
        ratio = probability_ratio(logprobs, old)
        policy = -ratio * batch.advantages[mask]
        values = token_values(models.value, batch.tokens)[mask]
        value = ppo_value_loss(values, batch.values[mask], batch.returns[mask], self.value_clip)
        ones = torch.ones_like(policy)
        return {
            "loss": Mean.of(policy + value, ones),
            "loss/policy": Mean.of(policy.detach(), ones),
            "loss/value": Mean.of(value.detach(), ones),
            "entropy": Mean.of(entropy.detach(), ones),
            "kl/old": Mean.of(k2(logprobs, old).detach(), ones),
            "ratio": Mean.of(ratio.detach(), ones),
        }


METHOD = TRPO
