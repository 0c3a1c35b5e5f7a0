"""PPO against plain Python: rewards, advantages, losses, controllers; and the facts that hold at the first look."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import slow
from batches import Samples, means_and_gradient, models_for, run_of, scalar_of, tokens, trained_of, weights_of
from palate.errors import ConfigError, DataError, ModelError
from palate.functional.masked import Moments
from palate.methods.ppo import (
    PPO,
    adapted_kl_coef,
    explained_variance,
    ppo_policy_loss,
    ppo_value_loss,
    token_rewards,
)
from palate.methods.sft import SFT
from palate.models.forward import response_scores, token_logprobs, token_logprobs_and_entropy, token_values
from palate.models.roles import AdapterOff, frozen_copy
from palate.training.loop import train
from palate.types import Mean, Scored, microbatches
from tiny import trained

NAN = float("nan")


def lists(values, mask):
    """[N, T] as one list of Python floats a row, of the slots that count."""
    return [row[m].double().tolist() for row, m in zip(values, mask, strict=True)]


@torch.no_grad()
def facts(models, rows, temperature=1.0):
    """What the four models say, row by row: old and reference log-probs, values, scores."""
    mask = rows.response_mask
    old = lists(token_logprobs(models.policy, rows, temperature=temperature), mask)
    reference = lists(token_logprobs(models.reference, rows, temperature=temperature), mask)
    values = lists(token_values(models.value, rows), mask)
    return old, reference, values, response_scores(models.reward, rows).double().tolist()


def slow_trajectories(method, found, finished):
    """(advantages, returns) by row, from the definitions."""
    old, reference, values, scores = found
    if method.normalise_scores:
        mean, std = slow.mean(scores), math.sqrt(slow.variance(scores, 1))
        scores = [(s - mean) / std for s in scores]
    if method.score_clip is not None:
        scores = [min(max(s, -method.score_clip), method.score_clip) for s in scores]
    if method.missing_eos_score is not None:
        scores = [s if done else method.missing_eos_score for s, done in zip(scores, finished, strict=True)]
    scores = [s if done else s - method.missing_eos_penalty for s, done in zip(scores, finished, strict=True)]
    rewards = [slow.token_rewards(*row, method.kl_coef) for row in zip(old, reference, scores, strict=True)]
    if method.whiten_rewards:
        rewards = unflattened(slow.whiten([r for row in rewards for r in row], shift_mean=False), rewards)
    both = [slow.gae(r, v, method.gamma, method.lam) for r, v in zip(rewards, values, strict=True)]
    advantages, returns = [a for a, _ in both], [g for _, g in both]
    if method.whiten_advantages:
        advantages = unflattened(slow.whiten([a for row in advantages for a in row]), advantages)
    return advantages, returns


def unflattened(flat, like):
    flat = iter(flat)
    return [[next(flat) for _ in row] for row in like]


VARIANTS = {
    "defaults": PPO(),
    "no whitening, discount": PPO(whiten_advantages=False, gamma=0.9, lam=0.7),
    "whitened rewards": PPO(whiten_rewards=True, kl_coef=0.3),
    "all terms": PPO(clip=0.05, dual_clip=1.5, value_clip=0.05, value_coef=0.7, entropy_coef=0.2, kl_coef=1.0),
    "no value clip": PPO(value_clip=None, lam=1.0),
    "temperature": PPO(temperature=0.6, entropy_coef=0.1),
    "normalised, cut, replaced": PPO(normalise_scores=True, score_clip=0.8, missing_eos_score=-1.0),
    "penalised": PPO(missing_eos_penalty=1.0),
}


@pytest.fixture(params=VARIANTS)
def method(request):
    return VARIANTS[request.param]


def test_prepare_equals_the_definitions(method):
    models, rows = models_for(method), tokens()
    wanted = slow_trajectories(method, facts(models, rows, method.temperature), rows.extras["finished"].tolist())
    with torch.no_grad():
        batch = method.prepare(models, rows)
    mask = rows.response_mask
    for found, expected in zip((batch.advantages, batch.returns), wanted, strict=True):
        assert [x for row in lists(found, mask) for x in row] == pytest.approx(
            [x for row in expected for x in row], abs=2e-4
        )
        assert (found[~mask] == 0).all()
    assert torch.equal(batch.scores, response_scores(models.reward, rows)), "the reward model's own, unshaped"


def test_loss_and_gradient_equal_the_definitions_away_from_the_sampling_policy(method):
    """Gradient by central differences with respect to every token's log-prob, entropy and value, then autograd."""
    models, rows = models_for(method), tokens()
    mask = rows.response_mask
    with torch.no_grad():
        batch = method.prepare(models, rows)
    old, _, old_values, _ = found = facts(models, rows, method.temperature)
    advantages, returns = slow_trajectories(method, found, rows.extras["finished"].tolist())
    trained(models.policy, seed=1), trained(models.value, seed=2)
    flat = {
        name: [x for row in rows_ for x in row]
        for name, rows_ in (("old", old), ("v_old", old_values), ("a", advantages), ("g", returns))
    }
    n = len(flat["old"])

    def terms(values):
        logprob, entropy, value = values[:n], values[n : 2 * n], values[2 * n :]
        policy = [
            slow.ppo_policy(logprob[i], flat["old"][i], flat["a"][i], method.clip, method.dual_clip) for i in range(n)
        ]
        error = [slow.ppo_value(value[i], flat["v_old"][i], flat["g"][i], method.value_clip) for i in range(n)]
        return slow.mean(policy), slow.mean(error), slow.mean(entropy)

    def definition(values):
        policy, error, entropy = terms(values)
        return policy + method.value_coef * error - method.entropy_coef * entropy

    logprobs, entropies = token_logprobs_and_entropy(models.policy, rows, temperature=method.temperature)
    everything = torch.cat([logprobs[mask], entropies[mask], token_values(models.value, rows)[mask]])
    values = everything.detach().double().tolist()
    sums = {}
    for micro in microbatches(batch, 35):
        for name, mean in method.loss(models, micro).items():
            sums[name] = sums[name] + mean if name in sums else mean
    assert sums["loss"].item() == pytest.approx(definition(values), abs=3e-4, rel=1e-4)
    policy, error, entropy = terms(values)
    assert sums["loss/policy"].item() == pytest.approx(policy, abs=3e-4, rel=1e-4)
    assert sums["loss/value"].item() == pytest.approx(error, abs=3e-4, rel=1e-4)
    assert sums["entropy"].item() == pytest.approx(entropy, abs=1e-5)
    log_ratio = [a - b for a, b in zip(values[:n], flat["old"], strict=True)]
    assert sums["kl/old"].item() == pytest.approx(slow.mean([d * d / 2 for d in log_ratio]), rel=1e-4)
    moved = [
        (a > 0 and math.exp(d) > 1 + method.clip) or (a < 0 and math.exp(d) < 1 - method.clip)
        for d, a in zip(log_ratio, flat["a"], strict=True)
    ]
    assert 0 < slow.mean([float(m) for m in moved]) == pytest.approx(sums["clip_fraction"].item())

    by_token = torch.tensor(slow.difference_gradient(definition, values), dtype=everything.dtype)
    parameters = trained_of(models, method)
    wanted = torch.autograd.grad(everything, list(parameters.values()), by_token, allow_unused=True)
    average = sums["loss"].total / sums["loss"].count
    ours = torch.autograd.grad(average, list(parameters.values()), allow_unused=True)
    for name, a, b in zip(parameters, ours, wanted, strict=True):
        scale = max(1.0, b.abs().max().item())
        assert torch.allclose(a, b, atol=5e-4 * scale), name


# --- the pieces -----------------------------------------------------------------------------------------------


def test_the_score_is_paid_at_the_last_response_token_and_the_kl_at_each():
    mask = torch.tensor([[False, True, True, True, False], [False, False, True, False, False], [False] * 5])
    logprobs = torch.where(mask, torch.tensor([0.0, -1, -2, -3, 0]), NAN)
    reference = torch.where(mask, torch.tensor([0.0, -2, -2, -1, 0]), NAN)
    rewards = token_rewards(logprobs, reference, torch.tensor([10.0, 20.0, NAN]), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0, -0.5, 0, 11, 0], [0, 0, 20, 0, 0], [0] * 5]


def test_the_score_of_padded_rows_does_not_move():
    """Whatever the padding, and with an end of text that is the pad id: the mask says where the response ends."""
    mask = torch.tensor([[False, True, True, False, False, False], [False, False, False, False, True, True]])
    rewards = token_rewards(torch.zeros(2, 6), torch.zeros(2, 6), torch.tensor([1.0, 2.0]), mask, 0.1)
    assert rewards.nonzero().tolist() == [[0, 2], [1, 5]]


FLOAT = st.floats(-4, 4)


@settings(max_examples=150, deadline=None)
@given(FLOAT, FLOAT, FLOAT, st.floats(0.01, 0.9), st.one_of(st.none(), st.floats(1.1, 5)))
def test_the_clipped_surrogate_is_the_definition(logprob, old, advantage, clip, dual_clip):
    one = [torch.tensor(x, dtype=torch.float64) for x in (logprob, old, advantage)]
    wanted = slow.ppo_policy(logprob, old, advantage, clip, dual_clip)
    assert ppo_policy_loss(*one, clip, dual_clip).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "log_ratio, advantage, dual_clip, flows",
    [
        (0.0, 1.0, None, True),
        (0.5, 1.0, None, False),  # above 1 + clip, and better than expected: held
        (0.5, -1.0, None, True),  # above, and worse than expected: pushed back
        (-0.5, -1.0, None, False),
        (-0.5, 1.0, None, True),
        (1.0, -1.0, 2.0, False),  # e^1 > 2: the dual clip holds it
        (0.5, -1.0, 2.0, True),
        (1000.0, 1.0, None, False),
        (-1000.0, -1.0, None, False),
    ],
)
def test_no_gradient_flows_where_the_ratio_is_clipped(log_ratio, advantage, dual_clip, flows):
    logprob = torch.tensor(log_ratio, requires_grad=True)
    ppo_policy_loss(logprob, torch.tensor(0.0), torch.tensor(advantage), 0.2, dual_clip).backward()
    wanted = -advantage * math.exp(log_ratio) if flows else 0.0
    assert logprob.grad.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("log_ratio", [1e3, -1e3])
def test_extreme_ratios_are_finite(dtype, advantage, log_ratio):
    logprob = torch.tensor(log_ratio, dtype=dtype, requires_grad=True)
    loss = ppo_policy_loss(logprob, torch.zeros((), dtype=dtype), torch.tensor(advantage, dtype=dtype), 0.2)
    loss.backward()
    assert loss.isfinite() and logprob.grad.isfinite()
    bounded = -advantage * (1.2 if log_ratio > 0 and advantage > 0 else 0.8 if log_ratio < 0 and advantage < 0 else 0)
    if advantage * log_ratio >= 0 or log_ratio < 0:
        assert loss.item() == pytest.approx(bounded, rel=1e-2)


@settings(max_examples=100, deadline=None)
@given(FLOAT, FLOAT, FLOAT, st.one_of(st.none(), st.floats(0.05, 2)))
def test_the_value_loss_is_the_definition(value, old, target, clip):
    one = [torch.tensor(x, dtype=torch.float64) for x in (value, old, target)]
    wanted = slow.ppo_value(value, old, target, clip)
    assert ppo_value_loss(*one, clip).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_adaptive_kl_moves_by_a_fifth_of_episodes_over_horizon_at_most():
    assert adapted_kl_coef(0.2, 12.0, 6.0, 512, 10_000) == pytest.approx(0.2 * (1 + 0.2 * 512 / 10_000))
    assert adapted_kl_coef(0.2, 0.0, 6.0, 512, 10_000) == pytest.approx(0.2 * (1 - 0.2 * 512 / 10_000))
    assert adapted_kl_coef(0.2, 6.6, 6.0, 500, 10_000) == pytest.approx(0.2 * (1 + 0.1 * 500 / 10_000))
    assert adapted_kl_coef(0.2, 6.0, 6.0, 512, 10_000) == 0.2


def test_the_adaptive_coefficient_follows_the_mean_of_sequence_sums():
    method = PPO(adaptive_kl_target=2.0, adaptive_kl_horizon=100.0, kl_coef=0.1)
    models, rows = models_for(method), tokens()
    with torch.no_grad():
        batch = method.prepare(models, rows)
    old, reference, _, _ = facts(models, rows)
    kl = slow.mean([sum(p) - sum(q) for p, q in zip(old, reference, strict=True)])
    error = min(max(kl / 2.0 - 1, -0.2), 0.2)
    assert method.adapt(batch).kl_coef == pytest.approx(0.1 * (1 + error * 12 / 100), rel=1e-4)
    assert batch.metrics["kl/reference"].item() == pytest.approx(kl, rel=1e-4)
    assert PPO().adapt(batch) == PPO()


def test_running_normalisation_covers_everything_seen_with_this_batch():
    models, rows = models_for(PPO()), tokens()
    before = Moments().including(torch.tensor([3.0, 5.0, -1.0]))
    method = PPO(normalise_scores=True, score_moments=before)
    with torch.no_grad():
        batch = method.prepare(models, rows)
    everything = [3.0, 5.0, -1.0, *batch.scores.tolist()]
    mean, std = slow.mean(everything), math.sqrt(slow.variance(everything, 1))
    shaped = method.shaped_scores(batch.scores, rows)
    assert shaped.tolist() == pytest.approx([(s - mean) / std for s in batch.scores.tolist()], abs=1e-5)
    moments = method.adapt(batch).score_moments
    assert (moments.count, moments.mean, moments.std) == pytest.approx((15, mean, std))


def shaped(scores=(4.0, -4.0, 0.5), finished=(True, True, False), **fields):
    rows = tokens().select(torch.tensor([0, 1, 2]))
    rows = replace(rows, extras={"finished": torch.tensor(finished)})
    return PPO(**fields).shaped_scores(torch.tensor(scores), rows).tolist()


def test_a_missing_end_replaces_the_score_or_is_charged_and_comes_last():
    assert shaped() == [4.0, -4.0, 0.5]
    assert shaped(missing_eos_score=-1.0) == [4.0, -4.0, -1.0]
    assert shaped(missing_eos_penalty=1.0) == [4.0, -4.0, -0.5]
    assert shaped(score_clip=1.0, missing_eos_score=-7.0) == [1.0, -1.0, -7.0], "replaced after the cut"
    assert shaped(score_clip=1.0, missing_eos_penalty=3.0) == [1.0, -1.0, -2.5], "charged after the cut"
    normalised = shaped((4.0, -4.0, 0.0), normalise_scores=True, score_clip=0.5, missing_eos_score=-9.0)
    assert normalised == [0.5, -0.5, -9.0], "normalise, then cut: 4 / std is 1"


def test_missing_end_settings_without_that_knowledge_are_not_ignored():
    rows = replace(tokens(), extras={})
    with pytest.raises(DataError, match="finished"):
        PPO(missing_eos_score=-1.0).shaped_scores(torch.zeros(12), rows)
    assert PPO().shaped_scores(torch.zeros(12), rows).tolist() == [0] * 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"missing_eos_score": -1.0, "missing_eos_penalty": 1.0},
        {"kl_coef": -0.1},
        {"clip": 0.0},
        {"lam": 1.5},
        {"gamma": -0.1},
        {"dual_clip": 1.0},
        {"epochs": 0},
        {"minibatches": 0},
        {"temperature": 0.0},
        {"target_kl": 0.0},
        {"adaptive_kl_target": 0.0},
        {"value_clip": 0.0},
        {"missing_eos_penalty": -1.0},
        {"ptx_coef": -1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError):
        PPO(**wrong)


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 5, returns) == 1, "a constant error explains the variance"
    assert explained_variance(torch.full((3,), 2.0), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.ones(3)) == 0


# --- in the loop ----------------------------------------------------------------------------------------------


def same_start(method=None, **roles):
    """Policy and reference with the same weights, the value model with the reward model's."""
    models = models_for(method or PPO())
    models.reference = frozen_copy(models.policy)
    for role, model in roles.items():
        setattr(models, role, model)
    return models


def test_first_look_ratio_1_kl_0_nothing_clipped(tmp_path):
    method = PPO(epochs=1)
    models = same_start()
    with torch.no_grad():
        batch = method.prepare(models, tokens())
    assert torch.equal(batch.logprobs, batch.reference_logprobs)
    assert batch.metrics["kl/reference"].item() == 0
    found = {name: mean.item() for name, mean in method.loss(models, batch).items()}
    assert found["ratio"] == pytest.approx(1, abs=1e-6)
    assert found["kl/old"] == pytest.approx(0, abs=1e-6)
    assert found["clip_fraction"] == 0
    run = run_of(method, models, tmp_path, max_steps=1, tokens_per_microbatch=20)
    run.starts_at_reference = True
    (metrics,) = train(run)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6) and metrics["clip_fraction"] == 0


def test_with_lora_the_policy_without_its_adapter_is_the_reference(tmp_path):
    from peft import LoraConfig, get_peft_model

    models = same_start()
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    models.policy = get_peft_model(models_for(PPO()).policy, settings)
    models.reference = AdapterOff(models.policy)
    run = run_of(PPO(epochs=1), models, tmp_path, max_steps=3, learning_rate=0.05)
    run.starts_at_reference, before = True, weights_of(models)
    metrics = list(train(run))
    assert metrics[0]["kl/reference"] == 0 and metrics[0]["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics[-1]["kl/reference_k3"] > 1e-3
    changed = {name for name, value in weights_of(models).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name or name.startswith("value.") for name in changed)
    saved = load_file(tmp_path / "checkpoints" / "step-3" / "weights.safetensors")
    assert all("lora_" in name or name.startswith("value.") for name in saved)


def test_first_look_in_bf16(tmp_path):
    models = models_for(PPO(), torch.bfloat16)
    models.reference = frozen_copy(models.policy)
    run = run_of(PPO(epochs=1), models, tmp_path, max_steps=1, tokens_per_microbatch=20)
    run.starts_at_reference, run.dtype = True, "bfloat16"
    first = next(train(run))
    assert first["kl/reference"] == 0 and first["kl/old"] < 1e-3


def test_another_reference_than_the_policy_is_noticed_before_the_first_step(tmp_path):
    models = models_for(PPO())
    before = weights_of(models)
    run = run_of(PPO(), models, tmp_path)
    run.starts_at_reference = True
    with pytest.raises(ModelError, match="kl/reference_k3"):
        list(train(run))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(models).items())


def test_dropout_left_on_is_noticed_at_the_first_look(tmp_path):
    models = same_start()
    models.policy.lm_head = torch.nn.Sequential(torch.nn.Dropout(0.5), models.policy.lm_head).train()
    with pytest.raises(ModelError, match="ratio"):
        list(train(run_of(PPO(), models, tmp_path)))


def test_the_batch_is_left_alone_once_it_is_far_from_the_policy_that_sampled_it(tmp_path):
    free = next(train(run_of(PPO(epochs=4), same_start(), tmp_path / "free", max_steps=1)))
    assert free["updates"] == 4
    early = next(train(run_of(PPO(epochs=4, target_kl=1e-9), same_start(), tmp_path / "early", max_steps=1)))
    assert early["updates"] == 1, "the first look is at KL 0; the second is beyond any target"
    assert PPO(target_kl=0.02).stop({"kl/old": 0.031}) and not PPO(target_kl=0.02).stop({"kl/old": 0.029})
    assert not PPO().stop({"kl/old": 1e9})


def test_the_run_ends_when_its_kl_budget_is_spent(tmp_path):
    run = run_of(PPO(kl_budget=0.05, kl_coef=0.0), same_start(), tmp_path, learning_rate=0.1, max_steps=50)
    metrics = list(train(run))
    assert len(metrics) < 50 and metrics[-1]["kl/reference"] > 0.05 and "kl_budget" in run.stopped
    assert all(m["kl/reference"] <= 0.05 for m in metrics[:-1])


def test_minibatches_are_steps_of_whole_groups(tmp_path):
    metrics = next(train(run_of(PPO(epochs=3, minibatches=2), same_start(), tmp_path, batch_size=4, max_steps=1)))
    assert metrics["updates"] == 6


def test_the_named_parts_of_a_reward_are_reported():
    models = same_start(reward=lambda rows: Scored(torch.ones(12), {"tone": torch.full((12,), 0.5)}))
    with torch.no_grad():
        batch = PPO().prepare(models, tokens())
    assert batch.metrics["score/tone"].item() == 0.5 and batch.metrics["score"].item() == 1
    assert batch.metrics["length/no_eos"].item() == pytest.approx(2 / 12)
    assert batch.metrics["length/response"].item() == pytest.approx(slow.mean([3, 1, 5, 2, 6, 4, 1, 2, 7, 5, 3, 4]))


def test_the_gradient_with_pretraining_is_the_two_gradients_added(tmp_path, monkeypatch):
    """InstructGPT eq. 2: PPO's, plus ptx_coef times that of the token-mean language-modelling loss."""
    from palate.training import loop

    coefficient, texts = 2.5, tokens(seed=9)
    gradients = {}

    def keep(name):
        def clip(parameters, max_norm):
            if name not in gradients:  # the first call is the policy's
                gradients[name] = [p.grad.clone() for p in parameters]
            return torch.tensor(1.0)

        return clip

    for name, ptx_coef in (("both", coefficient), ("ppo", 0.0)):
        monkeypatch.setattr(loop, "clip_gradients", keep(name))
        run = run_of(PPO(epochs=1, ptx_coef=ptx_coef, ptx_batch_size=2), same_start(), tmp_path / name, max_steps=1)
        run = replace(run, settings=replace(run.settings, tokens_per_microbatch=20))
        run.pretraining, run.collate_pretraining = range(4), Samples(texts)
        metrics = next(train(run))
        assert ("loss/pretraining" in metrics) == bool(ptx_coef)
    items = loop.batch_items(range(4), 2, 0, run.settings.seed + 1)
    part = Samples(texts)(items)
    _, language = means_and_gradient(SFT(), same_start(), part)
    for p, q, g in zip(gradients["both"], gradients["ppo"], language.values(), strict=True):
        assert torch.allclose(p, q + coefficient * g, atol=1e-5 * max(1, float(p.abs().max())))


def test_the_value_model_learns_in_reward_units_while_advantages_are_whitened():
    """Returns are formed before whitening: scaling all scores scales them, and leaves the advantages alone."""
    models, rows = same_start(), tokens()
    torch.nn.init.zeros_(models.value.score.weight)
    with torch.no_grad():
        batch = PPO().prepare(models, rows)
        models.reward = scalar_times(models.reward, 10)
        larger = PPO().prepare(models, rows)
    assert torch.allclose(larger.returns, 10 * batch.returns, atol=1e-4)
    assert torch.allclose(larger.advantages, batch.advantages, atol=1e-4)
    assert Mean.of(batch.advantages, rows.response_mask).item() == pytest.approx(0, abs=1e-6)
    assert Mean.of(batch.advantages.square(), rows.response_mask).item() == pytest.approx(1, abs=1e-4)


def scalar_times(model, factor):
    larger = scalar_of(models_for(PPO()).policy)
    larger.load_state_dict(model.state_dict())
    with torch.no_grad():
        larger.score.weight.mul_(factor)
    return larger
