"""Where the methods without a value model end, on a model whose every sequence can be written down; by the real loop.

    REINFORCE, RLOO, REINFORCE++, and GRPO's family with the KL in the reward      pi_ref exp(r / kl_coef) / Z
    GRPO's family with k3 in the loss                                              a policy of its own: at every state
        pi(a|s) = beta w(s,a) ref(a|s) / ( lambda_s + beta w(s,a) - Q(s,a) ),      Q(s,a) = E[ w(y) A(y) | s, a ],
        w(s,a) = E[ w(y) | s, a ],  w(y) = 1/|y| (GRPO, GSPO) or 1 (Dr. GRPO, DAPO), lambda_s so that pi adds up to 1

``settled`` finds the latter by following the exact expected gradient over all 15 responses, in float64, with no code of
the methods. A(y) there is that of infinitely many samples. Expected gradients of two samples are compared exactly.
"""

import functools
from dataclasses import replace

import pytest
import torch

from enumerable import (
    COUNT,
    EVERYTHING,
    PROMPTS,
    RESPONSES,
    TableReward,
    Tabular,
    TabularRollout,
    distribution,
    rows_of,
    total_variation,
)
from palate.methods import _sampled, grpo, reinforce, reinforce_pp, rloo
from palate.methods.dapo import DAPO
from palate.methods.dr_grpo import DrGRPO
from palate.methods.grpo import GRPO
from palate.methods.gspo import GSPO
from palate.methods.reinforce import Reinforce
from palate.methods.reinforce_pp import ReinforcePP
from palate.methods.rloo import RLOO
from palate.training.loop import Run, train
from palate.types import Models, joined
from test_fixed_points import KL_COEF, settings, table

LENGTH = torch.tensor([len(r) for r in RESPONSES], dtype=torch.float64)


def tilted(reference, kl_coef=KL_COEF):
    """pi_ref exp(r / kl_coef) / Z, [2, 15]."""
    wanted = reference * (table() / kl_coef).exp()
    return wanted / wanted.sum(-1, keepdim=True)


class WithGreedy(TabularRollout):
    """The same, and then the greedy response to each prompt."""

    @torch.no_grad()
    def __call__(self, items, *seed, progress=None):
        rows = super().__call__(items, *seed)
        greedy = replace(rows_of([(prompt, self._greedy(prompt)) for prompt in items]), group=torch.arange(len(items)))
        both = joined(rows, greedy)
        group, whose = torch.cat([rows.group, greedy.group]), ["policy"] * len(rows) + ["greedy"] * len(greedy)
        both = replace(both, group=group, extras={**both.extras, "drawn_by": whose})
        return both.select(torch.argsort(group, stable=True))

    def _greedy(self, prompt):
        words = ()
        while words not in RESPONSES:
            ids = torch.tensor([[PROMPTS[prompt], *words]])
            words = (*words, int(self.policy(ids).logits[0, -1].argmax()))
        return RESPONSES.index(words)


def trained_policy(folder, method, steps=90, samples=96, prompts=1, rollout=TabularRollout, learning_rate=0.08):
    """What the loop ends at, from the reference; ``prompts`` groups of ``samples`` for each of the two prompts."""
    policy, reference = Tabular(seed=1), Tabular(seed=1).requires_grad_(False)
    needed = reference if "reference" in method.needs else None
    run = Run(
        folder=folder,
        method=method,
        models=Models(policy=policy, reference=needed, reward=TableReward(table())),
        settings=settings(learning_rate=learning_rate, max_steps=steps, batch_size=2 * prompts),
        items=[i % 2 for i in range(2 * prompts)],
        rollout=rollout(policy, samples),
        starts_at_reference=needed is not None,
    )
    metrics = list(train(run))
    assert metrics[0].get("kl/reference", 0.0) == 0
    assert getattr(method, "epochs", 1) > 1 or metrics[0]["ratio"] == pytest.approx(1, abs=1e-6)
    return distribution(policy)


def reference():
    return distribution(Tabular(seed=1))


# --- the exact optimum ------------------------------------------------------------------------------------------------

EXACT = {
    "reinforce, running": (Reinforce(kl_coef=KL_COEF), {}),
    "reinforce, batch": (Reinforce(kl_coef=KL_COEF, baseline="batch"), {}),
    "reinforce, greedy": (Reinforce(kl_coef=KL_COEF, baseline="greedy"), {"rollout": WithGreedy}),
    "rloo, groups of 2": (RLOO(kl_coef=KL_COEF), {"samples": 2, "prompts": 64}),
    "rloo, two epochs": (RLOO(kl_coef=KL_COEF, epochs=2), {"learning_rate": 0.05}),
    "reinforce_pp": (ReinforcePP(kl_coef=KL_COEF), {}),
    "reinforce_pp, group": (ReinforcePP(kl_coef=KL_COEF, baseline="group"), {}),
    "grpo, kl in reward": (GRPO(kl_coef=KL_COEF, kl="reward"), {}),
    "dr_grpo, kl in reward, groups of 2": (DrGRPO(kl_coef=KL_COEF, kl="reward"), {"samples": 2, "prompts": 64}),
    "dapo, kl in reward": (DAPO(kl_coef=KL_COEF, kl="reward", overlong_buffer=0.0), {}),
    "gspo, kl in reward": (GSPO(kl_coef=KL_COEF, kl="reward", minibatches=1), {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_with_the_kl_in_the_reward_the_exact_optimum_is_reached(name, tmp_path):
    method, how = EXACT[name]
    assert total_variation(reference(), tilted(reference())) > 0.4
    assert total_variation(trained_policy(tmp_path, method, **how), tilted(reference())) < 0.03


# --- the fixed points of k3 in the loss -------------------------------------------------------------------------------

_PREFIXES = sorted({r[:t] for r in RESPONSES for t in range(len(r))})
_STATE = torch.zeros(COUNT, 3, dtype=torch.int64)
_TOKEN = torch.zeros(COUNT, 3, dtype=torch.int64)
_REAL = torch.zeros(COUNT, 3, dtype=torch.bool)
for _i, _r in enumerate(RESPONSES):
    for _t, _word in enumerate(_r):
        _STATE[_i, _t], _TOKEN[_i, _t], _REAL[_i, _t] = _PREFIXES.index(_r[:_t]), _word, True


def conditionals(p):
    """p(a|s) of a distribution over responses, [2, 7 states, 3 words]; p > 0."""
    joint = torch.zeros(2, len(_PREFIXES), 3, dtype=torch.float64)
    for i, response in enumerate(RESPONSES):
        for t, word in enumerate(response):
            joint[:, _PREFIXES.index(response[:t]), word] += p[:, i]
    return joint / joint.sum(-1, keepdim=True)


def of_tokens(logp):
    """[2, states, words] -> [2, 15, 3], of every response's tokens, 0 after its end."""
    return torch.where(_REAL, logp[:, _STATE, _TOKEN], 0)


def advantage(p, standardise):
    mean = (p * table()).sum(-1, keepdim=True)
    std = (p * (table() - mean).square()).sum(-1, keepdim=True).sqrt() if standardise else 1.0
    return (table() - mean) / std


WEIGHT = {"tokens": torch.ones(COUNT, dtype=torch.float64), "responses": 1 / LENGTH}


@functools.cache
def settled(weight, standardise, beta, steps=2500):
    """Follow the exact expected gradient of  - w(y) sum_t [ A(y) - beta k3_t ]  with y ~ pi, to where it is zero."""
    weight = WEIGHT[weight]
    ref = conditionals(reference()).log()
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(1e-5, (1 - k / steps) ** 2))
    for _ in range(steps):
        logp = logits.log_softmax(-1)
        mine, its = of_tokens(logp), of_tokens(ref)
        p = mine.sum(-1).exp().detach()
        slope = advantage(p, standardise)[..., None] - beta * (1 - (its - mine.detach()).exp())  # d k3/d log pi
        loss = -(p[..., None] * weight[:, None] * slope * mine).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    assert logits.grad.abs().max() < 1e-5, "not settled"
    return of_tokens(logits.detach().log_softmax(-1)).sum(-1).exp()


@pytest.mark.parametrize("weight", ["tokens", "responses"])
@pytest.mark.parametrize("standardise", [True, False])
def test_the_settled_policy_is_the_closed_form_at_every_state(weight, standardise):
    """pi (lambda + beta w - Q) = beta w ref at every state: lambda, found for each word, is the same for all three."""
    p, weight = settled(weight, standardise, KL_COEF), WEIGHT[weight]
    pi, ref, a = conditionals(p), conditionals(reference()), advantage(p, standardise)
    for prompt in range(2):
        for s, prefix in enumerate(_PREFIXES):
            found = []
            for word in range(3):
                here = [i for i, r in enumerate(RESPONSES) if r[: len(prefix) + 1] == (*prefix, word)]
                mass = p[prompt, here].sum()
                w = (p[prompt, here] * weight[here]).sum() / mass
                q = (p[prompt, here] * weight[here] * a[prompt, here]).sum() / mass
                found.append(float(KL_COEF * w * ref[prompt, s, word] / pi[prompt, s, word] - KL_COEF * w + q))
            assert max(found) - min(found) < 1e-3


# k3's gradient is noisy where the policy has left the reference, and A(y) is that of many samples: so, many samples.
MANY = {"samples": 400, "learning_rate": 0.15}
OWN = {
    "grpo": (GRPO(kl_coef=KL_COEF), "responses", True, KL_COEF, MANY),
    "gspo": (GSPO(kl_coef=KL_COEF, minibatches=1), "responses", True, KL_COEF, MANY),
    "dapo": (DAPO(kl_coef=KL_COEF, overlong_buffer=0.0), "tokens", True, KL_COEF, MANY),
    "dr_grpo": (DrGRPO(kl_coef=KL_COEF), "tokens", False, KL_COEF * 400 / 399, MANY),
    "dr_grpo, groups of 2": (DrGRPO(kl_coef=KL_COEF), "tokens", False, KL_COEF * 2, {"samples": 2, "prompts": 96}),
}


@pytest.mark.parametrize("name", OWN)
def test_with_k3_in_the_loss_its_own_fixed_point_is_reached(name, tmp_path):
    method, weight, standardise, beta, how = OWN[name]
    found = trained_policy(tmp_path, method, **how)
    assert total_variation(found, settled(weight, standardise, beta)) < 0.03


def test_the_fixed_points_are_told_apart():
    """Otherwise the tests above say little: with groups of 2 the KL weighs twice; lengths and deviations count; none is
    the exact optimum."""
    points = [
        settled("tokens", False, KL_COEF),
        settled("tokens", False, 2 * KL_COEF),
        settled("tokens", True, KL_COEF),
        settled("responses", True, KL_COEF),
        tilted(reference()),
        reference(),
    ]
    apart = [total_variation(p, q) for i, p in enumerate(points) for q in points[:i]]
    assert min(apart) > 0.04


# --- planted bugs end elsewhere ---------------------------------------------------------------------------------------


def k1_in_the_loss(p, q):
    return p - q


def wrong_sign(p, q):
    return q - p


BUGS = {
    "k1 in the loss": ("grpo", grpo, "k3", k1_in_the_loss),
    "KL with the wrong sign in the loss": ("dr_grpo", grpo, "k3", lambda p, q: -_sampled.k3(p, q)),
    "not divided by the standard deviation": ("grpo", grpo, "group_relative", None),
    "KL with the wrong sign in the reward": ("rloo, groups of 2", _sampled, "k1", wrong_sign),
    "KL with the wrong sign in REINFORCE": ("reinforce, batch", _sampled, "k1", wrong_sign),
}


def no_division(scores, group, eps, group_relative=grpo.group_relative):
    return group_relative(scores, group, scale=False)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_ends_elsewhere(bug, monkeypatch, tmp_path):
    name, module, attribute, wrong = BUGS[bug]
    monkeypatch.setattr(module, attribute, wrong or no_division)
    if name in OWN:
        method, weight, standardise, beta, how = OWN[name]
        wanted = settled(weight, standardise, beta)
    else:
        (method, how), wanted = EXACT[name], tilted(reference())
    assert total_variation(trained_policy(tmp_path, method, **how), wanted) > 0.06


# --- expected gradients, exactly --------------------------------------------------------------------------------------


def exact_gradient(policy, kl_coef):
    """Of the mean over both prompts of E[r] - kl_coef KL(pi || ref), by enumeration."""
    rows = rows_of(EVERYTHING)
    logits = policy(rows.ids).logits.double().log_softmax(-1)[:, :-1]
    logp = (logits.gather(-1, rows.ids[:, 1:, None])[..., 0] * rows.response_mask[:, 1:]).sum(-1).reshape(2, COUNT)
    value = (logp.exp() * (table() - kl_coef * (logp - reference().log()))).sum(-1).mean()
    return torch.autograd.grad(value, policy.base_model.table)[0]


def expected_gradient(method, policy):
    """Minus the gradient of the method's own loss, averaged over every pair of responses to every prompt with its
    probability: the loss is linear in the advantage while the ratio is 1, so the weights go there."""
    pairs = [(p, i, j) for p in range(2) for i in range(COUNT) for j in range(COUNT)]
    rows = rows_of([(p, r) for p, i, j in pairs for r in (i, j)])
    rows = replace(rows, group=torch.arange(len(pairs)).repeat_interleave(2))
    p = distribution(policy)
    weight = torch.tensor([float(p[x, i] * p[x, j]) for x, i, j in pairs]).repeat_interleave(2)
    models = Models(policy=policy, reference=Tabular(seed=1), reward=TableReward(table()))
    with torch.no_grad():
        batch = method.prepare(models, rows)
    batch = replace(batch, advantages=batch.advantages * weight[:, None])
    loss = method.loss(models, batch)["loss"]
    (gradient,) = torch.autograd.grad(-loss.total, policy.base_model.table)
    return gradient / 4  # two prompts, two responses


UNBIASED = {
    "rloo": (RLOO(kl_coef=KL_COEF), 1.0),
    "rloo, two epochs, first look": (RLOO(kl_coef=KL_COEF, epochs=2), 1.0),
    "dr_grpo": (DrGRPO(kl_coef=KL_COEF, kl="reward", max_new_tokens=1), 0.5),
    "reinforce": (Reinforce(kl_coef=KL_COEF, running_reward=0.7), 1.0),
}


def bias(name):
    method, factor = UNBIASED[name]
    policy = Tabular(seed=8)
    wanted = factor * exact_gradient(policy, KL_COEF)
    return float((expected_gradient(method, policy) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_of_two_samples_is_the_exact_one(name):
    """For RLOO and a constant baseline; with one's own score in the mean it is (G - 1)/G = 1/2 of it."""
    assert bias(name) < 1e-5


@pytest.mark.parametrize(
    "name, module, attribute, wrong",
    [
        ("rloo", rloo, "leave_one_out", lambda rewards, group: grpo.group_relative(rewards, group, scale=False)),
        ("rloo", reinforce, "row_sum", grpo.row_mean),
        ("reinforce", _sampled, "k1", wrong_sign),
        ("dr_grpo", _sampled, "k1", lambda p, q: 2 * (p - q)),
    ],
    ids=["no leave-one-out", "mean for sum", "wrong sign", "twice the KL"],
)
def test_a_planted_bug_is_seen_in_the_expected_gradient(name, module, attribute, wrong, monkeypatch):
    monkeypatch.setattr(module, attribute, wrong)
    assert bias(name) > 0.05


def cosine_with_the_exact_gradient(method):
    policy = Tabular(seed=8)
    wanted = exact_gradient(policy, KL_COEF)
    models = Models(policy=policy, reference=Tabular(seed=1), reward=TableReward(table()))
    with torch.no_grad():
        batch = method.prepare(models, TabularRollout(policy, 20_000)(range(2), 3))
    (gradient,) = torch.autograd.grad(-method.loss(models, batch)["loss"].total, policy.base_model.table)
    return float((gradient * wanted).sum() / (gradient.norm() * wanted.norm()))


def test_reinforce_pp_points_where_the_exact_gradient_does(monkeypatch):
    """Its whitened advantages are the exact ones up to a factor and a constant. Rewards of single tokens, or what was
    paid before a token, would point elsewhere."""
    method, to_go = ReinforcePP(kl_coef=KL_COEF), reinforce_pp.discounted_returns
    assert cosine_with_the_exact_gradient(method) > 0.995
    for wrong in (
        lambda rewards, mask, gamma: torch.where(mask, rewards, 0),
        lambda rewards, mask, gamma: to_go(rewards.flip(-1), mask.flip(-1)).flip(-1),
    ):
        monkeypatch.setattr(reinforce_pp, "discounted_returns", wrong)
        assert cosine_with_the_exact_gradient(method) < 0.95
