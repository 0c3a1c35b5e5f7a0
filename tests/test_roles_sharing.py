"""The ladder of sharing: every rung computes what separate models compute, holds what its bill says, and is saved whole."""

import copy
import gc
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import palate
from batches import tokens
from palate.config import load_settings
from palate.data.chat import Chat
from palate.errors import ConfigError, ModelError
from palate.methods.ppo import PPO
from palate.models import memo, trunk
from palate.models.forward import response_scores, token_logprobs, token_logprobs_and_entropy, token_values
from palate.models.heads import base_of
from palate.models.load import load_policy, load_scalar, save_model
from palate.models.roles import AdapterOff, reference_of
from palate.models.sharing import stands_on, value_head_on
from palate.resolve import require_all
from palate.stage import run as stage_run
from palate.stage.roles import bill, load_roles, load_trained
from palate.training.loop import Run, train
from palate.training.optimizer import make_optimizer, trained_parameters
from palate.training.settings import TrainingSettings
from palate.types import Models
from tiny import LORA, SMALL, rows, tiny, tokenizer_of, trained

RUNGS = ("separate", "reference", "trunk", "value_head")
METHOD = PPO(value_coef=0.5, entropy_coef=0.01, kl_coef=0.1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a reward and a cost trained with LoRA on it, a whole reward, and an adapter on another base."""
    folder = tmp_path_factory.mktemp("world")
    base, other = folder / "base", folder / "other"
    save_model(tiny("llama"), tokenizer_of(), base)
    save_model(tiny("llama", seed=5), tokenizer_of(), other)
    for name, where, seed in (("reward", base, 1), ("cost", base, 2), ("foreign", other, 3)):
        save_model(trained(load_scalar(where, lora=LORA, seed=seed), seed), tokenizer_of(), folder / name)
    save_model(trained(load_scalar(base, seed=4)), tokenizer_of(), folder / "whole")
    save_model(trained(load_policy(base, lora=LORA), 6), tokenizer_of(), folder / "sft")
    prompts = [{"prompt": " ".join("abcdefghij"[n : n + 3])} for n in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    return folder


def settings_of(world, sharing, name="ppo", **settings):
    given = {"model": str(world / "base"), "reward": str(world / "reward"), "lora": {"rank": 4, "alpha": 8.0}}
    given |= {"data": str(world / "prompts.jsonl"), "out": str(world / "out"), "device": "cpu", "sharing": sharing}
    return load_settings(name, settings=given | settings)


def roles_of(world, sharing, said=None, **settings):
    config = settings_of(world, sharing, **settings)
    require_all(config)
    tokenizer = tokenizer_of()
    policy = load_trained(config, tokenizer)
    return load_roles(config, policy, Chat(tokenizer), (said if said is not None else []).append)


def moved(models):
    """The trained roles as a few steps would leave them; trunk and all."""
    trained(models.policy, seed=8)
    with torch.no_grad():
        for number, p in enumerate(trained_parameters(models, METHOD)["value"].values()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p.dtype))
    return models


def pulled_apart(models):
    """The same weights in models that share nothing."""
    reference = models.reference
    if isinstance(reference, AdapterOff):
        reference = copy.deepcopy(reference.policy)
        reference = AdapterOff(reference)  # of a policy of its own
    else:
        reference = copy.deepcopy(reference)
    return Models(copy.deepcopy(models.policy), reference, copy.deepcopy(models.reward), copy.deepcopy(models.value))


def weights_held(models):
    """Bytes of all different storages under the roles' parameters."""
    found = {}
    for model in (models.policy, models.reference, models.reward, models.value):
        for p in model.parameters():
            found[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    return sum(found.values())


def close(a, b, scale=None):
    scale = b.abs().max() if scale is None else scale
    return bool(((a - b).abs().max() <= 1e-5 * scale).item())


# -- the same numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("sharing", RUNGS)
def test_a_rung_computes_what_separate_models_with_its_weights_compute(world, sharing, dtype):
    """Log-probs, reference log-probs, scores, values, advantages, losses, and each role's gradient.

    Where the value is a head on the policy, the gradient of the shared adapter is the sum of those that two models have.
    """
    models = moved(roles_of(world, sharing, dtype=dtype))
    apart, batch = pulled_apart(models), tokens()
    with torch.no_grad():
        found, wanted = METHOD.prepare(models, batch), METHOD.prepare(apart, batch)
    for name in ("logprobs", "reference_logprobs", "scores", "values", "returns", "advantages"):
        assert close(getattr(found, name), getattr(wanted, name)), name
    assert found.values.abs().sum() > 0 and not torch.equal(found.logprobs, found.reference_logprobs)
    shifted = trained(models.policy, seed=9), trained(apart.policy, seed=9)  # a ratio that is not 1
    if sharing == "value_head":
        apart.value.base_model.load_state_dict(models.value.base_model.state_dict())
    losses = METHOD.loss(models, found), METHOD.loss(apart, wanted)
    for name in losses[0]:
        assert close(losses[0][name].total, losses[1][name].total, losses[1][name].total.abs() + 1e-3), name
    for loss in losses:
        loss["loss"].total.backward()
    policy, other = (dict(model.named_parameters()) for model in shifted)
    found, wanted = [], []
    for name, p in policy.items():
        if not p.requires_grad:
            assert p.grad is None
            continue
        gradient = other[name].grad
        if sharing == "value_head":
            inside = name.removeprefix("base_model.model.")
            gradient = gradient + dict(apart.value.named_parameters())[inside].grad
            assert not close(p.grad, other[name].grad) or not gradient.any()  # the value's part is there
        found.append(p.grad.flatten())
        wanted.append(gradient.flatten())
        assert (sharing == "value_head" and dtype != "float32") or close(p.grad, gradient), name
    # bf16 rounds every product to 2^-9 on its way back, and one pass of a sum is not the sum of two passes: there the whole
    # gradient is compared, as closely as a few such roundings allow.
    assert (torch.cat(found) - torch.cat(wanted)).norm() <= 2**-5 * torch.cat(wanted).norm()
    for name, p in trained_parameters(models, METHOD)["value"].items():
        gradient = dict(apart.value.named_parameters())[name].grad
        assert gradient.any() or "lora_A" in name, name
        assert close(p.grad, gradient), name


@pytest.mark.parametrize("sharing", RUNGS)
def test_a_rung_computes_what_transformers_and_peft_compute(world, sharing):
    """Row by row without padding, through the models' own forward."""
    models, batch = moved(roles_of(world, sharing)), tokens()
    logprobs, reference = (token_logprobs(m, batch) for m in (models.policy, models.reference))
    values, scores = token_values(models.value, batch), response_scores(models.reward, batch)
    plain = AutoModelForCausalLM.from_pretrained(world / "base")
    reward = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=1)
    reward = peft.PeftModel.from_pretrained(reward, world / "reward")
    for model in (reward, models.value):  # a random row may end with what is the pad token elsewhere
        base_of(model).config.pad_token_id = None
    for row in range(0, len(batch), 3):
        ids = batch.ids[row][batch.attention_mask[row]][None]
        assert torch.allclose(reward(ids).logits[0, 0], scores[row], rtol=1e-4, atol=1e-5)
        for t in batch.response_mask[row].nonzero()[:, 0].tolist():
            for model, column in ((models.policy, logprobs), (plain, reference)):
                own = model(ids[:, :t]).logits[0, -1].log_softmax(-1)[ids[0, t]]
                assert torch.allclose(own, column[row, t], rtol=1e-4, atol=1e-5)
            assert torch.allclose(models.value(ids[:, :t]).logits[0, -1], values[row, t], rtol=1e-4, atol=1e-5)


def test_the_rungs_begin_with_the_same_policy_reference_and_scores(world):
    """The value too, where it begins as the reward."""
    batch = tokens()
    with torch.no_grad():
        first, *others = (METHOD.prepare(roles_of(world, sharing), batch) for sharing in RUNGS)
    for other in others:
        for name in ("logprobs", "reference_logprobs", "scores"):
            assert close(getattr(other, name), getattr(first, name))
    assert torch.allclose(others[1].values, first.values, rtol=1e-4, atol=1e-5)


# -- one set of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", RUNGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bill_is_what_is_held(world, sharing, dtype):
    """Weights by storages, gradients and moments by what a step leaves behind."""
    models = roles_of(world, sharing, dtype=dtype)
    lines = bill(models, METHOD.trains)
    assert sum(line.weights for line in lines) == weights_held(models)
    batch = tokens()
    with torch.no_grad():
        batch = METHOD.prepare(models, batch)
    METHOD.loss(models, batch)["loss"].total.backward()
    parameters = trained_parameters(models, METHOD)
    optimizer = make_optimizer(parameters, TrainingSettings())
    optimizer.step()
    held = {role: 0 for role in parameters}
    for role, named in parameters.items():
        for p in named.values():
            state = optimizer.state[p]
            held[role] += sum(t.untyped_storage().nbytes() for t in (p.grad, state["exp_avg"], state["exp_avg_sq"]))
    assert held == {line.role: line.training for line in lines if line.training}
    everything = [p for m in (models.policy, models.reference, models.reward, models.value) for p in m.parameters()]
    assert {id(p) for p in everything if p.grad is not None} == {id(p) for n in parameters.values() for p in n.values()}


def test_each_rung_holds_less_than_the_one_below_it(world):
    held = [weights_held(roles_of(world, sharing)) for sharing in RUNGS]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    base = sum(p.numel() * 4 for p in load_policy(world / "base").parameters())
    assert held[0] > 3.5 * base  # the scalar models have no vocabulary head
    adapters = sum(p.numel() * 4 for p in roles_of(world, "trunk").policy.parameters() if p.requires_grad)
    assert held[2] == base + 3 * adapters + 2 * 2 * 16 * 4  # reward and value: the head, and the base's own of peft


@pytest.mark.parametrize("sharing", RUNGS)
def test_frozen_weights_never_change(world, tmp_path, sharing):
    models, method = roles_of(world, sharing), PPO(epochs=2, minibatches=2)
    parameters = trained_parameters(models, method)
    moving = {id(p) for named in parameters.values() for p in named.values()}
    roles = {"policy": models.policy, "reference": models.reference, "reward": models.reward, "value": models.value}
    named = {f"{role}.{name}": p for role, m in roles.items() for name, p in m.named_parameters()}
    before = {name: p.detach().clone() for name, p in named.items()}
    with torch.no_grad():
        start = METHOD.prepare(models, tokens())
    settings = TrainingSettings(max_steps=3, batch_size=4, learning_rate=1e-2, tokens_per_microbatch=30)
    list(train(Run(tmp_path, method, models, settings, items=list(range(8)), rollout=Fixed())))
    for name, p in named.items():
        assert torch.equal(p, before[name]) == (id(p) not in moving), name
    with torch.no_grad():
        end = METHOD.prepare(models, tokens())
    assert torch.equal(end.reference_logprobs, start.reference_logprobs) and torch.equal(end.scores, start.scores)
    assert not torch.equal(end.values, start.values) and not torch.equal(end.logprobs, start.logprobs)


class Fixed:
    """A rollout that always draws the same rows."""

    def __call__(self, items, *seed):
        return tokens()

    def texts(self, rows, which):
        return [{} for _ in which]


def test_a_trained_adapter_is_its_own_reference_on_the_same_trunk(world):
    models = roles_of(world, "trunk", model=str(world / "sft"), lora=None)
    batch = rows(8, 5)
    assert stands_on(models.reference, models.policy) and stands_on(models.value, models.policy)
    before = token_logprobs(models.reference, batch)
    assert torch.equal(before, token_logprobs(models.policy, batch))
    trained(models.policy)
    assert torch.equal(token_logprobs(models.reference, batch), before)
    assert torch.allclose(before, token_logprobs(load_policy(world / "sft"), batch), atol=1e-6)


def test_a_reference_folder_with_an_adapter_stands_on_the_trunk(world):
    models, batch = roles_of(world, "trunk", reference=str(world / "sft")), rows(8, 5)
    apart = reference_of(models.policy, world / "sft", tokenizer=tokenizer_of())
    assert stands_on(models.reference, models.policy) and not stands_on(apart, models.policy)
    assert torch.equal(token_logprobs(models.reference, batch), token_logprobs(apart, batch))
    assert models.reference.get_base_model().lm_head.weight is models.policy.get_base_model().lm_head.weight


def test_a_merged_sft_adapter_is_a_trunk_for_the_value(world):
    said = []
    models = roles_of(world, "trunk", said, model=str(world / "sft"), reward=str(world / "whole"))
    assert stands_on(models.value, models.policy) and not stands_on(models.reward, models.policy)
    assert said == [
        "sharing=trunk: the reward (LlamaForSequenceClassification) is no adapter on the policy's trunk and stays separate."
    ]


def test_a_sum_of_rewards_shares_what_it_can(world):
    said = []
    reward = {
        "helpful": str(world / "reward"),
        "cost": {"model": str(world / "cost"), "weight": 0},
        "other": str(world / "whole"),
    }
    models = roles_of(world, "trunk", said, name="ppo_lagrangian", reward=reward)
    shared = {name: stands_on(part, models.policy) for name, (part, _) in models.reward.rewards.items()}
    assert shared == {"helpful": True, "cost": True, "other": False}
    assert len(said) == 1 and "the reward (other)" in said[0]
    scored = models.reward(tokens())
    assert torch.allclose(scored.parts["cost"], response_scores(load_scalar(world / "cost"), tokens()), atol=1e-6)
    assert sum(line.weights for line in bill(models, METHOD.trains)) == weights_held(
        Models(
            models.policy,
            models.reference,
            torch.nn.ModuleList(p for p, _ in models.reward.rewards.values()),
            models.value,
        )
    )


# -- what cannot be shared ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sharing": "trunk", "lora": None}, ConfigError, "needs a trunk that training leaves alone.*Give --lora"),
        (
            {"sharing": "trunk", "reward": "foreign"},
            ModelError,
            r"its base, .*other, is not that of the policy, .*base",
        ),
        ({"sharing": "trunk", "value": "foreign"}, ModelError, r"value model \(from value\).*weights are not the same"),
        (
            {"sharing": "trunk", "value": "whole"},
            ModelError,
            r"found a whole model.*expected an adapter on the policy's base, .*weights are not the same.*with LoRA from .*base",
        ),
        ({"sharing": "trunk", "reference": "foreign"}, ModelError, "not a language model|not that of the policy"),
        ({"sharing": "trunk", "model": "sft", "lora": None, "reward": "whole"}, ConfigError, "no adapter of its own"),
        (
            {"sharing": "trunk", "model": "sft"},
            ModelError,
            r"into which an earlier adapter was merged.*leave --lora out",
        ),
        (
            {"sharing": "trunk", "reward": {"model": "reward", "dtype": "bfloat16"}},
            ModelError,
            "bfloat16 there, .*float32",
        ),
        ({"sharing": "value_head", "value": "reward"}, ConfigError, "Leave value out"),
        ({"sharing": "value_head", "name": "trpo"}, ConfigError, "trpo moves the policy by its surrogate alone"),
        (
            {"sharing": "value_head", "name": "grpo"},
            ConfigError,
            "grpo has no value model. Take sharing=trunk, with --lora",
        ),
        (
            {"sharing": "trunk", "model": "sft", "lora": None, "value": "whole"},
            ConfigError,
            "value=.*whole: found a whole model, expected with sharing=trunk an adapter with a head.*Give",
        ),
        ({"sharing": "everything"}, ConfigError, "sharing"),
    ],
)
def test_what_cannot_share_is_refused_with_what_to_do(world, settings, error, message):
    def place(value):
        return str(world / value) if isinstance(value, str) and (world / value).exists() else value

    settings = {
        key: {k: place(v) for k, v in value.items()} if isinstance(value, dict) else place(value)
        for key, value in settings.items()
    }
    sharing = settings.pop("sharing")
    with pytest.raises(error, match=message):
        roles_of(world, sharing, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ppo", {"sharing": "trunk", "lora": None}),
        ("ppo", {"sharing": "trunk", "lora": None, "model": {"architecture": "llama"}, "tokenizer": "base"}),
        ("trpo", {"sharing": "value_head"}),
        ("grpo", {"sharing": "value_head"}),
        ("ppo", {"sharing": "value_head", "value": "reward"}),
    ],
)
def test_what_settings_tell_of_sharing_is_refused_before_anything_is_loaded(world, monkeypatch, name, settings):
    monkeypatch.chdir(world)
    for loader in ("load_tokenizer", "read_sides", "load_trained"):
        monkeypatch.setattr(stage_run, loader, lambda *_, **__: pytest.fail("something was loaded"))
    with pytest.raises(ConfigError, match=f"argument sharing: sharing={settings['sharing']}"):
        stage_run.run_stage(settings_of(world, name=name, **settings), quiet=True)


def test_a_reward_without_a_trunk_stays_apart_and_is_named(world, tmp_path):
    (tmp_path / "rewards.py").write_text("def ends(prompts, responses):\n    return [1.0 for _ in responses]\n")
    said = []
    models = roles_of(world, "trunk", said, reward=f"{tmp_path / 'rewards.py'}:ends")
    assert len(said) == 1 and "FunctionReward" in said[0] and "stays separate" in said[0]
    assert stands_on(models.value, models.policy)


def test_a_method_of_one_role_says_that_nothing_is_shared(world):
    said = []
    roles_of(world, "trunk", said, name="sft", reward=None, lora=None)
    assert said == ["sharing=trunk changes nothing: sft has one role."]


# -- folders -----------------------------------------------------------------------------------------------------------


def test_adapters_of_a_shared_trunk_are_saved_as_folders_of_their_own(world, tmp_path):
    models = moved(roles_of(world, "trunk"))
    batch, ids = rows(8, 5), rows(7).ids
    for role in ("policy", "value", "reward"):
        save_model(getattr(models, role), tokenizer_of(), tmp_path / role)
        assert (tmp_path / role / "adapter_model.safetensors").exists()
        assert not (tmp_path / role / "model.safetensors").exists()
    plain = AutoModelForCausalLM.from_pretrained(world / "base")
    assert torch.equal(
        peft.PeftModel.from_pretrained(plain, tmp_path / "policy")(ids).logits, models.policy(ids).logits
    )
    assert torch.equal(token_values(load_scalar(tmp_path / "value"), batch), token_values(models.value, batch))
    assert torch.equal(response_scores(load_scalar(tmp_path / "reward"), batch), response_scores(models.reward, batch))


@pytest.mark.parametrize("lora", [True, None])
def test_a_value_head_on_the_policy_is_saved_as_a_whole_model(world, tmp_path, lora):
    models = moved(roles_of(world, "value_head", lora=lora))
    save_model(models.value, tokenizer_of(), tmp_path / "value")
    save_model(models.policy, tokenizer_of(), tmp_path / "policy")
    batch = rows(8, 5)
    values = token_values(models.value, batch)
    assert torch.allclose(token_values(load_scalar(tmp_path / "value"), batch), values, rtol=1e-4, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value")
    assert torch.allclose(plain(rows(7).ids[:, :4]).logits[0, 0], token_values(models.value, rows(7))[0, 4], rtol=1e-4)
    assert torch.equal(token_logprobs(load_policy(tmp_path / "policy"), batch), token_logprobs(models.policy, batch))


@pytest.mark.parametrize("architecture", sorted(SMALL))
def test_a_value_head_stands_on_any_trunk(architecture):
    policy, batch = tiny(architecture), tokens()
    value = value_head_on(policy, seed=3)
    assert value.base_model is policy.base_model and value.config is not policy.config
    assert [n for n, p in value.named_parameters() if id(p) not in {id(q) for q in policy.parameters()}] == [
        "score.weight"
    ]
    apart = copy.deepcopy(value), copy.deepcopy(policy)
    assert close(token_logprobs(policy, batch), token_logprobs(apart[1], batch))
    assert close(token_values(value, batch), token_values(apart[0], batch))


# -- one pass for two heads --------------------------------------------------------------------------------------------


@pytest.fixture
def two_heads(world, monkeypatch):
    """A policy, a value head on it, and how many passes the trunk has made."""
    policy = trained(load_policy(world / "base", lora=LORA))
    value = value_head_on(policy, seed=1)
    token_logprobs(policy, rows(4)), token_values(value, rows(4))  # each is tried out once
    passes = []
    states = trunk.states
    monkeypatch.setattr(trunk, "states", lambda *inputs: passes.append(1) or states(*inputs))
    return policy, value, passes


def test_one_pass_serves_log_probs_and_values(two_heads):
    policy, value, passes = two_heads
    batch = rows(8, 5)
    token_logprobs_and_entropy(policy, batch)
    token_values(value, batch)
    assert len(passes) == 1 and not memo._kept
    token_values(value, batch)
    token_logprobs(policy, batch)
    assert len(passes) == 2 and not memo._kept
    with torch.no_grad():
        METHOD.loss(Models(policy, None, None, value), trajectories(batch))
    assert len(passes) == 3


def trajectories(batch):
    from palate.types import Trajectories

    zeros = torch.zeros(batch.ids.shape)
    return Trajectories(batch, zeros, zeros, zeros, zeros[:, 0], zeros, zeros)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("moment", ["same reader", "step", "in place", "backward", "adapter off", "other rows", "mode"])
def test_a_pass_is_never_served_where_it_would_be_stale(two_heads, moment, gradient):
    policy, value, passes = two_heads
    batch = rows(8, 5)
    context = torch.enable_grad if gradient else torch.no_grad
    with context():
        first = token_logprobs(policy, batch)
    reader, read = value, token_values
    if moment == "same reader":
        reader, read = policy, token_logprobs
    if moment == "step":
        named = [p for p in policy.parameters() if p.requires_grad]
        for p in named:
            p.grad = torch.ones_like(p)
        torch.optim.AdamW(named, lr=0.1, fused=True).step()
    if moment == "in place":
        trained(policy)
    if moment == "backward" and gradient:
        first.sum().backward()
    if moment == "backward" and not gradient:
        pytest.skip("there is nothing to go back through")
    if moment == "other rows":
        batch = rows(8, 5)
    if moment == "mode":
        context = torch.no_grad if gradient else torch.enable_grad
    del first
    fresh = copy.deepcopy(reader)
    off = policy.disable_adapter() if moment == "adapter off" else context()
    with context(), off:
        found = read(reader, batch)
        if moment == "adapter off":
            assert len(passes) == 2
            return
        assert len(passes) == 2
        assert torch.equal(found, read(fresh, batch))
    if found.requires_grad:
        found.sum().backward()


@pytest.mark.parametrize("change", ["weights put in place", "scale of the adapter", "rows in place", "unfrozen"])
def test_a_pass_is_not_served_after_a_change_that_leaves_versions_of_weights(two_heads, change):
    policy, value, passes = two_heads
    batch = rows(8, 5)
    learning = [p for p in policy.parameters() if p.requires_grad]
    if change == "unfrozen":
        policy.requires_grad_(False)
    token_logprobs(policy, batch)
    if change == "weights put in place":
        moved = torch.nn.utils.parameters_to_vector(learning).detach() + 0.1
        torch.nn.utils.vector_to_parameters(moved, learning)
    if change == "scale of the adapter":
        for layer in policy.modules():
            if isinstance(getattr(layer, "scaling", None), dict):
                layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}
    if change == "rows in place":
        batch.ids[:, 3] = (batch.ids[:, 3] + 1) % 16
    if change == "unfrozen":
        for p in learning:
            p.requires_grad_(True)
    found = token_values(value, batch)
    assert len(passes) == 2
    assert torch.equal(found, token_values(copy.deepcopy(value), batch))
    found.sum().backward()
    assert change != "unfrozen" or all(p.grad is not None for p in learning if p.ndim == 2)


def test_the_reference_neither_takes_a_pass_nor_leaves_one(two_heads):
    policy, value, passes = two_heads
    batch, reference = rows(8, 5), AdapterOff(policy)
    with torch.no_grad():
        token_logprobs(reference, batch)
        assert not memo._kept
        token_logprobs(policy, batch)
        token_logprobs(reference, batch)
        token_values(value, batch)
    assert len(passes) == 3


def test_a_pass_is_let_go_with_its_rows(two_heads):
    policy, _, _ = two_heads
    batch = rows(8, 5)
    token_logprobs(policy, batch)
    assert len(memo._kept) == 1
    del batch
    gc.collect()
    assert not memo._kept


def test_without_a_gradient_only_so_much_is_kept(two_heads, monkeypatch):
    policy, value, passes = two_heads
    monkeypatch.setattr(memo, "KEPT_BYTES", 100)
    batch = rows(8, 5)
    with torch.no_grad():
        token_logprobs(policy, batch)
        assert not memo._kept
        token_values(value, batch)
    assert len(passes) == 2


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sharing", "reward"),
    [
        ("ppo", "trunk", "reward"),
        ("ppo", "value_head", "reward"),
        ("ppo_lagrangian", "trunk", "sum"),
        ("grpo", "trunk", "reward"),
        ("rloo", "separate", "reward"),
        ("dpo", "trunk", None),
    ],
)
def test_a_stage_trains_on_every_rung(world, tmp_path, name, sharing, reward, capsys):
    several = {"helpful": str(world / "reward"), "cost": {"model": str(world / "cost"), "weight": 0}}
    reward = several if reward == "sum" else str(world / reward) if reward else None
    data = world / "prompts.jsonl"
    if name == "dpo":
        data = tmp_path / "pairs.jsonl"
        lines = [{"prompt": p, "chosen": "a b", "rejected": "c d"} for p in ("a b", "c d", "e f", "g h")]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = palate.train(
        name,
        model=world / "base",
        data=data,
        out=tmp_path / "run",
        reward=reward,
        lora=True,
        sharing=sharing,
        sampling={"max_new_tokens": 4},
        training={"batch_size": 4, "max_steps": 2},
    )
    shown = capsys.readouterr().err
    assert f"sharing={sharing}" in shown
    assert (out / "model" / "adapter_model.safetensors").exists()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    if name != "dpo":
        assert abs(lines[0].get("ratio", 1) - 1) < 1e-5
    load_policy(out / "model")
