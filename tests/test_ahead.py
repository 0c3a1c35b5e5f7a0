"""Rollouts one update ahead: who draws what when, that nothing depends on threads, exact resume, the same fixed points."""

import json
import threading
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

import test_fixed_points
import test_fixed_points_groups as group_points
from batches import models_for, scalar_of, weights_of
from palate.config import load_settings
from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.records import Prompt
from palate.errors import ConfigError, ModelError
from palate.generation.sampler import sample
from palate.generation.settings import SamplingSettings
from palate.lookup import method_names
from palate.methods.dapo import DAPO
from palate.methods.grpo import GRPO
from palate.methods.nash_md import NashMD
from palate.methods.online_dpo import OnlineDPO
from palate.methods.ppo import PPO
from palate.methods.reinforce import Reinforce
from palate.methods.rloo import RLOO
from palate.methods.sft import SFT
from palate.models.adapters import add_lora
from palate.models.forward import token_logprobs
from palate.models.roles import frozen_copy
from palate.resolve import require_all
from palate.stage.roles import bill
from palate.training.ahead import Ahead, sampling_copy
from palate.training.loop import Run, train
from palate.training.rollouts import Rollout
from palate.training.settings import TrainingSettings
from palate.types import Models
from resuming import everything, stopped_and_resumed
from tiny import LORA, tiny, tokenizer_of, trained

METHODS = {
    "ppo": PPO(epochs=2, minibatches=2, adaptive_kl_target=1.0, normalise_scores=True),
    "dapo with refills": DAPO(refills=2),
    "reinforce, greedy": Reinforce(baseline="greedy"),
    "online_dpo": OnlineDPO(),
}
PROMPTS = ["a b", "c", "d e f", "g h", "i", "j k l", "m n"]


def new_run(method, folder, policy=None, **changes):
    """Six steps over seven prompts, a real sampler; a checkpoint every two."""
    chat = Chat(tokenizer_of())
    items, _ = encode_records(
        [Prompt(text, {}, f"line {n}") for n, text in enumerate(PROMPTS)], "prompts", chat, max_length=24
    )
    policy = policy or tiny()
    reward = frozen_copy(scalar_of(tiny(), seed=1))
    value = scalar_of(tiny(), seed=2) if "value" in method.needs else None
    models = Models(policy, frozen_copy(policy), reward, value)
    settings = {"learning_rate": 1e-2, "max_steps": 6, "batch_size": 3, "eval_every": 3, "save_every": 2}
    whose = getattr(method, "drawn_by", ("policy",))
    return Run(
        folder=folder,
        method=method,
        models=models,
        settings=TrainingSettings(**settings | {"samples_every": 2, "warmup": 0, "rollouts_ahead": 1} | changes),
        items=items[:6],
        validation=items[6:],
        rollout=Rollout(policy, chat, SamplingSettings(max_new_tokens=6), 2, whose, models.reference),
    )


def entries(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("palate-rollout")]


# --- who draws what, when -------------------------------------------------------------------------------------


def test_a_batch_is_drawn_by_the_policy_of_one_batch_before(tmp_path, monkeypatch):
    """The sampler's log-probs are those of the weights before the batch's before; the first batch is the policy's own."""
    run, drawn, policies = new_run(RLOO(), tmp_path), [], []
    take = Ahead.take

    def kept(self, step):
        policies.append(frozen_copy(run.models.policy))
        drawn.append(take(self, step))
        return drawn[-1]

    monkeypatch.setattr(Ahead, "take", kept)
    list(train(run))
    assert len(drawn) == 6
    for step, batch in enumerate(drawn):
        said, mask = batch.extras["sampler_logprobs"], batch.response_mask
        old = token_logprobs(policies[max(0, step - 1)], batch)
        assert torch.allclose(said[mask], old[mask], atol=1e-5), step
        new = token_logprobs(policies[step], batch)
        assert torch.allclose(said[mask], new[mask], atol=1e-5) == (step == 0), step


def test_the_weights_are_reported_and_the_first_look_is_still_at_a_ratio_of_one(tmp_path):
    list(train(new_run(GRPO(), tmp_path)))
    first, *later = entries(tmp_path)
    assert first["importance/weight"] == pytest.approx(1, abs=1e-4) and first["importance/effective"] > 0.9999
    for line in later:
        assert line["ratio"] == pytest.approx(1, abs=1e-5) and line["kl/old"] < 1e-6
        assert line["importance/effective"] < 1 and line["importance/largest"] != 1 and line["kl/sampler"] > 1e-6


def test_without_it_nothing_is_weighted_stored_or_started(tmp_path):
    run = new_run(GRPO(), tmp_path, rollouts_ahead=0)
    for _ in train(run):
        assert run.ahead is None and not threads()
    assert not any(name.startswith("importance") for line in entries(tmp_path) for name in line)
    assert not any("rollout" in name for name in everything(tmp_path))
    assert "rollout" not in json.loads((tmp_path / "checkpoints" / "step-4" / "state.json").read_text())


def test_threads_do_not_change_a_number(tmp_path, monkeypatch):
    """Once the background is late, once the main thread; dropout in training takes from the global random numbers."""
    draw, prepare = Ahead._draw, GRPO.prepare
    found = []
    for number, (early, late) in enumerate([(0.0, 0.0), (0.2, 0.0), (0.0, 0.2)]):
        monkeypatch.setattr(Ahead, "_draw", lambda self, step, s=early: (time.sleep(s), draw(self, step))[1])
        monkeypatch.setattr(GRPO, "prepare", lambda self, m, b, s=late: (time.sleep(s), prepare(self, m, b))[1])
        run = new_run(GRPO(), tmp_path / str(number), max_steps=4)
        list(train(run))
        found.append((everything(tmp_path / str(number)), weights_of(run.models)))
    for files, weights in found[1:]:
        assert files == found[0][0]
        assert all(torch.equal(value, weights[name]) for name, value in found[0][1].items())


def test_a_sampling_copy_shares_what_is_frozen_and_no_module():
    policy = trained(add_lora(tiny(), LORA, seed=0, scalar=False))
    twin = sampling_copy(policy)
    modules = {id(m) for m in policy.modules()}
    assert not any(id(m) in modules for m in twin.modules()) and not any(m.training for m in twin.modules())
    pairs = [*zip(policy.named_parameters(), twin.parameters(), strict=True)]
    assert any(p.requires_grad for (_, p), _ in pairs) and any(not p.requires_grad for (_, p), _ in pairs)
    for (name, p), q in pairs:
        assert (p is q) == (not p.requires_grad) and torch.equal(p, q) and not q.requires_grad, name


def test_the_bill_has_the_copy():
    policy = add_lora(tiny(), LORA, seed=0, scalar=False)
    moving = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    *_, line = bill(Models(policy=policy), ("policy",), ahead=1)
    assert (line.role, line.parameters, line.trained, line.weights) == ("sampler", moving, 0, 4 * moving)
    assert len(bill(Models(policy=policy), ("policy",))) == 1


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_closed_run_leaves_no_thread(tmp_path):
    steps = train(new_run(GRPO(), tmp_path))
    next(steps), next(steps)
    assert threads()
    steps.close()
    assert not threads()


def test_an_error_in_the_background_is_the_runs_error(tmp_path):
    def broken(*args, **keywords):
        if threading.current_thread() is not threading.main_thread():
            raise ModelError("the model's logits are NaN")
        return sample(*args, **keywords)

    run = new_run(GRPO(), tmp_path)
    run.rollout = replace(run.rollout, engine=broken)
    with pytest.raises(ModelError, match="logits are NaN"):
        list(train(run))
    assert not threads() and len(entries(tmp_path)) == 1


# --- resuming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_stopped_anywhere_and_resumed_is_bit_identical(name, tmp_path):
    method = METHODS[name]
    list(train(run := new_run(method, tmp_path / "whole")))
    wanted, weights = everything(tmp_path / "whole"), weights_of(run.models)
    assert "checkpoints/step-4/rollout.safetensors" in wanted
    assert "checkpoints/step-6/rollout.safetensors" not in wanted, "nothing is drawn for a batch that does not come"
    resumed = stopped_and_resumed(partial(new_run, method), tmp_path / "stopped", 6, 3)
    assert everything(tmp_path / "stopped") == wanted
    assert all(torch.equal(value, weights[role]) for role, value in weights_of(resumed.models).items())


def test_a_stored_batch_comes_back_with_its_records(tmp_path):
    run = new_run(Reinforce(baseline="greedy"), tmp_path)
    ahead = Ahead(run.rollout, run.items, run.settings, 6)
    ahead.take(2)
    stored = ahead.stored()
    wanted = ahead.take(3)
    again = Ahead(run.rollout, run.items, run.settings, 6)
    again.restore(stored._replace(facts=json.loads(json.dumps(stored.facts))), torch.device("cpu"))
    found = again.take(3)
    for name in ("ids", "attention_mask", "response_mask", "group"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert found.extras.keys() == wanted.extras.keys() and found.extras["drawn_by"] == wanted.extras["drawn_by"]
    assert torch.equal(found.extras["sampler_logprobs"], wanted.extras["sampler_logprobs"])
    assert all(one is other for one, other in zip(found.extras["records"], wanted.extras["records"], strict=True))
    ahead.close(), again.close()


def test_a_damaged_stored_batch_falls_back_to_the_checkpoint_before(tmp_path):
    list(train(new_run(GRPO(), tmp_path / "whole")))
    steps = train(new_run(GRPO(), tmp_path / "hurt"))
    for metrics in steps:
        if metrics["step"] == 5:
            break
    steps.close()
    path = tmp_path / "hurt" / "checkpoints" / "step-4" / "rollout.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    list(train(new_run(GRPO(), tmp_path / "hurt")))
    assert everything(tmp_path / "hurt") == everything(tmp_path / "whole")


def test_a_checkpoint_without_a_stored_batch_is_gone_on_from(tmp_path):
    """A synchronous run that is told to draw ahead from now on: its next batch is the policy's own."""
    list(train(new_run(GRPO(), tmp_path, max_steps=2, rollouts_ahead=0)))
    list(train(new_run(GRPO(), tmp_path, max_steps=4)))
    assert entries(tmp_path)[2]["importance/effective"] > 0.9999 > entries(tmp_path)[3]["importance/effective"]


# --- fixed points ---------------------------------------------------------------------------------------------


def one_ahead(**changes):
    return test_fixed_points.settings(rollouts_ahead=1, **changes)


@pytest.mark.parametrize(
    "name", ["reinforce, running", "rloo, groups of 2", "rloo, two epochs", "grpo, kl in reward", "reinforce_pp"]
)
def test_the_exact_optimum_is_reached(name, tmp_path, monkeypatch):
    monkeypatch.setattr(group_points, "settings", one_ahead)
    method, how = group_points.EXACT[name]
    found = group_points.trained_policy(tmp_path, method, **how)
    assert group_points.total_variation(found, group_points.tilted(group_points.reference())) < 0.03
    assert any(line["importance/effective"] < 0.99 for line in entries(tmp_path))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo"])
def test_with_k3_in_the_loss_its_own_fixed_point_is_reached(name, tmp_path, monkeypatch):
    monkeypatch.setattr(group_points, "settings", one_ahead)
    method, weight, standardise, beta, how = group_points.OWN[name]
    found = group_points.trained_policy(tmp_path, method, **how)
    assert group_points.total_variation(found, group_points.settled(weight, standardise, beta)) < 0.03


@pytest.mark.parametrize("changes", [{}, {"epochs": 2}])
def test_ppo_reaches_the_exact_optimum(tmp_path, monkeypatch, changes):
    monkeypatch.setattr(
        test_fixed_points, "settings", lambda s=test_fixed_points.settings, **c: s(rollouts_ahead=1, **c)
    )
    method = PPO(**{"kl_coef": test_fixed_points.KL_COEF, "epochs": 1, "value_coef": 1.0} | changes)
    assert test_fixed_points.ppo_distance(tmp_path, method) < 0.03


# --- what is refused --------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[1] / "docs" / "asynchronous.md"


def test_the_docs_list_exactly_the_methods_that_can():
    named = {line.split("`")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")}
    classes = {name: import_module(f"palate.methods.{name}").METHOD for name in method_names()}
    assert named == {name for name, cls in classes.items() if hasattr(cls, "off_policy")} and len(named) == 10


@pytest.mark.parametrize("method", [NashMD(), OnlineDPO(labels="hard"), import_module("palate.methods.trpo").METHOD()])
def test_a_method_without_a_correction_refuses(method, tmp_path):
    with pytest.raises(
        ConfigError, match="rollouts_ahead: found 1, expected 0 with .* no correction .*asynchronous.md"
    ):
        next(train(new_run(method, tmp_path)))
    next(train(new_run(method, tmp_path, rollouts_ahead=0)))


def test_a_method_that_does_not_sample_refuses(tmp_path):
    run = replace(new_run(GRPO(), tmp_path), method=SFT(), models=models_for(SFT()), rollout=None)
    with pytest.raises(ConfigError, match="sft, which reads demonstrations and samples nothing"):
        next(train(run))


@pytest.mark.parametrize("filtered", [{"top_p": 0.9}, {"top_k": 5}, {"min_new_tokens": 2}], ids=str)
def test_filters_of_the_sampler_refuse_where_there_are_weights(filtered, tmp_path):
    """pi / mu of the whole softmax is no ratio of what was drawn; online_dpo is right whoever drew."""
    (found,) = (f"sampling.{name}={value}" for name, value in filtered.items())
    given = {"model": "m", "reward": "a:b", "data": "d.jsonl", "out": "o", "sampling": filtered}
    with pytest.raises(ConfigError, match=f"{found} with training.rollouts_ahead.* weights of rloo"):
        require_all(load_settings("rloo", settings=given | {"training": {"rollouts_ahead": 1}}))
    require_all(load_settings("rloo", settings=given))
    require_all(load_settings("online_dpo", settings=given | {"training": {"rollouts_ahead": 1}}))
    run = new_run(RLOO(), tmp_path)
    run.rollout = replace(run.rollout, sampling=SamplingSettings(max_new_tokens=6, **filtered))
    with pytest.raises(ConfigError, match=f"{found} with training.rollouts_ahead"):
        next(train(run))


def test_an_environment_refuses(tmp_path):
    run = new_run(GRPO(), tmp_path)
    run.rollout.environment = object()
    with pytest.raises(ConfigError, match="environment: conversations .* checkpoint"):
        next(train(run))


@pytest.mark.parametrize(
    "wrong",
    [{"rollouts_ahead": 2}, {"importance": "response"}, {"importance_max": 0.5}, {"importance_max": float("nan")}],
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=rf"training\.{name}: found .* expected"):
        TrainingSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"importance": "token"}, {"importance_max": 4.0}])
def test_importance_without_anything_drawn_ahead_is_refused(wrong):
    (name,) = wrong
    given = {"model": "m", "reward": "a:b", "data": "d.jsonl", "out": "o"}
    with pytest.raises(ConfigError, match=rf"training\.{name}: found .*rollouts_ahead is 0.*rollouts_ahead=1"):
        require_all(load_settings("grpo", settings=given | {"training": wrong}))
    require_all(load_settings("grpo", settings=given | {"training": wrong | {"rollouts_ahead": 1}}))
    written_out = {"importance": "sequence", "importance_max": 2.0}  # as in every run's own config.yaml
    require_all(load_settings("grpo", settings=given | {"training": written_out}))
