"""The optimizers that can be chosen: which numbers they give, what they keep, and that a run resumes to the bit."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from functools import partial

import pytest
import torch
from torch import nn

from batches import models_for, run_of, weights_of
from palate.config import load_settings
from palate.errors import ConfigError
from palate.methods.ppo import PPO
from palate.methods.sft import SFT
from palate.models.load import save_model
from palate.stage import run_stage
from palate.stage.roles import bill
from palate.training import checkpoint, offloaded
from palate.training.loop import train
from palate.training.offloaded import OffloadedAdamW
from palate.training.optimizer import check_optimizer, make_optimizer, state_bytes, trained_parameters
from palate.training.settings import TrainingSettings
from palate.types import Models
from resuming import stopped_and_resumed
from tiny import tiny, tokenizer_of

HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None
needs_8bit = pytest.mark.skipif(not HAS_8BIT, reason='bitsandbytes is not installed: pip install "palate[optim]"')
OPTIMIZERS = ["adamw", "adamw_offload", pytest.param("adamw_8bit", marks=needs_8bit)]
BETAS, EPSILON = (0.9, 0.95), 1e-8


def weights(seed=0):
    """Matrices above and below the size from which moments are kept in 8 bits, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((96, 64), (16, 8), (40,))]


def updated(optimizer, parameters, steps=12):
    """The parameters after some updates with gradients of quite different sizes; one has none in every other step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        for size, p in zip((1.0, 1e-4, 10.0), parameters, strict=True):
            p.grad = size * torch.randn(p.shape, generator=generator)
        if step % 2:
            parameters[1].grad = None
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in parameters])


def written_out(parameters, steps=12, decay=0.1):
    """AdamW as its paper has it (arXiv:1711.05101, algorithm 2), in float64."""
    generator, found = torch.Generator().manual_seed(1), [p.detach().double() for p in parameters]
    first, second, count = [torch.zeros_like(p) for p in found], [torch.zeros_like(p) for p in found], [0] * 3
    for step in range(steps):
        rate = 0.01 / (step + 1)
        grads = [s * torch.randn(p.shape, generator=generator) for s, p in zip((1.0, 1e-4, 10.0), found, strict=True)]
        for i, (p, grad) in enumerate(zip(found, grads, strict=True)):
            if i == 1 and step % 2:
                continue
            count[i] += 1
            p -= rate * decay * p
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * grad.double()
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * grad.double() ** 2
            m, v = first[i] / (1 - BETAS[0] ** count[i]), second[i] / (1 - BETAS[1] ** count[i])
            p -= rate * m / (v.sqrt() + EPSILON)
    return torch.cat([p.flatten() for p in found])


def plain(parameters, **more):
    return torch.optim.AdamW(parameters, betas=BETAS, eps=EPSILON, weight_decay=0.1, **more)


def test_the_fused_update_is_adamw_within_rounding():
    parameters = weights()
    moved = updated(plain(parameters, fused=True), parameters) - torch.cat([p.detach().flatten() for p in weights()])
    wanted = written_out(weights()) - torch.cat([p.detach().flatten() for p in weights()])
    assert (moved - wanted).norm() < 1e-5 * wanted.norm()


class Visited(OffloadedAdamW):
    """Whose device is pretended: what is fetched is another tensor, and what is at home is written down."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.out, self.most = 0, 0

    def fetched(self, moment, p):
        self.out += moment.numel()
        self.most = max(self.most, self.out)
        return moment.clone()

    def put_back(self, moment, home):
        self.out -= moment.numel() if home is not None else 0
        found = super().put_back(moment, home)
        assert found is not moment and (home is None or found is home)
        return found


@pytest.mark.parametrize("at_once", [1, 7000, 10**9], ids=["one by one", "some", "all"])
def test_moments_that_visit_give_the_same_bits(at_once, monkeypatch):
    monkeypatch.setattr(offloaded, "AT_ONCE", at_once)
    mine, theirs = weights(), weights()
    optimizer = Visited(mine, betas=BETAS, eps=EPSILON, weight_decay=0.1, fused=True)
    assert torch.equal(updated(optimizer, mine), updated(plain(theirs, fused=True), theirs))
    assert optimizer.out == 0, "every moment that was fetched was put back"
    assert optimizer.most == 2 * {1: 96 * 64, 7000: 96 * 64 + 16 * 8 + 40, 10**9: 96 * 64 + 16 * 8 + 40}[at_once]
    assert len(optimizer.param_groups) == 1 and len(optimizer.param_groups[0]["params"]) == 3


@needs_8bit
def test_moments_in_8_bits_move_the_weights_nearly_as_those_in_float32():
    """Small parameters keep float32 moments; of the large one the moments take 2 bytes and 1/32 for the scales."""
    models = Models(policy=nn.ParameterDict({str(i): p for i, p in enumerate(weights())}))
    settings = TrainingSettings(optimizer="adamw_8bit", beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0)
    optimizer = make_optimizer({"policy": dict(models.policy.named_parameters())}, settings)
    mine = list(models.policy.parameters())
    before = torch.cat([p.detach().flatten() for p in weights()])
    found = updated(optimizer, mine) - before
    wanted = written_out(weights(), decay=0.0) - before
    big = 96 * 64
    assert (found[big:] - wanted[big:]).norm() < 1e-5 * wanted[big:].norm()
    error = (found[:big] - wanted[:big]).norm() / wanted[:big].norm()
    assert 1e-5 < error < 0.05, "it is another arithmetic, and near"
    for p in mine:
        state = {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v) and not k.startswith("qmap")}
        assert sum(v.numel() * v.element_size() for v in state.values()) == state_bytes(p, "adamw_8bit")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_groups_rates_and_decay_are_those_of_the_plain_one(optimizer):
    method = PPO()
    models = models_for(method)
    parameters = trained_parameters(models, method)
    settings = TrainingSettings(learning_rate=1e-3, value_learning_rate=1e-2, weight_decay=0.1)
    wanted = make_optimizer(parameters, settings).param_groups
    found = make_optimizer(parameters, TrainingSettings(**{**vars(settings), "optimizer": optimizer})).param_groups
    for one, other in zip(found, wanted, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        for key in ("peak", "weight_decay", "betas", "eps", "lr"):
            assert one[key] == other[key], key


def wide_run(folder, optimizer, **changes):
    """A policy with matrices large enough for 8 bits."""
    models = Models(policy=tiny(hidden_size=64, intermediate_size=96).requires_grad_(True))
    given = {"max_steps": 6, "save_every": 2, "tokens_per_microbatch": 25, "weight_decay": 0.01, "optimizer": optimizer}
    return run_of(SFT(), models, folder, **given | changes)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_and_resumed_is_bit_identical_with_every_optimizer(optimizer, tmp_path, monkeypatch):
    """Where offloading would have no effect (no other device), the offloading class itself is put in."""
    if optimizer == "adamw_offload":
        monkeypatch.setattr(torch.optim, "AdamW", OffloadedAdamW)
    list(train(whole := wide_run(tmp_path / "whole", optimizer)))
    resumed = stopped_and_resumed(partial(wide_run, optimizer=optimizer), tmp_path / "stopped", 5)
    for name, value in weights_of(whole.models).items():
        assert torch.equal(value, weights_of(resumed.models)[name]), name
    last = "checkpoints/step-6/optimizer.safetensors"
    assert (tmp_path / "stopped" / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_holds_the_whole_state(optimizer, tmp_path):
    run = wide_run(tmp_path, optimizer)
    list(train(run))
    parameters = trained_parameters(run.models, run.method)
    fresh = make_optimizer(parameters, run.settings)
    checkpoint.load_newest(tmp_path / "checkpoints", parameters, fresh)
    for p in parameters["policy"].values():
        state = fresh.state[p]
        assert float(state["step"]) == 6
        moments = [v for k, v in state.items() if k in ("exp_avg", "exp_avg_sq", "state1", "state2")]
        assert len(moments) == 2 and all(v.shape == p.shape and v.any() for v in moments)
        if optimizer == "adamw_8bit":
            assert isinstance(state["step"], int)
            assert (state["state1"].dtype == torch.uint8) == (p.numel() >= 4096)


def test_a_missing_library_is_said_with_the_command_that_brings_it(monkeypatch, tmp_path):
    """Before any model is loaded: the model's folder is not there either."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r'bitsandbytes.*pip install "palate\[optim\]"'):
        check_optimizer(TrainingSettings(optimizer="adamw_8bit"), "cpu")
    given = {"model": str(tmp_path / "none"), "data": {"train": "none.jsonl"}, "out": str(tmp_path / "run")}
    config = load_settings("sft", settings=given | {"training": {"optimizer": "adamw_8bit"}})
    with pytest.raises(ConfigError, match="bitsandbytes"):
        run_stage(config, quiet=True)


def test_an_unknown_optimizer_is_refused_with_those_that_are_known():
    with pytest.raises(
        ConfigError, match=r"training.optimizer: found 'sgd', expected adamw, adamw_8bit, adamw_offload"
    ):
        TrainingSettings(optimizer="sgd")


def test_offloading_on_a_cpu_is_the_plain_optimizer_and_says_so():
    model = tiny().requires_grad_(True)
    made = make_optimizer({"policy": dict(model.named_parameters())}, TrainingSettings(optimizer="adamw_offload"))
    assert type(made) is torch.optim.AdamW
    assert "no effect on a CPU" in check_optimizer(TrainingSettings(optimizer="adamw_offload"), "cpu")
    assert check_optimizer(TrainingSettings(optimizer="adamw_offload"), "cuda") == ""
    assert check_optimizer(TrainingSettings(), "cpu") == ""


def test_the_bill_counts_what_the_chosen_optimizer_keeps():
    model = tiny(hidden_size=64, intermediate_size=96).requires_grad_(True)
    count = sum(p.numel() for p in model.parameters())
    small = sum(p.numel() for p in model.parameters() if p.numel() < 4096)
    scales = sum(math.ceil(p.numel() / 256) for p in model.parameters() if p.numel() >= 4096)
    models = Models(policy=model)
    (line,) = bill(models, ("policy",))
    assert line.training == 12 * count
    (line,) = bill(models, ("policy",), "adamw_8bit")
    assert line.training == 4 * count + 2 * (count - small) + 8 * small + 8 * scales
    elsewhere = copy.deepcopy(model).to("meta")
    (line,) = bill(Models(policy=elsewhere), ("policy",), "adamw_offload")
    assert line.training == 4 * count, "the gradients only"


def test_a_run_leaves_no_gradient_behind(tmp_path):
    run = wide_run(tmp_path, "adamw")
    for metrics in train(run):
        if metrics["split"] == "train":
            assert all(p.grad is None for p in run.models.policy.parameters())


@needs_8bit
def test_a_whole_run_with_8_bit_moments_learns(tmp_path):
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer, hidden_size=64, intermediate_size=96), tokenizer, tmp_path / "base")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a b ", "response": "c d e"}\n' * 8)
    training = {"optimizer": "adamw_8bit", "max_steps": 12, "batch_size": 4, "learning_rate": 0.02, "warmup": 0}
    given = {"model": str(tmp_path / "base"), "out": str(tmp_path / "run"), "training": training}
    config = load_settings("sft", settings=given | {"data": {"train": str(tmp_path / "a.jsonl")}})
    run_stage(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
