"""PPO with a Lagrange multiplier (Safe RLHF) -- Dai et al. 2023, arXiv:2310.12773; PPO as in Ouyang et al. 2022,
arXiv:2203.02155.

    min_theta max_{lambda >= 0}   - J_R(theta) + lambda J_C(theta)                                               (eq. 10)
    J_R = E[ r(x, y) ] - kl_coef * KL(pi || pi_ref),     J_C = E[ c(x, y) ] - cost_limit

    A_t         = ( A^R_t - lambda A^C_t ) / (1 + lambda)                     advantage of (r - lambda c) / (1 + lambda)
    ln lambda  <- ln lambda + multiplier_rate * lambda * J_C                                            (appendix B.3)

The reward is a sum with two named parts, one of which is the cost (a model in which higher is more harmful); what is maximised
is the sum of the other parts with their weights. J_C is the mean over the last ``cost_window`` responses. Dividing by
1 + lambda keeps the size of the advantage and does not move the optimum, for the KL charge is divided with it.

The fixed point is pi_ref exp((r - lambda* c) / kl_coef) / Z, with lambda* the smallest for which the mean cost is at most
cost_limit: the best policy among those.

Roles: policy (trained), reference (frozen), reward (frozen), value (trained). Data: prompts.
Left out: a second value model for the cost (one learns the value of (r - lambda c) / (1 + lambda) and follows as lambda moves;
the paper has two), the paper's PPO-ptx term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from palate.errors import ConfigError
from palate.methods.ppo import PPO
from palate.models.forward import score_responses
from palate.types import Mean, Models, Reward, Scored, Tokens, Trajectories


def lagrangian_scores(scores: Tensor, costs: Tensor, multiplier: float) -> Tensor:
    """(r - lambda c) / (1 + lambda), [N].

    Args:
        scores: r, [N], reward units; costs: c, [N], cost units, higher is worse.
        multiplier: lambda >= 0, reward units per unit of cost.
    """
    return (scores - multiplier * costs) / (1 + multiplier)


def next_multiplier(multiplier: float, excess: float, rate: float, highest: float) -> float:
    """Gradient ascent on lambda J_C in ln lambda, which keeps lambda positive; at most ``highest``.

    Args:
        excess: J_C, mean cost less the limit, cost units.
        rate: of ln lambda, > 0.
    """
    step = min(rate * multiplier * excess, 50.0)  # exp of more leaves every float; the bound below catches it anyway
    return min(max(multiplier * math.exp(step), 1e-8), highest)


@dataclass(frozen=True)
class PPOLagrangian:
    """Settings.

    Attributes:
        cost: name of the part of the reward that is the cost, e.g. "cost" in
            ``reward: {helpful: ..., cost: {model: ..., weight: 0}}``; its weight must be 0.
        cost_limit: the mean cost that is still allowed, cost units. A cost model trained as in the paper has its border
            between harmful and harmless at 0.
        multiplier: lambda, > 0; where it starts. Part of the run's state from then on.
        multiplier_rate: of the ascent on ln lambda, > 0; 0.01 to 0.1.
        multiplier_max: lambda is never above this; 5 to 100.
        cost_window: responses over which the mean cost is taken, at least; 128. A batch that is larger counts whole.
        kl_coef: price of leaving the reference, reward units per nat, >= 0; 0.02 to 0.2, on normalised scores.
        target_kl: leave a batch alone once KL(old, new) exceeds 1.5 times this, nats a token; None = never.
        epochs: passes over each batch of samples; 1 to 4.
        minibatches: optimizer steps in one pass.
        clip: of the probability ratio; 0.1 to 0.3.
        value_clip: how far a value may move from its old one, reward units; None = no clipping.
        value_coef: weight of the value loss (which has the factor 1/2); 0.1.
        gamma: discount a token; 1.
        lam: of the advantage estimate; 0.95.
        whiten_advantages: zero mean and unit variance over all response tokens of the batch.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
        recent_costs: the costs in the window; part of the run's state.
    """

    cost: str = "cost"
    cost_limit: float = 0.0
    multiplier: float = 1.0
    multiplier_rate: float = 0.05
    multiplier_max: float = 100.0
    cost_window: int = 128
    kl_coef: float = 0.05
    target_kl: float | None = None
    epochs: int = 4
    minibatches: int = 1
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0
    recent_costs: tuple[float, ...] = ()

    needs = ("policy", "reference", "reward", "value")
    trains = ("policy", "value")
    reads = "prompts"
    off_policy = "weights"

    def __post_init__(self) -> None:
        self._ppo()  # what the two have in common is checked there
        for name in ("multiplier", "multiplier_rate", "multiplier_max", "cost_window"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"ppo_lagrangian: {name} = {getattr(self, name)!r}, expected a number above 0.")
        if not math.isfinite(self.cost_limit):
            raise ConfigError(f"ppo_lagrangian: cost_limit = {self.cost_limit!r}, expected a finite number.")

    def _ppo(self) -> PPO:
        return PPO(
            kl_coef=self.kl_coef / (1 + self.multiplier),
            target_kl=self.target_kl,
            epochs=self.epochs,
            minibatches=self.minibatches,
            clip=self.clip,
            value_clip=self.value_clip,
            value_coef=self.value_coef,
            gamma=self.gamma,
            lam=self.lam,
            whiten_advantages=self.whiten_advantages,
            missing_eos_penalty=self.missing_eos_penalty / (1 + self.multiplier),
            temperature=self.temperature,
        )

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """ppo's, with (r - lambda c) / (1 + lambda) as the score; the KL charge and the penalty divided alike."""
        assert models.reward is not None
        weighed = _Weighed(models.reward, self.cost, self.multiplier)
        made = self._ppo().prepare(replace(models, reward=weighed), batch)
        tokens = replace(made.tokens, extras={**made.tokens.extras, "cost": weighed.costs})
        metrics = {
            **made.metrics,
            "cost": Mean.of(weighed.costs),
            "lagrange/multiplier": Mean.of(torch.tensor(self.multiplier, dtype=torch.float64)),
            "kl/coef": Mean.of(torch.tensor(self.kl_coef, dtype=torch.float64)),
        }
        return replace(made, tokens=tokens, metrics=metrics)

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """ppo's."""
        return self._ppo().loss(models, batch)

    def stop(self, metrics: dict[str, float]) -> bool:
        """Leave this batch alone: the policy has moved far enough from the one that sampled it."""
        return self._ppo().stop(metrics)

    def adapt(self, batch: Trajectories) -> PPOLagrangian:
        """The method for the next batch: the multiplier moved by how much the mean cost exceeds its limit."""
        costs = batch.tokens.extras["cost"]
        assert isinstance(costs, Tensor)
        recent = (*self.recent_costs, *costs.tolist())[-max(self.cost_window, len(costs)) :]
        excess = sum(recent) / len(recent) - self.cost_limit
        multiplier = next_multiplier(self.multiplier, excess, self.multiplier_rate, self.multiplier_max)
        return replace(self, multiplier=multiplier, recent_costs=recent)


class _Weighed:
    """The reward that the multiplier makes of a reward and a cost; remembers the costs."""

    def __init__(self, reward: torch.nn.Module | Reward, cost: str, multiplier: float) -> None:
        self.reward, self.cost, self.multiplier = reward, cost, multiplier
        self.costs = torch.zeros(0)

    def __call__(self, tokens: Tokens) -> Scored:
        scored = score_responses(self.reward, tokens)
        if self.cost not in scored.parts:
            found = ", ".join(scored.parts) or "one unnamed reward"
            raise ConfigError(
                f'ppo_lagrangian: the reward has no part "{self.cost}". Found: {found}. Give a sum of named parts, the '
                f"cost with weight 0: reward: {{helpful: runs/reward/model, {self.cost}: {{model: runs/cost/model, weight: 0}}}}."
            )
        part = getattr(self.reward, "rewards", {}).get(self.cost)
        if isinstance(part, tuple) and part[1]:
            raise ConfigError(
                f'ppo_lagrangian: the part "{self.cost}" has weight {part[1]:g}; expected 0, because the multiplier is its '
                "weight: with another it would count twice."
            )
        self.costs = scored.parts[self.cost]
        return Scored(lagrangian_scores(scored.scores, self.costs, self.multiplier), scored.parts)


METHOD = PPOLagrangian
