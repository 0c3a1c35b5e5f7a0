"""``training.old_logprobs``: log-probs of the draw may stand for a forward pass of the policy, and are then checked."""

from dataclasses import replace

import pytest
import torch

from batches import weights_of
from palate.config import load_settings
from palate.errors import ConfigError, ModelError
from palate.generation.sampler import sample
from palate.methods import _sampled
from palate.methods.dapo import DAPO
from palate.methods.grpo import GRPO
from palate.methods.nash_md import NashMD
from palate.methods.online_dpo import OnlineDPO
from palate.methods.ppo import PPO
from palate.methods.reinforce import Reinforce
from palate.methods.rloo import RLOO
from palate.resolve import require_all
from palate.stage.rollout import keeps_logprobs
from palate.training.loop import train
from test_ahead import entries, everything, new_run
from tiny import tiny

METHODS = {
    "ppo": PPO(epochs=2, minibatches=2),
    "grpo": GRPO(),
    "rloo": RLOO(),
    "dapo with refills": DAPO(refills=2),
    "online_dpo": OnlineDPO(),
    "online_dpo, extremes": OnlineDPO(pairs="extremes", labels="hard"),
    "nash_md": NashMD(),
    "reinforce, greedy": Reinforce(baseline="greedy"),
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


def test_weights_that_do_not_depend_on_them_are_the_same_to_the_last_bit(tmp_path):
    """Of online_dpo only the KL to the reference does; the pairs' log-probs are the loss's own."""
    weights = []
    for name, keeps in (("trainer", False), ("sampler", True)):
        run = run_with(OnlineDPO(), tmp_path / name, keeps=keeps)
        list(train(run))
        weights.append(weights_of(run.models))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for wanted, found in zip(entries(tmp_path / "trainer"), entries(tmp_path / "sampler"), strict=True):
        assert wanted.keys() - found.keys() == {"kl/sampler"}
        for name in found:
            near = {"rel": 1e-5, "abs": 1e-6} if name.startswith("kl/reference") else {"rel": 0, "abs": 0}
            assert name == "split" or found[name] == pytest.approx(wanted[name], **near), name


@pytest.mark.parametrize("method", [OnlineDPO(), NashMD()])
def test_stopped_and_resumed_is_bit_identical(method, tmp_path):
    list(train(run_with(method, tmp_path / "whole", keeps=True)))
    steps = train(run_with(method, tmp_path / "part", keeps=True))
    next(metrics for metrics in steps if metrics["step"] == 3)
    steps.close()  # the last checkpoint is that of step 2
    list(train(run_with(method, tmp_path / "part", keeps=True)))
    assert everything(tmp_path / "part") == everything(tmp_path / "whole")


@pytest.mark.parametrize("method", [RLOO(), OnlineDPO(), NashMD()])
def test_the_policy_is_not_asked_again(method, tmp_path, monkeypatch):
    asked = []
    plain = _sampled.token_logprobs

    def counted(model, tokens, **more):
        asked.append(model)
        return plain(model, tokens, **more)

    monkeypatch.setattr(_sampled, "token_logprobs", counted)
    for keeps, wanted in ((False, 3), (True, 0)):
        asked.clear()
        run = run_with(method, tmp_path / str(keeps), keeps=keeps, eval_every=0)
        run.validation = ()
        list(train(run))
        assert sum(model is run.models.policy for model in asked) == wanted  # once a batch, or never


def one_token(said, mask):
    """A single token of the batch is off by a hundredth of a nat."""
    row, column = mask.nonzero()[0]
    said[row, column] -= 0.01
    return said


WRONG = {
    "another temperature": lambda said, mask: 0.9 * said,
    "a little": lambda said, mask: said * (1 + 1e-4),
    "noise": lambda said, mask: (
        said + 0.02 * mask * torch.randn(said.shape, generator=torch.Generator().manual_seed(0))
    ),
}


@pytest.mark.parametrize("wrong", [*WRONG.values(), one_token], ids=[*WRONG, "one token"])
@pytest.mark.parametrize("method", [GRPO(), OnlineDPO(), OnlineDPO(pairs="extremes"), NashMD()])
def test_a_sampler_that_is_wrong_is_found_at_the_first_look(method, wrong, tmp_path):
    def engine(*args, **more):
        tokens = sample(*args, **more)
        said = wrong(tokens.extras["sampler_logprobs"].clone(), tokens.response_mask)
        return replace(tokens, extras={**tokens.extras, "sampler_logprobs": said})

    run = run_with(method, tmp_path, keeps=True)
    run.rollout = replace(run.rollout, engine=engine)
    with pytest.raises(ModelError, match="First look at fresh samples.*training.old_logprobs=trainer"):
        list(train(run))


def test_the_draw_of_others_is_not_the_policys(tmp_path):
    tokens = run_with(NashMD(), tmp_path, keeps=True).rollout(run_with(NashMD(), tmp_path, keeps=True).items[:2], 0, 0)
    others = torch.tensor([who != "policy" for who in tokens.extras["drawn_by"]])
    kept = tokens.extras["policy_logprobs"]
    assert torch.equal(kept.isnan().any(-1), others)
    assert torch.equal(kept[~others], tokens.extras["sampler_logprobs"][~others])


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
        ("online_dpo", {"lora": {"dropout": 0.1}}, "with lora.dropout"),
        ("xpo", {}, "draws from others"),
        ("best_of_n", {}, "best_of_n does not say what of its loss would check them"),
        ("best_of_n", {"method": {"from_reference": True}}, "draws from others"),
        (
            "online_dpo",
            {"sampling": {"temperature": 0.7}},
            "sampling.temperature=0.7; online_dpo trains .* at temperature 1",
        ),
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
        ("online_dpo", "llama", {}, True),
        ("online_dpo", "llama", {"method": {"labels": "hard"}}, True),
        ("online_dpo", "llama", {"sampling": {"temperature": 0.7}}, False),
        ("online_dpo", "llama", {"lora": {"dropout": 0.1}}, False),
        ("online_dpo", "llama", {"lora": {}}, True),
        ("grpo", "llama", {"sampling": {"temperature": 0.7}}, True),
        ("nash_md", "llama", {}, True),
        ("reinforce", "llama", {"method": {"baseline": "greedy"}}, True),
        ("trpo", "llama", {}, False),
        ("xpo", "llama", {}, False),
        ("best_of_n", "llama", {}, False),
    ],
    ids=str,
)
def test_by_itself_only_where_both_ways_are_the_same_arithmetic_and_are_checked(method, architecture, more, wanted):
    given = {"model": "m", "out": "o", "data": "d.jsonl", "reward": "r:r", "device": "cpu", "dtype": "float32"}
    config = load_settings(method, settings=given | {"sampling": {"max_new_tokens": 10}} | more)
    assert keeps_logprobs(config, tiny(architecture)) is wanted
