"""Working copies in bf16 and their float32 masters: what learns, what is saved, and that nothing small is lost."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from batches import batch_of, models_for, run_of, weights_of
from palate.functional.divergences import exact_kl
from palate.methods.dpo import DPO
from palate.methods.ppo import PPO
from palate.methods.reward import RewardModel
from palate.methods.sft import SFT
from palate.models import forward, precision, trunk
from palate.models.forward import response_scores, token_logprobs
from palate.models.load import load_policy, load_scalar, save_model
from palate.models.precision import exact_weights, has_bf16_units, master_of, use_working_copies
from palate.models.roles import frozen_copy
from palate.stage.roles import bill
from palate.training.loop import train
from palate.training.optimizer import make_optimizer, trained_parameters
from palate.training.settings import TrainingSettings
from palate.types import Models
from resuming import everything, stopped_and_resumed
from test_trunk import batch
from tiny import LORA, rows, tiny, tokenizer_of

BF16 = torch.bfloat16


def mixed_models(method, seed=0):
    models = models_for(method, seed=seed)
    for role in method.needs:
        use_working_copies(getattr(models, role))
    return models


def whole(tensors):
    return torch.cat([tensor.flatten().float() for tensor in tensors])


@pytest.fixture
def folder(tmp_path):
    save_model(tiny("llama"), tokenizer_of(), tmp_path / "base")
    return tmp_path / "base"


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # the flat trunk, and a model's own forward
def test_mixed_gradients_are_the_float32_ones_within_bf16s_rounding(architecture):
    """A rounding to bf16 errs by at most 2^-8 of the number, 2^-9 in the root mean square. Between the loss and a weight
    there are, each way, some 20 roundings a layer (seven products with their weights, norms, two sums): 80 for two layers
    there and back, 4 for the head. Independent errors add up to sqrt(84) 2^-9 = 1.8 %; three times that is allowed for
    what softmax and norms amplify."""
    bound = 3 * math.sqrt(84) * 2**-9
    exact, mixed, tokens = tiny(architecture), use_working_copies(tiny(architecture)), batch()
    for model in (exact, mixed):
        (token_logprobs(model, tokens).sum() / tokens.response_mask.sum()).backward()
    wanted = whole(p.grad for p in exact.parameters())
    found = whole(master_of(p).grad for p in mixed.parameters())
    assert 0 < (found - wanted).norm() / wanted.norm() <= bound
    assert functional.cosine_similarity(found, wanted, 0) >= 1 - bound**2
    assert all(p.grad is None for p in mixed.parameters())


@pytest.mark.parametrize("at_once", [precision.AT_ONCE, 50])
def test_gradients_of_several_backward_passes_are_summed_in_float32(at_once, monkeypatch):
    """The master's is the float32 sum of the bf16 gradients, number for number: no rounding in between."""
    monkeypatch.setattr(precision, "AT_ONCE", at_once)
    model = use_working_copies(tiny("llama"))
    parts = [batch(seed) for seed in (1, 2, 3)]
    weights = list(model.parameters())
    wanted = [torch.zeros_like(master_of(p)) for p in weights]
    for part in parts:
        for total, grad in zip(wanted, torch.autograd.grad(token_logprobs(model, part).sum(), weights), strict=True):
            assert grad.dtype == BF16
            total += grad
    for part in parts:
        token_logprobs(model, part).sum().backward()
    assert all(torch.equal(master_of(p).grad, total) for p, total in zip(weights, wanted, strict=True))


def test_a_token_that_stands_often_gets_its_whole_gradient():
    """1000 ones: summed in bf16 they would stop at 256, where one more is less than half a step."""
    weight = torch.zeros(2, 4, dtype=BF16, requires_grad=True)
    trunk._Lookup.apply(weight, torch.zeros(1000, dtype=torch.long)).sum().backward()
    assert weight.grad.tolist() == [[1000.0] * 4, [0.0] * 4]


def test_a_deep_bf16_model_takes_the_flat_way():
    """Its states differ from the padded way's by many roundings; the largest of them once decided."""
    model = tiny("llama", num_hidden_layers=16, hidden_size=64).to(BF16)
    assert forward._has_flat_trunk(model)


# -- masters ---------------------------------------------------------------------------------------------------------


def test_masters_keep_updates_that_bf16_would_lose():
    """100 steps of 1e-4 at weights of 1: bf16's next number below 1 is 1 - 2^-8, and a step of less than half of that is
    lost. The master ends at 1 - 0.01, its working copy at the bf16 number nearest to it."""
    for held in (use_working_copies, lambda model: model.to(BF16)):
        model = held(tiny("llama"))
        weight = model.lm_head.weight
        with torch.no_grad():
            for p in {weight, master_of(weight)}:
                p.fill_(1.0)
        parameters = trained_parameters(Models(policy=model), SFT())
        optimizer = make_optimizer(parameters, TrainingSettings(learning_rate=1e-4))
        for _ in range(100):
            for p in parameters["policy"].values():
                p.grad = torch.ones_like(p)
            optimizer.step()
        master = parameters["policy"]["lm_head.weight"]
        if held is use_working_copies:
            assert torch.allclose(master, torch.full_like(master, 0.99), atol=1e-5)
            assert torch.equal(weight, master.to(BF16)) and weight.dtype == BF16
        else:
            assert master is weight and bool((weight == 1).all())


def test_what_learns_has_a_master_and_what_does_not_is_bf16_alone(folder):
    policy = load_policy(folder, dtype="mixed")
    assert all(p.dtype == BF16 and master_of(p).dtype == torch.float32 for p in policy.parameters())
    reference = frozen_copy(policy)
    assert all(p.dtype == BF16 and master_of(p) is p for p in reference.parameters())
    assert all(master_of(p) is p for p in load_policy(folder, dtype="mixed", trainable=False).parameters())
    with torch.no_grad():
        assert torch.equal(token_logprobs(policy, rows(8)), token_logprobs(reference, rows(8)))

    scalar = load_scalar(folder, dtype="mixed")
    assert scalar.score.weight.dtype == torch.float32 and master_of(scalar.score.weight) is scalar.score.weight
    assert {p.dtype for p in scalar.model.parameters()} == {BF16}

    adapted = load_policy(folder, dtype="mixed", lora=LORA)
    for p in adapted.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else BF16) and master_of(p) is p


def test_tied_weights_stay_one_weight_with_one_master(tmp_path):
    save_model(tiny("llama", tie_word_embeddings=True), tokenizer_of(), tmp_path / "tied")
    model = load_policy(tmp_path / "tied", dtype="mixed")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    exact = load_policy(tmp_path / "tied")
    for each in (model, exact):
        token_logprobs(each, rows(9)).sum().backward()
    found, wanted = master_of(model.lm_head.weight).grad, exact.lm_head.weight.grad
    assert functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.99


def test_the_bill_counts_copies_masters_gradients_and_moments(folder):
    """Two bytes a working copy; master, its gradient and AdamW's moments in float32 are sixteen. Without: two and none."""
    models = Models(policy=load_policy(folder, dtype="mixed"))
    models.reference = frozen_copy(models.policy)
    policy, reference = bill(models, ("policy",))
    assert (policy.weights, policy.training) == (2 * policy.parameters, 16 * policy.parameters)
    assert (reference.weights, reference.training) == (2 * reference.parameters, 0)


# -- on disk ---------------------------------------------------------------------------------------------------------


def test_the_saved_folder_holds_the_masters(folder, tmp_path):
    model = load_policy(folder, dtype="mixed")
    run = run_of(SFT(), Models(policy=model), tmp_path / "run")
    list(train(run))
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-3" / "weights.safetensors")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_model(model, tokenizer_of(), tmp_path / "out")
    assert all(torch.equal(p, before[name]) and p.dtype == BF16 for name, p in model.named_parameters())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    again = load_policy(tmp_path / "out")
    assert any(not torch.equal(p, p.to(BF16).float()) for p in again.parameters())  # more digits than bf16 has
    for name, p in again.named_parameters():
        assert torch.equal(p, kept[f"policy.{name}"]) and torch.equal(p.to(BF16), before[name])
    token_logprobs(model, rows(8)).sum().backward()  # saving took nothing apart
    assert all(master_of(p).grad is not None for p in model.parameters())


def test_exact_weights_are_put_back_after_an_error():
    model = use_working_copies(tiny("llama"))
    with pytest.raises(KeyboardInterrupt), exact_weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        raise KeyboardInterrupt
    assert {p.dtype for p in model.parameters()} == {BF16}


METHODS = [SFT(), RewardModel(), PPO(epochs=2, minibatches=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_mixed_run_stopped_and_resumed_is_bit_identical(method, tmp_path):
    def new_run(folder):
        run = run_of(method, mixed_models(method), folder, validation=range(2), max_steps=5, save_every=2, eval_every=3)
        return replace(run, dtype="bfloat16")

    list(train(run := new_run(tmp_path / "whole")))
    for stop in (1, 4):
        folder = tmp_path / str(stop)
        resumed = stopped_and_resumed(new_run, folder, stop)
        assert everything(folder) == everything(tmp_path / "whole")
        wanted = weights_of(run.models)
        assert all(torch.equal(value, wanted[name]) for name, value in weights_of(resumed.models).items())


def test_the_best_checkpoint_is_put_into_the_working_copies_too(tmp_path):
    models = mixed_models(SFT())
    run = run_of(SFT(), models, tmp_path, validation=range(2), eval_every=1, patience=9, max_steps=4, keep_last=9)
    list(train(run))
    best = tmp_path / "checkpoints" / f"step-{int(run.best['step'])}" / "weights.safetensors"
    kept = load_file(best)
    assert all(torch.equal(p, kept[f"policy.{name}"].to(BF16)) for name, p in models.policy.named_parameters())


# -- learning --------------------------------------------------------------------------------------------------------


def learnable(reads, seed):
    found = batch_of(reads, seed)
    return replace(found, margin=None, probability=None) if reads == "comparisons" else found


@pytest.mark.parametrize("method", [SFT(), DPO(beta=0.5)], ids=lambda method: type(method).__name__)
def test_learning_curves_are_those_of_float32(method, tmp_path):
    """The mean loss of the last ten of 40 steps, over four models and orders of the data, paired. Two dtypes may differ by
    what the choice of a seed does to the average of four: the standard deviation over seeds, divided by two."""

    def last_losses(made, name, dtype):
        found = []
        for seed in range(4):
            run = run_of(
                method,
                made(method, seed=seed),
                tmp_path / f"{name}-{seed}",
                batch=learnable(method.reads, seed),
                max_steps=40,
                seed=seed,
                learning_rate=3e-3,
            )
            losses = [metrics["loss"] for metrics in train(replace(run, dtype=dtype))]
            assert statistics.mean(losses[-10:]) < 0.9 * losses[0]  # it learns
            found.append(statistics.mean(losses[-10:]))
        return found

    exact = last_losses(models_for, "float32", "float32")
    mixed = last_losses(mixed_models, "mixed", "bfloat16")
    assert abs(statistics.mean(mixed) - statistics.mean(exact)) <= statistics.stdev(exact) / 2


def test_the_policy_is_its_reference_at_the_first_look(folder):
    """The same bf16 numbers through the same products: KL 0 exactly, also for a scalar model's score."""
    policy, tokens = load_policy(folder, dtype="mixed"), batch()
    reference = frozen_copy(policy)
    with torch.no_grad():
        logits = [model(input_ids=tokens.ids).logits.float() for model in (policy, reference)]
        assert float(exact_kl(*logits).abs().max()) == 0.0
    assert torch.equal(token_logprobs(policy, tokens).detach(), token_logprobs(reference, tokens))
    scalar = load_scalar(folder, dtype="mixed")
    assert response_scores(scalar, tokens).dtype == torch.float32


# -- what is said ----------------------------------------------------------------------------------------------------


def test_a_cpu_without_bf16_units_is_named(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not has_bf16_units()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_bf16_units()
