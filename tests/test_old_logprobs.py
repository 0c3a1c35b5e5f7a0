"""``training.old_logprobs``: log-probs of the draw may stand for a forward pass of the policy, and are then checked."""

from dataclasses import replace

import pytest
import torch

from palate.config import load_settings
from palate.errors import ConfigError, ModelError
from palate.generation.sampler import sample
from palate.methods import _sampled
from palate.methods.dapo import DAPO
from palate.methods.grpo import GRPO
from palate.methods.online_dpo import OnlineDPO
from palate.methods.ppo import PPO
from palate.methods.rloo import RLOO
from palate.resolve import require_all
from palate.stage.rollout import keeps_logprobs
from palate.training.loop import train
from test_ahead import entries, new_run
from tiny import tiny

METHODS = {
    "ppo": PPO(epochs=2, minibatches=2),
    "grpo": GRPO(),
    "rloo": RLOO(),
    "dapo with refills": DAPO(refills=2),
    "online_dpo": OnlineDPO(),
}


def run_with(method, folder, *, keeps, **changes):
    run = new_run(method, folder, rollouts_ahead=0, max_steps=3, **changes)
    run.rollout = replace(run.rollout, keeps_logprobs=keeps)
    return run


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_numbers_are_the_trainers_up_to_rounding(method, tmp_path):
    for name, keeps in (("trainer", False), ("sampler", True)):
        list(train(run_with(method, tmp_path / name, keeps=keeps, learning_rate=1e-3)))
    trainer, sampler = entries(tmp_path / "trainer"), entries(tmp_path / "sampler")
    assert len(trainer) == len(sampler) == 3
    for wanted, found in zip(trainer, sampler, strict=True):
        for name in wanted.keys() - {"kl/sampler", "advantage/mean", "split"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


def test_the_policy_is_not_asked_again(tmp_path, monkeypatch):
    asked = []
    plain = _sampled.token_logprobs

    def counted(model, tokens, **more):
        asked.append(model)
        return plain(model, tokens, **more)

    monkeypatch.setattr(_sampled, "token_logprobs", counted)
    for keeps, wanted in ((False, 3), (True, 0)):
        asked.clear()
        run = run_with(RLOO(), tmp_path / str(keeps), keeps=keeps, eval_every=0)
        run.validation = ()
        list(train(run))
        assert sum(model is run.models.policy for model in asked) == wanted  # once a batch, or never


def test_a_sampler_that_is_wrong_is_found_at_the_first_look(tmp_path):
    """It says the log-probs of another temperature."""

    def wrong(*args, **more):
        tokens = sample(*args, **more)
        return replace(tokens, extras={**tokens.extras, "sampler_logprobs": 0.9 * tokens.extras["sampler_logprobs"]})

    run = run_with(GRPO(), tmp_path, keeps=True)
    run.rollout = replace(run.rollout, engine=wrong)
    with pytest.raises(ModelError, match="First look at fresh samples"):
        list(train(run))


def test_the_disagreement_is_reported(tmp_path):
    list(train(run_with(GRPO(), tmp_path, keeps=True)))
    for line in entries(tmp_path):
        assert 0 <= line["kl/sampler"] < 1e-6 and line["kl/sampler"] == line["kl/old"]


def test_what_was_kept_are_the_log_probs_of_the_draw(tmp_path):
    run = run_with(GRPO(), tmp_path, keeps=True)
    tokens = run.rollout(run.items[:2], 0, 0)
    assert torch.equal(tokens.extras["policy_logprobs"], tokens.extras["sampler_logprobs"])
    kept = _sampled.sampled_logprobs(run.models.policy, tokens, 1.0)
    torch.testing.assert_close(kept, _sampled.token_logprobs(run.models.policy, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "more", "found"),
    [
        ("grpo", {"dtype": "mixed"}, "dtype=mixed"),
        ("grpo", {"training": {"rollouts_ahead": 1}}, "with training.rollouts_ahead"),
        ("grpo", {"environment": {"function": "m:f"}}, "with environment"),
        ("xpo", {}, "draws from others"),
        ("dpo", {}, "samples nothing"),
    ],
)
def test_where_they_cannot_be_trusted_they_are_refused(method, more, found):
    given = {"model": "m", "out": "o", "data": "d.jsonl", "sampling": {"max_new_tokens": 10}}
    given |= {"reward": "r:r"} if method != "dpo" else {}
    training = {"old_logprobs": "sampler"} | more.get("training", {})
    with pytest.raises(ConfigError, match=f"old_logprobs=sampler.*{found}"):
        require_all(load_settings(method, settings=given | more | {"training": training}))
    with pytest.raises(ConfigError, match="expected auto, trainer or sampler"):
        load_settings(method, settings=given | {"training": {"old_logprobs": "both"}})


@pytest.mark.parametrize(
    ("method", "architecture", "more", "wanted"),
    [
        ("grpo", "llama", {}, True),
        ("rloo", "qwen2", {}, True),
        ("grpo", "gpt2", {}, False),
        ("grpo", "qwen3", {}, False),
        ("grpo", "llama", {"dtype": "mixed"}, False),
        ("grpo", "llama", {"device": "cuda"}, False),
        ("grpo", "llama", {"training": {"rollouts_ahead": 1}}, False),
        ("grpo", "llama", {"training": {"old_logprobs": "trainer"}}, False),
        ("online_dpo", "llama", {}, False),
        ("xpo", "llama", {}, False),
    ],
    ids=str,
)
def test_by_itself_only_where_both_ways_are_the_same_arithmetic_and_are_checked(method, architecture, more, wanted):
    given = {"model": "m", "out": "o", "data": "d.jsonl", "reward": "r:r", "device": "cpu", "dtype": "float32"}
    config = load_settings(method, settings=given | {"sampling": {"max_new_tokens": 10}} | more)
    assert keeps_logprobs(config, tiny(architecture)) is wanted
