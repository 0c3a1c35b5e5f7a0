"""The constrained optimum, and the multiplier that leads there."""

import math

import pytest
import torch

from enumerable import COUNT, EVERYTHING, TableReward, Tabular, TabularRollout, distribution, rows_of, total_variation
from palate.errors import ConfigError
from palate.methods.ppo_lagrangian import PPOLagrangian, lagrangian_scores, next_multiplier
from palate.training.loop import Run, train
from palate.types import Models, Scored
from test_fixed_points import settings, table

KL_COEF = 0.5


def costs():
    return table(seed=11)


class TwoTables:
    """A reward r with a part "cost" of weight 0."""

    def __call__(self, tokens):
        reward, cost = (TableReward(each)(tokens).scores for each in (table(), costs()))
        return Scored(reward, {"help": reward, "cost": cost})


def tilted(reference, multiplier):
    target = reference * ((table() - multiplier * costs()) / KL_COEF).exp()
    return target / target.sum(-1, keepdim=True)


def constrained_optimum(reference, limit):
    """lambda* by bisection: the mean cost of the tilted reference falls as lambda grows."""

    def mean_cost(multiplier):
        return float((tilted(reference, multiplier) * costs()).sum(-1).mean())

    low, high = 0.0, 50.0
    assert mean_cost(low) > limit > mean_cost(high)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_cost(middle) > limit else (low, middle)
    return high, tilted(reference, high)


def trained(folder, limit, steps=160, **changes):
    policy = Tabular(seed=3)
    method = PPOLagrangian(
        **{
            "kl_coef": KL_COEF,
            "cost_limit": limit,
            "multiplier": 0.1,
            "multiplier_rate": 0.5,
            "cost_window": 1,
            "epochs": 1,
            "value_coef": 1.0,
            "lam": 1.0,
        }
        | changes
    )
    run = Run(
        folder=folder,
        method=method,
        models=Models(policy, Tabular(seed=3), TwoTables(), Tabular(seed=9, scalar=True, scale=0.0)),
        settings=settings(learning_rate=0.05, max_steps=steps, batch_size=2),
        items=range(2),
        rollout=TabularRollout(policy, 400),
    )
    list(train(run))
    return policy, run.method


def test_training_ends_at_the_best_policy_whose_cost_is_within_the_limit(tmp_path):
    reference = distribution(Tabular(seed=3))
    free = float((tilted(reference, 0.0) * costs()).sum(-1).mean())
    limit = free - 0.4
    multiplier, target = constrained_optimum(reference, limit)
    policy, method = trained(tmp_path, limit)
    cost = float((distribution(policy) * costs()).sum(-1).mean())
    assert total_variation(distribution(policy), target) < 0.05
    assert total_variation(tilted(reference, 0.0), target) > 0.1  # the constraint matters
    assert cost == pytest.approx(limit, abs=0.05)
    assert method.multiplier == pytest.approx(multiplier, rel=0.15)


def test_a_constraint_that_holds_anyway_costs_nothing(tmp_path):
    """The multiplier shrinks for as long as the cost is below the limit; the policy ends where PPO's does."""
    policy, method = trained(tmp_path, limit=1.0)
    assert method.multiplier < 0.02
    assert total_variation(distribution(policy), tilted(distribution(Tabular(seed=3)), 0.0)) < 0.05


def test_the_score_is_the_lagrangian_over_one_plus_lambda():
    r, c = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0])
    assert torch.allclose(lagrangian_scores(r, c, 3.0), torch.tensor([(1 - 1.5) / 4, (-2 + 3) / 4]))
    assert torch.equal(lagrangian_scores(r, c, 0.0), r)


def test_the_multiplier_climbs_by_its_own_gradient_and_stays_positive_and_bounded():
    """d(lambda J)/d ln lambda = lambda J."""
    assert next_multiplier(2.0, 0.3, 0.1, 100.0) == pytest.approx(2.0 * math.exp(0.1 * 2.0 * 0.3))
    assert next_multiplier(2.0, -0.3, 0.1, 100.0) == pytest.approx(2.0 * math.exp(-0.1 * 2.0 * 0.3))
    assert next_multiplier(2.0, 1e9, 0.1, 5.0) == 5.0
    assert next_multiplier(2.0, -1e9, 0.1, 5.0) > 0


def test_the_mean_cost_is_that_of_the_window_and_of_a_larger_batch_whole():
    """Costs 1..4 one batch after the other, window 3: after the second batch of two, 2, 3 and 4 count."""
    method = PPOLagrangian(cost_window=3, multiplier_rate=0.1, cost_limit=0.0)
    policy = Tabular(seed=1)
    models = Models(policy, Tabular(seed=1), TwoTables(), Tabular(seed=2, scalar=True))
    with torch.no_grad():
        batch = method.prepare(models, rows_of(EVERYTHING[:COUNT]))
    found = []
    for part in (torch.tensor([0, 1]), torch.tensor([2, 3])):
        some = batch.select(part)
        some.tokens.extras["cost"].copy_(part + 1.0)
        method = method.adapt(some)
        found.append(method.recent_costs)
    assert found == [(1.0, 2.0), (2.0, 3.0, 4.0)]
    whole = method.adapt(batch)
    assert len(whole.recent_costs) == COUNT


def test_a_reward_without_the_named_part_is_refused():
    models = Models(Tabular(), Tabular(), TableReward(table()), Tabular(scalar=True))
    with pytest.raises(ConfigError, match='no part "cost".*Found: one unnamed reward'):
        PPOLagrangian().prepare(models, rows_of(EVERYTHING[:4]))


@pytest.mark.parametrize("wrong", [{"multiplier": 0.0}, {"multiplier_rate": -1.0}, {"cost_limit": math.inf}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PPOLagrangian(**wrong)
