"""Frozen roles that rest elsewhere: the same numbers, there only while a batch is prepared, and the reasons to stay."""

from __future__ import annotations

import pytest
import torch

from batches import models_for, run_of, weights_of
from palate.config import load_settings
from palate.errors import ConfigError
from palate.methods.dpo import DPO
from palate.methods.ppo import PPO
from palate.models.adapters import add_lora
from palate.models.load import save_model
from palate.models.resting import Resting, rest
from palate.models.roles import AdapterOff
from palate.stage import run_stage
from palate.stage.offload import check_offload, put_to_rest, resting_roles
from palate.training.loop import train
from palate.types import Models
from tiny import LORA, tiny, tokenizer_of


def config_of(method, offload, **more):
    given = {"model": "m", "out": "o", "data": {"train": "t"}, "offload": offload, "device": "cuda"}
    return load_settings(method, settings=given | more)


class Elsewhere(Resting):
    """Resting models of a pretended device: what is fetched is a copy there, what is at home is unusable by mistake."""

    def __init__(self, models):
        self.fetched = 0
        # At home the numbers are NaN: whoever asks a role that is asleep gets nothing but NaN.
        self.kept = {}
        super().__init__(models, self._home_of, self._fetch_of)

    def _home_of(self, tensor):
        home = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor.clone()
        self.kept[home.data_ptr()] = tensor.clone()
        return home

    def _fetch_of(self, home):
        self.fetched += 1
        return self.kept[home.data_ptr()].clone()


@pytest.mark.parametrize("method", [DPO(), PPO(epochs=2, minibatches=2)], ids=["dpo", "ppo"])
def test_results_do_not_change_and_roles_are_there_only_while_a_batch_is_prepared(method, tmp_path):
    changes = {"max_steps": 3, "eval_every": 2, "tokens_per_microbatch": 25}
    list(train(usual := run_of(method, models_for(method), tmp_path / "usual", validation=range(2), **changes)))
    models = models_for(method)
    frozen = [getattr(models, role) for role in method.needs if role not in method.trains]
    assert frozen
    before = weights_of(models)
    resting = Elsewhere(frozen)
    run = run_of(method, models, tmp_path / "resting", validation=range(2), **changes)
    run.awake = resting.awake
    seen = list(train(run))
    for p in (p for model in frozen for p in model.parameters()):
        assert p.isnan().all(), "asleep between batches"
    assert resting.visits == len(seen), "one visit a batch, of training or of evaluation"
    resting.wake()
    after = weights_of(models)
    for name, value in weights_of(usual.models).items():
        assert torch.equal(value, after[name]), name
    for role in method.needs:
        if role not in method.trains:
            assert all(torch.equal(before[n], after[n]) for n in before if n.startswith(f"{role}."))
    assert (tmp_path / "usual" / "metrics.jsonl").read_bytes() == (tmp_path / "resting" / "metrics.jsonl").read_bytes()


def test_an_error_while_they_are_awake_sends_them_to_rest_too():
    model = tiny()
    resting = Elsewhere([model])
    with pytest.raises(ValueError, match="inside"), resting.awake():
        assert not next(model.parameters()).isnan().any()
        raise ValueError("inside")
    assert next(model.parameters()).isnan().all()


def test_weights_that_two_models_share_rest_once_and_stay_shared():
    one, other = tiny(), tiny(seed=1)
    other.lm_head.weight = one.lm_head.weight
    resting = Elsewhere([one, other])
    tensors = {id(t) for m in (one, other) for t in (*m.parameters(), *m.buffers())}
    assert len(resting.kept) == len(tensors)
    with resting.awake():
        assert resting.fetched == len(tensors)
        assert other.lm_head.weight is one.lm_head.weight


def test_on_the_same_device_resting_is_harmless():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    resting = rest([model], torch.device("cpu"))
    with resting.awake():
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_role_that_is_trained_or_not_there_is_refused():
    check_offload(config_of("dpo", "reference"))
    with pytest.raises(ConfigError, match="ppo trains its value.*Frozen here: reference, reward"):
        check_offload(config_of("ppo", ["value"], reward="r"))
    with pytest.raises(ConfigError, match="dpo has no reward"):
        check_offload(config_of("dpo", ["reward"]))
    with pytest.raises(ConfigError, match="offload"):
        config_of("dpo", ["policy"])


def test_who_stays_says_why():
    def reason(method, role, models, **more):
        return resting_roles(config_of(method, [role], **more), models)[role]

    policy = tiny().requires_grad_(True)
    assert reason("dpo", "reference", Models(policy=policy, reference=tiny(seed=1))) == ""
    adapted = _adapted()
    assert "no weights of its own" in reason("dpo", "reference", Models(policy=adapted, reference=AdapterOff(adapted)))
    assert "shares weights" in reason("dpo", "reference", Models(policy=policy, reference=policy))
    assert "let go" in reason("dpo", "reference", Models(policy=policy))
    assert "CPU" in reason("dpo", "reference", Models(policy=policy, reference=tiny(seed=1)), device="cpu")
    assert "asks it" in reason("tdpo", "reference", Models(policy=policy, reference=tiny(seed=1)))
    assert "samples" in reason("xpo", "reference", Models(policy=policy, reference=tiny(seed=1)), reward="r")
    assert "no weights" in reason("rloo", "reward", Models(policy=policy, reward=len), reward="r")
    said = []
    assert put_to_rest(config_of("dpo", ["reference"], device="cpu"), Models(policy=policy), said.append) is None
    assert said == ["offload: the reference stays on cpu: everything is in the CPU's memory anyway."]


def _adapted():
    return add_lora(tiny(), LORA, seed=0, scalar=False)


def test_a_run_on_a_cpu_is_the_same_with_the_setting(tmp_path):
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "base")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a b ", "chosen": "c d e", "rejected": "e f"}\n' * 8)
    for name, offload in (("usual", []), ("offload", ["reference"])):
        given = {"model": str(tmp_path / "base"), "out": str(tmp_path / name), "reference_cache": "off"}
        given |= {"data": {"train": str(tmp_path / "a.jsonl"), "validation_fraction": 0}, "offload": offload}
        training = {"max_steps": 2, "batch_size": 4}
        run_stage(load_settings("dpo", settings=given | {"training": training}), quiet=True)
    usual, other = (tmp_path / name / "model" / "model.safetensors" for name in ("usual", "offload"))
    assert usual.read_bytes() == other.read_bytes()
