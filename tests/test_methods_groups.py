"""The methods without a value model against plain Python: advantages, losses, gradients; and what they share."""

import math
from dataclasses import replace

import pytest
import torch

import slow
from batches import Samples, means_and_gradient, models_for, repadded, run_of, tokens, trained_of, weights_of
from palate.config import load_config, load_settings
from palate.errors import ConfigError, DataError, ModelError
from palate.functional import masked
from palate.functional.advantages import all_equal, group_stds
from palate.functional.policy_gradient import clipped_surrogate, is_clipped, probability_ratio
from palate.methods import _sampled, dapo, dr_grpo, grpo, gspo, reinforce, reinforce_pp, rloo
from palate.methods.dapo import DAPO, overlong_penalty
from palate.methods.dr_grpo import DrGRPO
from palate.methods.grpo import GRPO, token_losses
from palate.methods.gspo import GSPO, gspo_loss, sequence_ratio
from palate.methods.reinforce import Reinforce
from palate.methods.reinforce_pp import ReinforcePP
from palate.methods.rloo import RLOO, rloo_loss
from palate.models.forward import token_logprobs
from palate.models.roles import frozen_copy
from palate.resolve import Facts, require_all, resolved
from palate.training.loop import train
from palate.types import Scored, joined, microbatches
from tiny import trained

NAN = float("nan")
# Four groups of three: all different, all equal, two equal, far apart.
SCORES = [1.0, -0.5, 2.5, 0.7, 0.7, 0.7, 3.0, -1.0, 3.0, 100.0, -0.25, 4.0]
GROUPS = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
LENGTHS = [3, 1, 5, 2, 6, 4, 1, 2, 7, 5, 3, 4]
METHODS = [Reinforce, RLOO, GRPO, DrGRPO, DAPO, GSPO, ReinforcePP]


def scored(values):
    """A reward with a table: of row i of the batch of twelve, whichever rows it is asked about."""
    table = {tuple(ids.tolist()): v for ids, v in zip(tokens().ids, values, strict=True)}
    return lambda rows: Scored(torch.tensor([table[_whole(ids)] for ids in rows.ids]), {})


def _whole(ids):
    return tuple(ids.tolist() + [0] * (10 - len(ids)))


def lists(values, mask):
    return [row[m].double().tolist() for row, m in zip(values, mask, strict=True)]


def by_group(function, values):
    """A function of the numbers of one group, applied to each."""
    found = [0.0] * 12
    for rows in GROUPS:
        for row, value in zip(rows, function([values[i] for i in rows]), strict=True):
            found[row] = value
    return found


def charged(old, ref, scores, kl_coef):
    """The whole response's reward: score less kl_coef times the summed log-ratio."""
    return [s - kl_coef * (sum(o) - sum(q)) for s, o, q in zip(scores, old, ref, strict=True)]


def ratio(new, old):
    return math.exp(new - old)


# --- each loss, from its paper: new, old, ref are lists of log-probabilities, one list a response ---------------------


def slow_reinforce(new, old, ref):
    rewards = charged(old, ref, SCORES, 0.3)
    return slow.mean([-(r - slow.mean(rewards)) * sum(p) for r, p in zip(rewards, new, strict=True)])


def slow_running(new, old, ref):
    return slow.mean([-(r - 2.0) * sum(p) for r, p in zip(charged(old, ref, SCORES, 0.3), new, strict=True)])


def slow_rloo(new, old, ref):
    advantages = by_group(slow.leave_one_out, charged(old, ref, SCORES, 0.3))
    return slow.mean([-a * sum(p) for a, p in zip(advantages, new, strict=True)])


def slow_rloo_clipped(new, old, ref):
    advantages = by_group(slow.leave_one_out, charged(old, ref, SCORES, 0.3))
    pairs = zip(advantages, new, old, strict=True)
    return slow.mean([slow.clipped(ratio(sum(p), sum(o)), a, 0.2, 0.2) for a, p, o in pairs])


def tokens_of(new, old, ref, advantages, low, high, kl_coef):
    """GRPO's token losses, a list a response."""
    return [
        [
            slow.clipped(ratio(p, o), a, low, high) + (kl_coef * slow.k3(p, q) if kl_coef else 0)
            for p, o, q in zip(*row, strict=True)
        ]
        for row, a in zip(zip(new, old, ref or old, strict=True), advantages, strict=True)
    ]


def slow_grpo(new, old, ref):
    advantages = by_group(lambda s: slow.z_scores(s, 1e-4), SCORES)
    return slow.mean([slow.mean(row) for row in tokens_of(new, old, ref, advantages, 0.1, 0.1, 0.4)])


def slow_grpo_kl_in_reward(new, old, ref):
    advantages = by_group(lambda s: slow.z_scores(s, 1e-4), charged(old, ref, SCORES, 0.4))
    return slow.mean([slow.mean(row) for row in tokens_of(new, old, ref, advantages, 0.2, 0.2, 0)])


def slow_grpo_missing_end(new, old, ref):
    scores = [-5.0 if i in (2, 9) else s for i, s in enumerate(SCORES)]
    advantages = by_group(lambda s: slow.z_scores(s, 1e-4), scores)
    return slow.mean([slow.mean(row) for row in tokens_of(new, old, None, advantages, 0.2, 0.2, 0)])


def less_mean(scores):
    return [s - slow.mean(scores) for s in scores]


def slow_dr_grpo(new, old, ref):
    rows = tokens_of(new, old, ref, by_group(less_mean, SCORES), 0.2, 0.2, 0.0)
    return slow.mean([sum(row) / 9 for row in rows])


def slow_dr_grpo_kl(new, old, ref):
    rows = tokens_of(new, old, ref, by_group(less_mean, SCORES), 0.2, 0.2, 0.4)
    return slow.mean([sum(row) / 9 for row in rows])


def slow_dapo(new, old, ref):
    """M = 8, B = 4; the second group is left out; all tokens weigh the same."""
    shaped = [s + slow.overlong(n, 8, 4) for s, n in zip(SCORES, LENGTHS, strict=True)]
    rows = tokens_of(new, old, None, by_group(lambda s: slow.z_scores(s, 1e-4), shaped), 0.1, 0.2, 0)
    return slow.mean([loss for i, row in enumerate(rows) if i not in GROUPS[1] for loss in row])


def slow_gspo(new, old, ref):
    advantages = by_group(lambda s: slow.z_scores(s, 1e-4), SCORES)
    found = []
    for p, o, a in zip(new, old, advantages, strict=True):
        s = (math.exp(sum(p)) / math.exp(sum(o))) ** (1 / len(p))
        found.append(slow.clipped(s, a, 0.05, 0.1))
    return slow.mean(found)


def slow_gspo_kl(new, old, ref):
    kl = [slow.mean([slow.k3(a, b) for a, b in zip(p, q, strict=True)]) for p, q in zip(new, ref, strict=True)]
    return slow_gspo(new, old, ref) + 0.4 * slow.mean(kl)


def slow_reinforce_pp(new, old, ref, scores=SCORES):
    rewards = [slow.token_rewards(o, q, s, 0.3) for o, q, s in zip(old, ref, scores, strict=True)]
    to_go = [sum(0.9 ** (s - t) * row[s] for s in range(t, len(row))) for row in rewards for t in range(len(row))]
    advantages = slow.whiten(to_go)
    flat = [(p, o) for row in zip(new, old, strict=True) for p, o in zip(*row, strict=True)]
    return slow.mean([slow.ppo_policy(p, o, a, 0.1) for (p, o), a in zip(flat, advantages, strict=True)])


def slow_reinforce_pp_group(new, old, ref):
    return slow_reinforce_pp(new, old, ref, by_group(less_mean, SCORES))


DEFINITIONS = {
    "reinforce": (Reinforce(kl_coef=0.3, baseline="batch"), slow_reinforce),
    "reinforce, first batch": (Reinforce(kl_coef=0.3), slow_reinforce),
    "reinforce, running": (Reinforce(kl_coef=0.3, running_reward=2.0), slow_running),
    "rloo": (RLOO(kl_coef=0.3), slow_rloo),
    "rloo, clipped": (RLOO(kl_coef=0.3, epochs=2), slow_rloo_clipped),
    "grpo": (GRPO(kl_coef=0.4, clip=0.1), slow_grpo),
    "grpo, warm": (GRPO(kl_coef=0.4, clip=0.1, temperature=0.7), slow_grpo),
    "grpo, kl in reward": (GRPO(kl_coef=0.4, kl="reward"), slow_grpo_kl_in_reward),
    "grpo, missing end": (GRPO(kl_coef=0.0, missing_eos_score=-5.0), slow_grpo_missing_end),
    "dr_grpo": (DrGRPO(max_new_tokens=9), slow_dr_grpo),
    "dr_grpo, kl": (DrGRPO(max_new_tokens=9, kl_coef=0.4), slow_dr_grpo_kl),
    "dapo": (DAPO(max_new_tokens=8, overlong_buffer=0.5, clip_low=0.1, clip_high=0.2), slow_dapo),
    "dapo, buffer in tokens": (DAPO(max_new_tokens=8, overlong_buffer=4, clip_low=0.1, clip_high=0.2), slow_dapo),
    "gspo": (GSPO(clip_low=0.05, clip_high=0.1), slow_gspo),
    "gspo, kl": (GSPO(clip_low=0.05, clip_high=0.1, kl_coef=0.4), slow_gspo_kl),
    "reinforce_pp": (ReinforcePP(kl_coef=0.3, gamma=0.9, clip=0.1), slow_reinforce_pp),
    "reinforce_pp, group": (ReinforcePP(kl_coef=0.3, gamma=0.9, clip=0.1, baseline="group"), slow_reinforce_pp_group),
}


def assert_equals_slow(method, definition, moved=True):
    """Loss and gradient in microbatches, away from the policy that sampled, with the slow definition; the gradient by
    central differences with respect to every token's log-probability, and from there by autograd."""
    models, rows = models_for(method), tokens()
    models.reward = scored(SCORES)
    mask = rows.response_mask
    with torch.no_grad():
        batch = method.prepare(models, rows)
        old = lists(token_logprobs(models.policy, rows, temperature=method.temperature), mask)
        ref = None
        if "reference" in method.needs:
            ref = lists(token_logprobs(models.reference, rows, temperature=method.temperature), mask)
    if moved:
        trained(models.policy, seed=1)
    return assert_loss_is(lambda new: definition(new, old, ref), method, models, batch, rows, method.temperature)


def assert_loss_is(definition, method, models, batch, rows, temperature):
    """Loss and gradient are ``definition``'s of the trained log-probabilities, row by row; returns the loss's sums."""
    sums = {}
    for micro in microbatches(batch, 35):
        for name, mean in method.loss(models, micro).items():
            sums[name] = sums[name] + mean if name in sums else mean
    logprobs = token_logprobs(models.policy, rows, temperature=temperature)[rows.response_mask]
    values = logprobs.detach().double().tolist()

    def of_flat(flat):
        flat = iter(flat)
        return definition([[next(flat) for _ in range(n)] for n in LENGTHS])

    assert sums["loss"].item() == pytest.approx(of_flat(values), abs=3e-4, rel=1e-4)
    by_token = torch.tensor(slow.difference_gradient(of_flat, values), dtype=logprobs.dtype)
    parameters = trained_of(models, method)
    wanted = torch.autograd.grad(logprobs, list(parameters.values()), by_token, allow_unused=True)
    ours = torch.autograd.grad(
        sums["loss"].total / sums["loss"].count, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    for name, a, b in zip(parameters, ours, wanted, strict=True):
        assert torch.allclose(a, b, atol=5e-4 * max(1.0, float(b.abs().max()))), name
    return sums


@pytest.mark.parametrize("moved", [True, False], ids=["away", "first look"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_loss_and_gradient_equal_the_definitions(name, moved):
    sums = assert_equals_slow(*DEFINITIONS[name], moved=moved)
    if not moved:
        assert sums["ratio"].item() == pytest.approx(1, abs=1e-6)
        assert sums["kl/old"].item() == pytest.approx(0, abs=1e-6) and sums["clip_fraction"].item() == 0
    elif name not in ("reinforce", "reinforce, first batch", "reinforce, running", "rloo"):
        assert sums["clip_fraction"].item() > 0, "the test sees no clipping"


# --- bugs that these definitions must see -----------------------------------------------------------------------------


def plain_mean(scores, group):
    return _right["group_relative"](scores, group, scale=False)


def one_late(rows, old_logprobs):
    return _right["probability_ratio"](rows, old_logprobs.roll(1, -1))


_right = {"group_relative": grpo.group_relative, "probability_ratio": probability_ratio}

BUGS = {
    "no leave-one-out": ("rloo", rloo, "leave_one_out", plain_mean),
    "mean for sum": ("rloo", reinforce, "row_sum", masked.row_mean),
    "mean for sum, reinforce": ("reinforce", reinforce, "row_sum", masked.row_mean),
    "sum for mean": ("grpo", grpo, "row_mean", masked.row_sum),
    "sum for mean in the sequence ratio": ("gspo", gspo, "row_mean", masked.row_sum),
    "k1 in the loss": ("grpo", grpo, "k3", _sampled.k1),
    "the KL charge with the wrong sign": ("rloo", _sampled, "k1", lambda p, q: q - p),
    "k3 the wrong way round": ("dr_grpo, kl", grpo, "k3", lambda p, q: _sampled.k3(q, p)),
    "the old log-probability one token late": ("grpo", grpo, "probability_ratio", one_late),
    "whitening over padding": (
        "reinforce_pp",
        reinforce_pp,
        "whiten",
        lambda x, mask: torch.where(mask, masked.whiten(x, torch.ones_like(mask)), 0),
    ),
    "return for reward to go": (
        "reinforce_pp",
        reinforce_pp,
        "discounted_returns",
        lambda r, mask, gamma: torch.where(mask, r.sum(-1, keepdim=True), 0),
    ),
    "symmetric clip": (
        "dapo",
        grpo,
        "clipped_surrogate",
        lambda rho, a, low, high: clipped_surrogate(rho, a, low, low),
    ),
    "equal groups kept": ("dapo", dapo, "all_equal", lambda s, group: torch.zeros_like(s, dtype=torch.bool)),
    "divided by the standard deviation": (
        "dr_grpo",
        dr_grpo,
        "group_relative",
        lambda s, group, scale: _right["group_relative"](s, group),
    ),
    "variance by n": (
        "grpo",
        grpo,
        "group_relative",
        lambda s, g, eps: _right["group_relative"](s, g, ddof=0, eps=eps),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen_by_the_definition(bug, monkeypatch):
    name, module, attribute, wrong = BUGS[bug]
    monkeypatch.setattr(module, attribute, wrong)
    with pytest.raises(AssertionError):
        assert_equals_slow(*DEFINITIONS[name])


# --- rows without a token, and groups that say nothing ----------------------------------------------------------------


@pytest.mark.parametrize("method", [m() for m in METHODS], ids=lambda m: type(m).__name__)
def test_a_response_without_a_token_weighs_nothing(method):
    """Its score is one of its group's all the same; the loss is the mean over the others, or over their tokens."""
    models, rows = models_for(method), tokens()
    models.reward = lambda rows: Scored(torch.tensor(SCORES), {})
    mask = rows.response_mask.clone()
    mask[7] = False
    empty = replace(rows, response_mask=mask)
    with torch.no_grad():
        batch = method.prepare(models, empty)
    rest = batch.select(torch.tensor([i for i, n in enumerate(batch.tokens.response_mask.sum(-1)) if n > 0]))
    found, wanted = (method.loss(models, b)["loss"] for b in (batch, rest))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6) and float(found.count) == float(
        wanted.count
    )
    found, wanted = (means_and_gradient(method, models, b)[1] for b in (empty, repadded(empty)))
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=3e-5 * max(1.0, float(gradient.abs().max()))), name


@pytest.mark.parametrize(
    "method", [RLOO(kl_coef=0.0), GRPO(kl_coef=0.0), DrGRPO(), GSPO()], ids=lambda m: type(m).__name__
)
def test_groups_of_equal_scores_have_no_gradient_at_all(method):
    models = models_for(method)
    models.reward = scored([0.1] * 12)
    means, gradient = means_and_gradient(method, models, tokens())
    assert means["advantage/largest"] == 0 and means["groups/all_equal"] == 1 and means["groups/score_std"] == 0
    assert all((g == 0).all() for g in gradient.values())


def test_what_is_reported_of_groups_and_advantages():
    method = DrGRPO()
    models = models_for(method)
    models.reward = scored(SCORES)
    means, _ = means_and_gradient(method, models, tokens())
    stds = [math.sqrt(slow.variance([SCORES[i] for i in rows], 1)) for rows in GROUPS]
    advantages = [a for a, n in zip(by_group(less_mean, SCORES), LENGTHS, strict=True) for _ in range(n)]
    assert means["groups/all_equal"] == 0.25 and means["groups/score_std"] == pytest.approx(slow.mean(stds), rel=1e-5)
    assert means["advantage/mean"] == pytest.approx(slow.mean(advantages), rel=1e-4)
    assert means["advantage/std"] == pytest.approx(math.sqrt(slow.variance(advantages)), rel=1e-4)
    assert means["advantage/largest"] == pytest.approx(max(abs(a) for a in advantages), rel=1e-5)
    assert "kl/reference" not in means, "no reference, no KL to it"


def test_group_standard_deviations_and_who_is_equal():
    scores, group = torch.tensor([0.1, 5.0, 0.1, 7.0, 0.1, 2.0]), torch.tensor([4, 1, 4, 1, 4, 9])
    stds, equal, counts = group_stds(scores, group)
    assert stds.tolist() == pytest.approx([math.sqrt(2), 0, 0]) and stds[1] == 0
    assert equal.tolist() == [False, True, True] and counts.tolist() == [2, 3, 1]
    assert all_equal(scores, group).tolist() == [True, False, True, False, True, True]


@pytest.mark.parametrize("method", [RLOO(), GRPO(), DrGRPO(), DAPO(), GSPO(), ReinforcePP(baseline="group")])
def test_one_response_a_prompt_is_refused(method):
    models, rows = models_for(method), tokens().select(torch.tensor([0, 3, 6]))
    with torch.no_grad(), pytest.raises(DataError, match="samples_per_prompt"):
        method.prepare(models, rows)


def test_reinforce_pp_and_reinforce_need_no_groups():
    for method in (ReinforcePP(), Reinforce()):
        models, rows = models_for(method), tokens().select(torch.tensor([0, 3, 6]))
        with torch.no_grad():
            assert method.prepare(models, rows).advantages.abs().max() > 0


# --- the pieces -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, log_ratio, clipped", [
    (1.0, 0.1, False), (1.0, 0.3, True), (1.0, -5.0, False), (-1.0, 5.0, False), (-1.0, -0.1, False),
    (-1.0, -0.3, True), (0.0, 5.0, False),
])  # fmt: skip
def test_no_gradient_flows_where_the_ratio_is_clipped(advantage, log_ratio, clipped):
    """Clipped to [0.8, 1.28]: log 1.28 = 0.247, log 0.8 = -0.223."""
    x = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    a = torch.tensor(advantage, dtype=torch.float64)
    clipped_surrogate(x.exp(), a, 0.2, 0.28).backward()
    assert (x.grad == 0) == (clipped or advantage == 0) == bool(is_clipped(x.exp(), a, 0.2, 0.28) | (a == 0))


@pytest.mark.parametrize("far", [1e3, -1e3])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_extreme_ratios_are_finite(far, advantage):
    mask, zeros = torch.tensor([[True, True, False]]), torch.zeros(1, 3)
    for loss in (
        lambda p: rloo_loss(p.sum(-1), zeros.sum(-1), torch.tensor([advantage]), 0.2),
        lambda p: gspo_loss(p, zeros, torch.tensor([advantage]), mask, 3e-4, 4e-4),
        lambda p: token_losses(p, zeros, zeros, torch.full((1, 3), advantage), mask, low=0.2, high=0.28, kl_coef=0.1),
    ):
        logprobs = torch.tensor([[far, far, 0.0]], requires_grad=True)
        value = loss(logprobs).sum()
        value.backward()
        assert value.isfinite() and logprobs.grad.isfinite().all()


def test_masked_slots_may_hold_anything():
    mask = torch.tensor([[False, True, True, False]])
    clean = [torch.where(mask, x, 0) for x in torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))]
    for junk in (NAN, torch.inf, 7.0):
        p, o, q, a = (torch.where(mask, x, junk) for x in clean)
        p.requires_grad_()
        wanted = token_losses(*clean[:4], mask, low=0.2, high=0.2, kl_coef=0.3)
        found = token_losses(p, o, q, a, mask, low=0.2, high=0.2, kl_coef=0.3)
        assert torch.equal(found, wanted)
        found.sum().backward()
        assert p.grad.isfinite().all() and (p.grad[~mask] == 0).all()
        assert torch.equal(sequence_ratio(p, o, mask), sequence_ratio(clean[0], clean[1], mask))


def test_the_overlong_penalty_is_the_papers():
    lengths = torch.arange(0, 12)
    for longest, buffer in ((10, 4), (8, 8), (10, 2.5)):
        found = overlong_penalty(lengths, longest, buffer).tolist()
        assert found == pytest.approx([slow.overlong(n, longest, buffer) for n in range(12)])
    assert overlong_penalty(lengths, 10, 0).abs().sum() == 0


@pytest.mark.parametrize("name, wrong", [
    (GRPO, {"kl": "k1"}), (DrGRPO, {"kl": "k1"}), (DAPO, {"kl": "none"}), (GSPO, {"kl": ""}), (GRPO, {"kl_coef": -1.0}),
    (GRPO, {"kl_coef": math.inf}), (GRPO, {"kl_coef": NAN}), (GRPO, {"clip": 0.0}), (GRPO, {"std_eps": -1.0}),
    (DAPO, {"clip_low": 1.5}), (DAPO, {"clip_high": 0.0}), (DAPO, {"overlong_buffer": -1.0}), (DAPO, {"refills": -1}),
    (DAPO, {"max_new_tokens": 0}), (Reinforce, {"baseline": "value"}), (Reinforce, {"baseline_decay": 1.5}),
    (ReinforcePP, {"baseline": "batch"}), (ReinforcePP, {"gamma": 2.0}), (RLOO, {"epochs": 0}),
    (RLOO, {"missing_eos_score": -1.0, "missing_eos_penalty": 1.0}), (GSPO, {"temperature": 0.0}),
])  # fmt: skip
def test_settings_out_of_range_are_refused(name, wrong):
    with pytest.raises(ConfigError):
        name(**wrong)


@pytest.mark.parametrize("method", [GRPO, DrGRPO, DAPO, GSPO])
def test_k1_in_the_loss_is_refused_with_the_reason(method):
    with pytest.raises(ConfigError, match="gradient is zero on average"):
        method(kl="k1")


def test_a_reference_is_needed_where_leaving_it_costs_something():
    for method in (GRPO, DrGRPO, DAPO, GSPO):
        assert method(kl_coef=0.0).needs == ("policy", "reward")
        assert method(kl_coef=0.1).needs == ("policy", "reference", "reward")
        assert replace(method(kl_coef=0.1), kl_coef=0.0).needs == ("policy", "reward")
        assert method().needs == method.needs, "the class says what the defaults need"


# --- baselines of REINFORCE -------------------------------------------------------------------------------------------


def test_the_running_baseline_is_a_moving_average_of_mean_rewards():
    method = Reinforce(kl_coef=0.0, baseline_decay=0.75)
    models = models_for(method)
    models.reward = scored(SCORES)
    with torch.no_grad():
        batch = method.prepare(models, tokens())
    first = method.adapt(batch)
    assert method.running_reward is None and first.running_reward == pytest.approx(slow.mean(SCORES))
    second = replace(first, running_reward=2.0).adapt(batch)
    assert second.running_reward == pytest.approx(0.75 * 2 + 0.25 * slow.mean(SCORES))
    assert Reinforce(baseline="batch").adapt(batch) == Reinforce(baseline="batch")


def with_greedy(rows):
    """The last row of every group as its greedy response."""
    return replace(rows, extras={**rows.extras, "drawn_by": ["policy", "policy", "greedy"] * (len(rows) // 3)})


def test_the_greedy_baseline_is_the_score_of_the_prompts_greedy_response_and_that_is_not_trained_on():
    method = Reinforce(kl_coef=0.0, baseline="greedy")
    models = models_for(method)
    models.reward = scored(SCORES)
    with torch.no_grad():
        batch = method.prepare(models, with_greedy(tokens()))
    kept = [i for i in range(12) if i % 3 != 2]
    assert batch.scores.tolist() == pytest.approx([SCORES[i] for i in kept])
    wanted = [SCORES[i] - SCORES[i - i % 3 + 2] for i in kept]
    assert [row[m][0].item() for row, m in zip(batch.advantages, batch.tokens.response_mask, strict=True)] == wanted
    assert batch.metrics["score"].item() == pytest.approx(slow.mean([SCORES[i] for i in kept]))
    with pytest.raises(DataError, match="greedy"):
        method.prepare(models, tokens())


def test_the_sampler_draws_one_greedy_response_more_and_the_others_stay_the_same():
    from palate.data.chat import Chat
    from palate.data.encode import encode_records
    from palate.data.kinds import Prompt
    from palate.generation.sampler import SamplingSettings, sample
    from palate.training.rollouts import Rollout
    from tiny import tiny, tokenizer_of

    policy, chat = tiny("llama"), Chat(tokenizer_of())
    items, _ = encode_records([Prompt(text) for text in ("a b c", "d", "e f")], "prompts", chat, max_length=24)
    plain = Rollout(policy, chat, SamplingSettings(max_new_tokens=5), 2)(items, 3, 4)
    both = Rollout(policy, chat, SamplingSettings(max_new_tokens=5), 2, ("policy", "greedy"))(items, 3, 4)
    assert both.extras["drawn_by"] == ["policy", "policy", "greedy"] * 3
    assert both.group.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    drawn, greedy = (both.select(_sampled.rows_drawn_by("test", both, who)) for who in ("policy", "greedy"))
    for name in ("ids", "attention_mask", "response_mask", "group"):
        assert torch.equal(getattr(drawn, name), getattr(plain, name))
    assert [r.prompt for r in greedy.extras["records"]] == ["a b c", "d", "e f"]
    prompts = [greedy.ids[i][greedy.attention_mask[i] & ~greedy.response_mask[i]].tolist() for i in range(3)]
    again = sample(
        policy,
        prompts,
        SamplingSettings(max_new_tokens=5, temperature=0.0),
        stop_token_ids=chat.stop_token_ids,
        generator=torch.Generator(),
    )
    assert torch.equal(greedy.ids, again.ids)
    method = Reinforce(baseline="greedy")
    with torch.no_grad():
        batch = method.prepare(models_for(method), both)
    assert method.drawn_by == ("policy", "greedy") and Reinforce().drawn_by == ("policy",) and len(batch) == 6


# --- as settings of a run ---------------------------------------------------------------------------------------------


def config_of(name, **settings):
    given = {"model": "policy", "out": "run", "reward": "module:function", "data": {"train": "prompts.jsonl"}}
    return load_settings(name, settings=given | settings)


def test_the_number_of_responses_to_a_prompt_is_filled_in_and_the_lengths_agree():
    facts = Facts(1000, 512)
    config = resolved(config_of("dapo", sampling={"max_new_tokens": 100}), facts)
    assert config.samples_per_prompt == 16 and config.method.settings.max_new_tokens == 100
    assert config.filled["samples_per_prompt"] == "default: dapo"
    assert config.filled["method.max_new_tokens"] == "sampling.max_new_tokens"
    assert resolved(config, facts).to_dict() == config.to_dict()
    config = resolved(config_of("dr_grpo", method={"max_new_tokens": 50}, samples_per_prompt=3), facts)
    assert config.samples_per_prompt == 3 and config.sampling.max_new_tokens == 50
    for name, size in {"reinforce": 1, "rloo": 4, "reinforce_pp": 1, "ppo": 1, "grpo": 8}.items():
        assert resolved(config_of(name), facts).samples_per_prompt == size
    assert resolved(config_of("reinforce_pp", method={"baseline": "group"}), facts).samples_per_prompt == 8
    with pytest.raises(ConfigError, match="max_new_tokens"):
        both = {"method": {"max_new_tokens": 50}, "sampling": {"max_new_tokens": 60}}
        resolved(config_of("dapo", **both), facts)


def test_one_response_a_prompt_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="samples_per_prompt: found 1, expected 2 or more; 4 unless it is set"):
        require_all(config_of("rloo", samples_per_prompt=1))
    require_all(config_of("rloo"))
    require_all(config_of("reinforce", samples_per_prompt=1))


def test_which_roles_are_needed_follows_from_the_settings_of_the_run():
    assert config_of("dapo").method.settings.needs == ("policy", "reward")
    assert config_of("dapo", method={"kl_coef": 0.1}).method.settings.needs == ("policy", "reference", "reward")
    assert config_of("grpo", method={"kl_coef": 0.0}).method.settings.needs == ("policy", "reward")
    with pytest.raises(ConfigError, match="gradient is zero on average"):
        config_of("grpo", method={"kl": "k1"})


# --- in the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_first_look_ratio_1_kl_0_nothing_clipped(method, tmp_path):
    method = method(**{"kl_coef": 0.1, "minibatches": 1} if method is not Reinforce else {})
    models = models_for(method)
    models.reference = frozen_copy(models.policy)
    run = run_of(method, models, tmp_path, max_steps=2, tokens_per_microbatch=20)
    run.starts_at_reference = True
    first, second = train(run)
    assert first["kl/reference"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-6)
    assert first["kl/old"] == pytest.approx(0, abs=1e-6) and first["clip_fraction"] == 0
    assert second["kl/reference_k3"] > 0 and second["ratio"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "rloo", "gspo", "reinforce"])
def test_a_policy_that_is_not_the_one_that_sampled_is_noticed_at_the_first_look(name, tmp_path):
    method = {"grpo": GRPO, "rloo": RLOO, "gspo": GSPO, "reinforce": Reinforce}[name]()
    models = models_for(method)
    models.policy.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.5), models.policy.lm_head).train()
    with pytest.raises(ModelError, match="ratio"):
        list(train(run_of(method, models, tmp_path)))


def test_epochs_and_minibatches_are_steps(tmp_path):
    for method in (RLOO(epochs=3), GRPO(minibatches=2), GSPO()):
        metrics = next(train(run_of(method, models_for(method), tmp_path / type(method).__name__, batch_size=4)))
        assert metrics["updates"] == {"RLOO": 3, "GRPO": 2, "GSPO": 4}[type(method).__name__]


@pytest.mark.parametrize("method", [Reinforce(), DAPO(refills=6, minibatches=2)], ids=lambda m: type(m).__name__)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(method, tmp_path):
    """Also with the moving average, and with batches that were filled up."""

    def run(folder):
        models = models_for(method)
        models.reward = right_or_wrong
        made = run_of(method, models, folder, batch_size=4, max_steps=5, save_every=1)
        made.rollout = Endless()
        return made

    straight = list(train(run(tmp_path / "straight")))
    for metrics in train(run(tmp_path / "stopped")):
        if metrics["step"] == 3:
            break
    resumed = run(tmp_path / "stopped")
    list(train(resumed))
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert files[0] == files[1] and len(straight) == 5
    assert getattr(resumed.method, "running_reward", 0.0) is not None


# --- dynamic sampling -------------------------------------------------------------------------------------------------


def right_or_wrong(rows):
    """1 or 0 by the parity of the response: many groups of three are all right or all wrong."""
    return Scored(((rows.ids * rows.response_mask).sum(-1) % 2).float(), {})


class Endless(Samples):
    """Another batch of samples for every call, as a policy that is sampled gives."""

    def __init__(self):
        self.calls = []
        super().__init__(tokens())

    def __call__(self, items, *seed, progress=None):
        self.calls.append((tuple(items), seed))
        self.batch = tokens(seed=sum(abs(s) * 31**i for i, s in enumerate(seed)))
        return super().__call__(items)


def refilled(folder, method, reward=right_or_wrong, steps=4):
    models = models_for(method)
    models.reward = reward
    run = run_of(method, models, folder, batch_size=4, max_steps=steps)
    run.rollout = Endless()
    return run, list(train(run))


def test_groups_of_equal_scores_are_replaced_by_further_prompts(tmp_path):
    _, without = refilled(tmp_path / "0", DAPO(refills=0))
    run, filled = refilled(tmp_path / "4", DAPO(refills=20))
    assert 0 < without[0]["groups/all_equal"] < 1
    assert len(run.rollout.calls) > 4, "some batch was filled up"
    assert min(m["tokens/response"] for m in without) < min(m["tokens/response"] for m in filled)
    first = [items for items, seed in run.rollout.calls if seed[1] == 0]
    assert len(set(first)) > 1, "other orders of the prompts"
    _, again = refilled(tmp_path / "again", DAPO(refills=20))
    names = [n for n in filled[0] if not n.startswith("time/") and n != "tokens/second"]
    assert [[m[n] for n in names] for m in again] == [[m[n] for n in names] for m in filled]


def test_a_batch_is_never_more_than_was_asked_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        DAPO, "loss", lambda self, models, batch, of=DAPO.loss: seen.append(batch) or of(self, models, batch)
    )
    refilled(tmp_path, DAPO(refills=20), steps=2)
    for batch in seen:
        assert not all_equal(batch.scores, batch.tokens.group).any()
        assert batch.tokens.group.sort()[0].tolist() == [g for g in range(4) for _ in range(3)]


def test_a_batch_in_which_every_group_is_equal_changes_nothing_and_the_run_goes_on(tmp_path):
    method = DAPO(refills=1)
    models = models_for(method)
    models.reward = lambda rows: Scored(torch.ones(len(rows)), {})
    before = weights_of(models)
    run = run_of(method, models, tmp_path, max_steps=2)
    metrics = list(train(run))
    assert (
        [m["updates"] for m in metrics] == [0, 0] and metrics[0]["groups/all_equal"] == 1 and metrics[0]["score"] == 1
    )
    assert all(torch.equal(value, before[name]) for name, value in weights_of(models).items())


def test_joined_batches_are_both_of_them():
    one, two = tokens(seed=1).select(torch.tensor([0, 1])), tokens(seed=2)
    both = joined(one, two)
    assert one.ids.shape[1] < two.ids.shape[1] and both.group.tolist() == [0, 0, *(two.group + 1).tolist()]
    for part, rows in ((one, torch.arange(2)), (two, torch.arange(2, 14))):
        again = both.select(rows)
        for name in ("ids", "attention_mask", "response_mask"):
            assert torch.equal(getattr(again, name), getattr(part, name))
        assert torch.equal(again.extras["sampler_logprobs"], part.extras["sampler_logprobs"])
        assert torch.equal(again.extras["finished"], part.extras["finished"])
    method = GRPO()
    models = models_for(method)
    with torch.no_grad():
        a, b = method.prepare(models, one), method.prepare(models, two)
    whole = joined(a, b)
    for name in ("logprobs", "reference_logprobs", "advantages", "scores"):
        assert torch.equal(getattr(whole.select(torch.arange(2)), name), getattr(a, name))
        assert torch.equal(getattr(whole.select(torch.arange(2, 14)), name), getattr(b, name))
    assert whole.metrics["score"].item() == pytest.approx(torch.cat([a.scores, b.scores]).mean().item())
    assert whole.values is None


# --- as a whole run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, rows, needs_reference",
    [
        ("grpo", {}, 8, True),
        ("dapo", {"refills": 1}, 16, False),
        ("reinforce", {"baseline": "greedy"}, 1, True),
    ],
)
def test_a_whole_run_from_its_settings(name, settings, rows, needs_reference, tmp_path, monkeypatch):
    """Sampled by the real sampler, scored by a function that counts letters."""
    import json

    import palate
    from palate.models.load import load_policy, save_model
    from tiny import tiny, tokenizer_of

    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "base")
    prompts = "".join(json.dumps({"prompt": f"{a} {b} "}) + "\n" for a in "abcd" for b in "efgh")
    (tmp_path / "prompts.jsonl").write_text(prompts)
    (tmp_path / "group_taste.py").write_text(
        "def few(prompts, responses):\n    return [sum(c in 'abcdefgh' for c in r) for r in responses]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = palate.train(
        name,
        model=tmp_path / "base",
        reward="group_taste:few",
        data=tmp_path / "prompts.jsonl",
        out=tmp_path / "run",
        sampling={"max_new_tokens": 5},
        training={"batch_size": 4, "max_steps": 3, "learning_rate": 0.01, "eval_every": 2},
        method_settings=settings,
        quiet=True,
    )
    config = load_config(file=run / "config.yaml")
    assert config.samples_per_prompt == rows
    if name == "dapo":
        assert config.method.settings.max_new_tokens == 5
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train_lines = [line for line in lines if line["split"] == "train"]
    assert len(train_lines) == 3 and all(("kl/reference" in line) == needs_reference for line in lines)
    if name == "reinforce":
        assert all(line["tokens/all"] <= 4 * (5 + 5) for line in train_lines), "greedy rows are not trained on"
        assert all("score/greedy" in line for line in lines)
    else:
        assert all(0 <= line["groups/all_equal"] <= 1 for line in lines)
    assert (run / "card.md").exists() and (run / "report.html").exists()
    before, after = (load_policy(str(where)).state_dict() for where in (tmp_path / "base", run / "model"))
    assert any(not torch.equal(value, before[name]) for name, value in after.items())
