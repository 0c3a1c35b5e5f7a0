"""The exact KL of two models at every response token: against plain Python, against autograd on all logits, and however
rows are padded, ordered, cut or batched."""

import pytest
import torch

import slow
from palate.errors import ModelError
from palate.functional import logprobs as module
from palate.functional.logprobs import logprobs_and_kl
from palate.models import forward
from palate.models.forward import token_kl, token_logprobs, token_logprobs_and_kl
from palate.models.roles import AdapterOff, frozen_copy
from test_forward import (
    ARCHITECTURES,
    VARIANTS,
    VOCABULARY,
    adapted,
    alone,
    batch,
    gradients,
    near,
    same_gradients,
    weighted,
)
from tiny import tiny, trained

V = 13


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request):
    """A policy and another model of its kind with other weights."""
    settings = ARCHITECTURES[request.param]
    return tiny(request.param, **settings), tiny(request.param, seed=1, **settings).requires_grad_(False)


# --- from states --------------------------------------------------------------------------------------------------


def inputs(rows=9, dtype=torch.float64, scale=1.0):
    """hidden, weight, bias of the model; of the other, whose states are wider; targets."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own = [(draw(rows, 6) * scale).to(dtype), draw(V, 6).to(dtype), draw(V).to(dtype)]
    other = [(draw(rows, 4) * scale).to(dtype), draw(V, 4).to(dtype), draw(V).to(dtype)]
    return [x.requires_grad_() for x in own], other, torch.randint(0, V, (rows,), generator=generator)


def run(own, other, targets, **settings):
    (h, w, b), (g, u, c) = own, other
    return logprobs_and_kl(h, w, targets, g, u, bias=b, other_bias=c, **settings)


def on_full_logits(own, other, targets, temperature=1.0, softcap=None, other_softcap=None):
    logp = []
    for (h, w, b), cap in ((own, softcap), (other, other_softcap)):
        logits = h @ w.T + b
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logp.append((logits / temperature).log_softmax(-1))
    p, q = logp
    return p.gather(-1, targets[:, None])[:, 0], (q.exp() * (q - p)).sum(-1)


def mixed(logprob, kl):
    count = torch.arange(1, len(logprob) + 1, dtype=logprob.dtype)
    return (logprob * count).sum() + (kl * (count - 3.5)).sum()


@pytest.fixture(params=[1, 2 * V, 1 << 21], ids=str)
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.parametrize("caps", [(None, None), (2.0, 3.0)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_autograd_on_full_logits(chunk, temperature, caps):
    own, other, targets = inputs()
    settings = {"temperature": temperature, "softcap": caps[0], "other_softcap": caps[1]}
    found, wanted = run(own, other, targets, **settings), on_full_logits(own, other, targets, **settings)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float64 and torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)
    for loss in (mixed, lambda logprob, _: logprob.sum(), lambda _, kl: kl.sum()):
        ours = torch.autograd.grad(loss(*found), own, retain_graph=True)
        theirs = torch.autograd.grad(loss(*wanted), own, retain_graph=True)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(ours, theirs, strict=True))


def test_values_equal_plain_python_and_the_expectation_is_under_the_other():
    own, other, targets = inputs(rows=4)
    _, kl = run(own, other, targets, temperature=0.8)
    for row in range(4):
        p, q = (
            slow.log_softmax([x / 0.8 for x in (h[row] @ w.T + b).tolist()])
            for h, w, b in ([x.detach() for x in own], other)
        )
        assert kl[row].item() == pytest.approx(slow.kl(q, p)) != pytest.approx(slow.kl(p, q))


def test_the_other_gets_no_gradient_and_a_second_derivative_is_refused():
    own, other, targets = inputs()
    other = [x.requires_grad_() for x in other]
    _, kl = run(own, other, targets)
    (first,) = torch.autograd.grad(kl.sum(), own[0], create_graph=True)
    assert torch.autograd.grad(kl.sum(), other[0], allow_unused=True) == (None,)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_no_rows_give_nothing_and_a_zero_gradient():
    own, other, targets = inputs(rows=0)
    logprob, kl = run(own, other, targets)
    assert logprob.shape == kl.shape == (0,)
    (logprob.sum() + kl.sum()).backward()
    assert all((x.grad == 0).all() for x in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    """Two distributions that are certain of different tokens, thousands of nats apart."""
    own, other, targets = inputs(dtype=dtype, scale=1e3)
    logprob, kl = run(own, other, targets)
    assert kl.dtype == torch.float32 and kl.max() > 1000 and kl.isfinite().all() and kl.min() > -1e-3
    for gradient in torch.autograd.grad(mixed(logprob, kl), own):
        assert gradient.dtype == dtype and gradient.isfinite().all()


def test_a_token_that_the_other_never_says_counts_nothing():
    own, other, targets = inputs()
    other[2][3] = -torch.inf
    _, kl = run(own, other, targets)
    without = [*range(3), *range(4, V)]
    q = (other[0] @ other[1].T + other[2])[:, without].log_softmax(-1)
    p = (own[0] @ own[1].T + own[2]).log_softmax(-1)[:, without]
    assert torch.allclose(kl, (q.exp() * (q - p)).sum(-1), rtol=1e-11)


def test_the_full_logits_are_never_held(monkeypatch):
    own, other, targets = inputs(rows=50)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * V)
    made, original = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *a: made.append(original(*a)) or made[-1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logprob, kl = run(own, other, targets)
    (logprob + kl).sum().backward()
    assert max(kept) <= max(x.numel() for x in (*own, *other)) < 50 * V
    assert max(len(logits) for logits in made) == 3


# --- from models --------------------------------------------------------------------------------------------------


def slow_both(model, other, tokens, temperature=1.0):
    """Log-probs and KL(other || model) of response tokens, from both models' own logits of every row alone."""
    logprobs, divergences = [], []
    for row in range(len(tokens)):
        ids, response = alone(tokens, row)
        where = response.nonzero()[:, 0]
        logp = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)[where - 1]
        with torch.no_grad():
            logq = (other(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)[where - 1]
        logprobs.append(logp.gather(-1, ids[0, where, None])[:, 0])
        divergences.append((logq.exp() * (logq - logp)).sum(-1))
    return torch.cat(logprobs), torch.cat(divergences)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kl_and_its_gradient_are_those_of_the_models_own_logits(pair, temperature):
    model, other = pair
    tokens = batch()
    mask = tokens.response_mask
    logprobs, kl = token_logprobs_and_kl(model, other, tokens, temperature=temperature)
    wanted = slow_both(model, other, tokens, temperature)
    assert kl.shape == mask.shape and kl.dtype == torch.float32 and (kl[~mask] == 0).all() and kl[mask].min() > 0.01
    assert near(logprobs[mask], wanted[0]) and near(kl[mask], wanted[1])
    assert near(token_kl(model, other, tokens, temperature=temperature), kl, 1e-6)
    assert near(token_logprobs(model, tokens, temperature=temperature), logprobs, 1e-6)
    weight = torch.linspace(0.5, 1.5, int(mask.sum()))
    ours = gradients(model, weighted(logprobs, mask) + weighted(kl, mask))
    assert same_gradients(ours, gradients(model, (wanted[0] * weight).sum() + (wanted[1] * weight).sum()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_neither_kl_nor_gradients(pair, variant):
    found = []
    for rows in (batch(), VARIANTS[variant](batch())):
        kl = token_kl(*pair, rows)
        found.append((kl[rows.response_mask], gradients(pair[0], weighted(kl, rows.response_mask))))
    assert near(found[1][0], found[0][0]) and same_gradients(found[1][1], found[0][1])


@pytest.mark.parametrize("bucket", [1, 12, 10**6])
def test_bucket_size_changes_nothing(pair, bucket, monkeypatch):
    tokens = batch()
    wanted = token_kl(*pair, tokens)
    monkeypatch.setitem(forward.BUCKET_TOKENS, "cpu", bucket)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", bucket)
    assert near(token_kl(*pair, tokens), wanted)


def test_two_architectures_of_one_vocabulary_can_be_compared():
    """One runs on real tokens alone, the other on padded rows: their states come in another order."""
    model, other, tokens = tiny("llama"), tiny("gpt2", hidden_size=24, seed=2), batch()
    wanted = slow_both(model, other, tokens)
    assert near(token_kl(model, other, tokens)[tokens.response_mask], wanted[1])


def test_a_model_is_at_no_distance_from_itself():
    model, tokens = tiny("llama"), batch()
    kl = token_kl(model, frozen_copy(model), tokens)
    assert (kl == 0).all()
    assert all((g == 0).all() for g in gradients(model, kl.sum()).values())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_other_may_be_the_model_with_its_adapter_off(architecture):
    """The gradient goes to the adapter alone, and is that against a frozen copy of the base."""
    tokens = batch()
    lora = adapted(tiny(architecture))
    assert (token_kl(lora, AdapterOff(lora), tokens).abs() < 1e-6).all()  # a fresh adapter adds nothing
    trained(lora)
    kl = token_kl(lora, AdapterOff(lora), tokens)
    base = tiny(architecture).requires_grad_(False)
    mask = tokens.response_mask
    assert near(kl[mask], slow_both(lora, base, tokens)[1]) and kl[mask].max() > 0.1
    ours = gradients(lora, weighted(kl, mask))
    assert same_gradients(ours, gradients(lora, weighted(token_kl(lora, base, tokens), mask)))
    assert any(g.abs().max() > 1e-3 for g in ours.values())
    assert all(p.grad is None for p in lora.parameters())


def test_heads_that_do_something_unknown_are_taken_from_the_models_themselves():
    tokens, plain = batch(), tiny("llama", seed=1)
    scaled = tiny("llama")
    scaled.lm_head.register_forward_hook(lambda module, given, logits: 3 * logits + torch.arange(VOCABULARY) / 10)
    for model, other in ((scaled, plain), (plain, scaled)):
        kl = token_kl(model, other, tokens, temperature=0.5)
        wanted = slow_both(model, other, tokens, 0.5)[1]
        assert near(kl[tokens.response_mask], wanted)
        assert same_gradients(gradients(model, kl.sum()), gradients(model, wanted.sum()))


def test_rows_without_a_response_give_zeros_and_no_gradient(pair):
    tokens = batch()
    empty = type(tokens)(
        tokens.ids, tokens.attention_mask, torch.zeros_like(tokens.response_mask), tokens.group, tokens.extras
    )
    kl = token_kl(*pair, empty)
    assert (kl == 0).all()
    assert all((g == 0).all() for g in gradients(pair[0], kl.sum()).values())


def test_vocabularies_of_unlike_size_are_refused():
    other = tiny("llama", seed=1)
    other.resize_token_embeddings(VOCABULARY + 4)
    with pytest.raises(ModelError, match="has 20 logits and the reference 24"):
        token_kl(tiny("llama"), other, batch())


def test_bf16_gives_float32_results_near_the_exact_ones():
    models = [tiny("llama", seed=seed) for seed in (0, 1)]
    low = [tiny("llama", seed=seed).to(torch.bfloat16) for seed in (0, 1)]
    with torch.no_grad():
        exact, found = token_kl(*models, batch()), token_kl(*low, batch())
    assert found.dtype == torch.float32 and 0 < (found - exact).abs().max() < 0.1 * exact.max()
