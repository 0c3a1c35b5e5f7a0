"""Activation checkpointing: the same numbers and gradients, less kept, in both ways through a model."""

import contextlib

import pytest
import torch
from torch import nn

from batches import run_of
from palate.errors import ConfigError
from palate.methods.sft import SFT
from palate.models import blocks, forward
from palate.models.activations import checkpoint_activations, checkpointing_layers
from palate.models.forward import token_logprobs, token_values
from palate.models.roles import AdapterOff
from palate.training.loop import train
from palate.types import Models
from test_forward import adapted, scalar_of
from test_trunk import batch, gradients
from tiny import tiny, trained


def kept_bytes(model, tokens, read=token_logprobs):
    """Bytes that the backward pass will read, weights apart: what packing of saved tensors sees."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = read(model, tokens)
    return sum(seen.values()), value


@pytest.mark.parametrize("way", ["flat", "padded"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("read", [token_logprobs, token_values])
def test_gradients_are_the_same_numbers(architecture, way, read, monkeypatch):
    if way == "padded":
        monkeypatch.setattr(forward, "_has_flat_trunk", lambda model: False)
    policy = tiny(architecture, num_hidden_layers=3)
    model, tokens = (policy if read is token_logprobs else scalar_of(policy)), batch()
    plain = read(model, tokens)
    wanted = gradients(model, plain)
    checkpoint_activations(model)
    again = read(model, tokens)
    found = gradients(model, again)
    assert torch.equal(plain, again)
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-8) for name in wanted)


@pytest.mark.parametrize("way", ["flat", "padded"])
def test_less_is_kept_for_the_backward_pass(way, monkeypatch):
    """Of what is inside the layers nothing is left; what enters them is held by the checkpoints, and not counted here."""
    if way == "padded":
        monkeypatch.setattr(forward, "_has_flat_trunk", lambda model: False)
    model, tokens = tiny("llama", num_hidden_layers=6), batch(copies=9)
    plain, _ = kept_bytes(model, tokens)
    checkpoint_activations(model)
    less, value = kept_bytes(model, tokens)
    assert less < plain / 2
    assert value.requires_grad


def test_halves_with_gradients_by_hand_keep_less(monkeypatch):
    """Of a feed-forward half two arrays as wide as its inner size instead of four; of both, no normed states."""
    model, tokens = tiny("llama", num_hidden_layers=6, intermediate_size=64), batch(copies=9)
    by_hand, _ = kept_bytes(model, tokens)
    monkeypatch.setattr(blocks, "_are_plain", lambda *args: False)
    by_modules, _ = kept_bytes(model, tokens)
    assert by_hand < 0.7 * by_modules


def test_without_gradient_nothing_is_different():
    model, tokens = tiny("llama"), batch()
    checkpoint_activations(model)
    with torch.no_grad():
        assert not token_logprobs(model, tokens).requires_grad
        with checkpointing_layers(model, contextlib.nullcontext):
            assert not any(getattr(layer, "gradient_checkpointing", False) for layer in model.base_model.layers)


def test_layers_are_left_as_they_were():
    """Dropout inside a layer stays off, and the model's own forward is as before when the forward room is done."""
    model = tiny("gpt2").eval()
    checkpoint_activations(model)
    with checkpointing_layers(model, contextlib.nullcontext):
        block = model.base_model.h[0]
        assert block.training and not block.mlp.training
    assert not any(module.training for module in model.modules())
    assert not any(layer.gradient_checkpointing for layer in model.base_model.h)


@pytest.mark.parametrize("way", ["flat", "padded"])
def test_a_layer_is_run_again_with_the_adapter_it_was_run_with(way, monkeypatch):
    """One trunk, two roles: by the time of the backward pass the other role's adapter is on again."""
    if way == "padded":
        monkeypatch.setattr(forward, "_has_flat_trunk", lambda model: False)
    model, tokens = trained(adapted(tiny("llama", num_hidden_layers=3))), batch()

    def gradient():
        for name, p in model.named_parameters():
            p.requires_grad_("lora" not in name)
        return gradients(model, token_logprobs(AdapterOff(model), tokens))

    wanted = gradient()
    checkpoint_activations(model)
    found = gradient()
    names = [name for name in wanted if "lora" not in name]
    assert len(names) > 20
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-8) for name in names)


def test_a_run_with_it_takes_the_same_steps(tmp_path):
    losses = []
    for on in (False, True):
        policy = tiny("llama", num_hidden_layers=3)
        run = run_of(SFT(), Models(policy=policy), tmp_path / str(on), max_steps=3, activation_checkpointing=on)
        losses.append([metrics["loss"] for metrics in train(run) if metrics["split"] == "train"])
        assert getattr(policy, "activation_checkpointing", False) is on
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"activation_checkpointing.*Linear.*tokens_per_microbatch"):
        checkpoint_activations(nn.Linear(2, 2))
    checkpoint_activations(nn.Linear(2, 2), on=False)
