"""The flat trunk is used where it is known, and gives the model's own states and gradients."""

import pytest
import torch

from palate.models import blocks, forward, trunk
from palate.models.forward import response_scores, token_logprobs, token_values
from palate.types import Tokens
from test_forward import scalar_of
from tiny import longrope, rows, tiny

KNOWN = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},  # heads that share keys and values
    "qwen2": {},  # biases
    "mistral": {"sliding_window": None},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},  # norms of single heads
}


def batch(seed=0, *, copies=5, width=16, vocabulary=20):
    """Groups of 1, ``copies`` and 2 rows; a shared prompt each, responses of many lengths, and some of several turns."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0] + [1] * copies + [2] * 2)
    prompt, length = torch.tensor([4, 6, 3])[group], torch.randint(9, width + 1, (len(group),), generator=generator)
    ids = torch.randint(0, vocabulary, (len(group), width), generator=generator)
    for number in range(3):
        first = int((group == number).nonzero()[0])
        shared = torch.arange(width) < int(prompt[first])
        ids[group == number] = torch.where(shared, ids[first], ids[group == number])
    column = torch.arange(width)
    real = column < length[:, None]
    response = real & (column >= prompt[:, None])
    response[0, 6] = response[-1, 5:7] = False  # a turn of the user's within what is learned
    return Tokens(ids * real, real, response, group)


def gradients(model, value):
    model.zero_grad()
    weight = torch.linspace(-1, 1, value.numel()).view_as(value)
    (value * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("read", [token_logprobs, token_values, response_scores])
def test_flat_rows_give_the_padded_numbers_and_gradients(architecture, read, monkeypatch):
    monkeypatch.setattr(trunk, "QUERIES_AT_ONCE", 8)  # so that the five rows of a group take several attention calls
    policy = tiny(architecture, **KNOWN[architecture])
    model, tokens = (policy if read is token_logprobs else scalar_of(policy)), batch()
    assert forward._has_flat_trunk(model)
    flat = read(model, tokens)
    flat_gradients = gradients(model, flat)
    monkeypatch.setattr(forward, "_has_flat_trunk", lambda model: False)
    padded = read(model, tokens)
    padded_gradients = gradients(model, padded)
    assert relative(flat, padded) < 1e-5
    assert flat_gradients.keys() == padded_gradients.keys()
    assert all(relative(flat_gradients[name], padded_gradients[name]) < 1e-5 for name in padded_gradients)


@pytest.mark.parametrize("architecture", KNOWN)
def test_halves_by_hand_give_the_numbers_of_their_modules(architecture, monkeypatch):
    """With shared heads, biases and norms of heads, and the last layer's states of some tokens only."""
    model, tokens = tiny(architecture, **KNOWN[architecture]), batch()
    by_hand = token_logprobs(model, tokens)
    wanted = gradients(model, by_hand)
    monkeypatch.setattr(blocks, "_are_plain", lambda *args: False)
    by_modules = token_logprobs(model, tokens)
    found = gradients(model, by_modules)
    assert relative(by_hand, by_modules) < 1e-6
    assert wanted.keys() == found.keys()
    assert all(relative(wanted[name], found[name]) < 1e-5 for name in found)


def test_a_layer_that_somebody_listens_to_is_called():
    """A hook on a projection hears it, though it is plain otherwise."""
    model, heard = tiny("llama"), []
    layer = model.base_model.layers[0]
    for module in (layer.self_attn.v_proj, layer.mlp.up_proj):
        module.register_forward_hook(lambda module, args, out: heard.append(module))
    assert forward._has_flat_trunk(model)
    heard.clear()
    token_logprobs(model, batch())
    assert layer.self_attn.v_proj in heard and layer.mlp.up_proj in heard


def test_frozen_projections_get_no_gradient_and_pass_it_on():
    model, tokens = tiny("llama"), batch()
    wanted = gradients(model, token_logprobs(model, tokens))
    for name, p in model.named_parameters():
        p.requires_grad_("up_proj" in name or "layers.0.self_attn.k_proj" in name)
        p.grad = None
    found = gradients(model, token_logprobs(model, tokens))
    assert len(found) == 3
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7) for name in found)


def test_a_shared_prompt_stands_once_and_unread_tokens_not_at_all():
    """Two rows of 5 + 3 and 5 + 2 tokens whose states are read from the prompt's last token on, to the last but one."""
    prompt = [1, 2, 3, 4, 5]
    plan = trunk.layout([[trunk.Row([*prompt, 6, 7], 4), trunk.Row([*prompt, 8], 4)]])
    assert plan.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 5, 8]
    assert plan.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert plan.read.tolist() == [4, 5, 6, 7, 8]


def test_a_model_that_is_not_what_its_name_says_takes_the_padded_way(monkeypatch):
    """A layer that does something of its own is noticed by trying."""
    policy, tokens = tiny("llama"), batch()
    attention = policy.base_model.layers[0].self_attn
    own = type(attention).forward

    def doubled(self, *args, **kwargs):
        out, weights = own(self, *args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(type(attention), "forward", doubled)
    assert not forward._has_flat_trunk(policy)
    logits = policy(input_ids=tokens.ids, use_cache=False).logits.log_softmax(-1)[:, :-1]
    wanted = logits.gather(-1, tokens.ids[:, 1:, None])[..., 0] * tokens.response_mask[:, 1:]
    assert torch.allclose(token_logprobs(policy, tokens)[:, 1:], wanted, atol=1e-5)


@pytest.mark.parametrize("architecture,more", [("gpt2", {}), ("mistral", {"sliding_window": 4}), ("gemma2", {})])
def test_other_models_take_the_padded_way(architecture, more):
    assert not forward._has_flat_trunk(tiny(architecture, **more))


def test_a_float64_model_is_masked_in_float64():
    """A float32 mask beside float64 queries was read as something else, where rows are long enough."""
    model = tiny("llama", **KNOWN["llama"]).double()
    tokens = batch(copies=9, width=40)
    with torch.no_grad():
        flat = token_logprobs(model, tokens)
        assert forward._flat_trunk[model]
        own = model(input_ids=tokens.ids, use_cache=False).logits.log_softmax(-1)  # a causal model: padding is after
    own = own[:, :-1].gather(-1, tokens.ids[:, 1:, None])[..., 0]
    own = torch.where(tokens.response_mask[:, 1:], own, 0)
    assert torch.allclose(flat[:, 1:], own, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_angles_that_change_with_the_rows_length_are_not_those_of_longer_company(architecture):
    """LongRoPE turns rows of more than 8 tokens otherwise; transformers asks the longest row of a call."""
    policy = longrope(architecture, turning=8)
    tokens = rows(12, 8, 5, 9, 3)
    with torch.no_grad():
        together = token_logprobs(policy, tokens)
        for number, length in enumerate(tokens.attention_mask.sum(-1).tolist()):
            row = tokens.ids[number, :length]
            logprobs = policy(input_ids=row[None], use_cache=False).logits[0].log_softmax(-1)
            alone = logprobs[1:-1].gather(-1, row[2:, None])[:, 0]
            assert torch.allclose(together[number, 2:length], alone, atol=1e-5)


@pytest.mark.parametrize("lengths", [(8, 8), (8, 6), (6, 8), (8, None), (None, 8)])
@pytest.mark.parametrize("way", ["heads", "whole models"])
def test_of_two_models_neither_is_asked_about_a_row_in_longer_company(lengths, way, monkeypatch):
    """Each has its own length at which its angles change, or none."""
    if way == "whole models":
        monkeypatch.setattr(forward, "plain_head", lambda model: None)
    policy, reference = (
        tiny("llama", seed=n) if turning is None else longrope(turning=turning, seed=n)
        for n, turning in enumerate(lengths)
    )
    tokens = rows(12, 8, 5, 9, 7, 6, 3)
    with torch.no_grad():
        logprobs, kl = forward.token_logprobs_and_kl(policy, reference, tokens)
        for number in range(len(tokens)):
            alone = tokens.select(torch.tensor([number]))
            ours, others = (model(input_ids=alone.ids).logits[0, :-1].log_softmax(-1) for model in (policy, reference))
            mask = alone.response_mask[0, 1:]
            wanted = (others.exp() * (others - ours)).sum(-1)[mask]
            assert torch.allclose(kl[number][tokens.response_mask[number]], wanted, atol=1e-5)
            wanted = ours.gather(-1, alone.ids[0, 1:, None])[mask, 0]
            assert torch.allclose(logprobs[number][tokens.response_mask[number]], wanted, atol=1e-5)
