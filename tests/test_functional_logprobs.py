"""The chunked head against autograd on the full logits, and against plain Python."""

import pytest
import torch

import slow
from palate.functional import logprobs as module
from palate.functional.logprobs import logprobs_and_entropy

HIDDEN, VOCABULARY = 6, 13


def inputs(rows=9, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), targets


def on_full_logits(hidden, weight, bias, targets, temperature, softcap):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def mixed(logprob, entropy):
    """A loss with another weight for every output, so that no gradient can hide."""
    count = torch.arange(1, len(logprob) + 1, dtype=logprob.dtype)
    return (logprob * count).sum() + (entropy * (count - 3.5)).sum()


@pytest.fixture(params=[(1, 0), (2 * VOCABULARY, 0), (1 << 21, 0), (2 * VOCABULARY, 1 << 23)], ids=str)
def chunk(request, monkeypatch):
    """One, two and all rows a chunk, made again for the backward; two rows, kept for it."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param[0])
    monkeypatch.setattr(module, "KEPT_ELEMENTS", request.param[1], raising=False)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_autograd_on_full_logits(chunk, temperature, softcap, with_bias):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    found = logprobs_and_entropy(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
    wanted = on_full_logits(hidden, weight, bias, targets, temperature, softcap)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-12)
    for loss in (mixed, lambda logprob, _: logprob.sum(), lambda _, entropy: entropy.sum()):
        ours = torch.autograd.grad(loss(*found), leaves, retain_graph=True)
        theirs = torch.autograd.grad(loss(*wanted), leaves, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)


def test_values_equal_plain_python():
    hidden, weight, bias, targets = inputs(rows=4)
    logprob, entropy = logprobs_and_entropy(hidden, weight, targets, bias=bias, temperature=0.8)
    for row in range(4):
        logits = [
            (sum(h * w for h, w in zip(hidden[row].tolist(), weight[v].tolist(), strict=True)) + bias[v].item()) / 0.8
            for v in range(VOCABULARY)
        ]
        assert logprob[row].item() == pytest.approx(slow.log_softmax(logits)[targets[row]])
        assert entropy[row].item() == pytest.approx(slow.entropy(logits))


def test_numerical_gradient_agrees():
    hidden, weight, bias, targets = inputs(rows=3)
    assert torch.autograd.gradcheck(
        lambda h, w, b: logprobs_and_entropy(h, w, targets, bias=b, temperature=1.3, softcap=5.0),
        (hidden, weight, bias),
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden, weight, _, targets = inputs()
    logprob, _ = logprobs_and_entropy(hidden, weight, targets)
    (first,) = torch.autograd.grad(logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


def test_without_entropy_it_is_zero_and_the_rest_the_same():
    hidden, weight, bias, targets = inputs()
    with_it, _ = logprobs_and_entropy(hidden, weight, targets, bias=bias)
    without, entropy = logprobs_and_entropy(hidden, weight, targets, bias=bias, with_entropy=False)
    assert torch.allclose(with_it, without, atol=1e-12) and (entropy == 0).all()
    ours, theirs = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (without, with_it))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_no_rows_give_nothing_and_a_zero_gradient():
    hidden, weight, bias, targets = inputs(rows=0)
    logprob, entropy = logprobs_and_entropy(hidden, weight, targets, bias=bias)
    assert logprob.shape == entropy.shape == (0,)
    (logprob.sum() + entropy.sum()).backward()
    assert (weight.grad == 0).all() and (bias.grad == 0).all() and hidden.grad.shape == (0, HIDDEN)


@pytest.mark.parametrize("at_once", [32, 12, 1])  # rows whose gradient of the weight is one product, about
def test_bf16_gives_float32_results_near_the_exact_ones(at_once, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    monkeypatch.setattr(module, "KEPT_ELEMENTS", at_once * VOCABULARY)
    exact = inputs(rows=32)
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in exact[:3]]
    same = [x.detach().double().requires_grad_() for x in low]  # the very numbers that bf16 holds
    found = logprobs_and_entropy(low[0], low[1], exact[3], bias=low[2])
    wanted = on_full_logits(*same, exact[3], 1.0, None)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.05  # logits of about 5 in steps of 1/32
    ours = torch.autograd.grad(mixed(*found), low)
    theirs = torch.autograd.grad(mixed(*wanted), same)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    """Differences of a thousand nats: log-probs of -1000s, entropy 0, no NaN from 0 log 0 in the gradient."""
    hidden, weight, bias, targets = inputs(dtype=dtype, scale=1e3)
    logprob, entropy = logprobs_and_entropy(hidden, weight, targets, bias=bias)
    assert logprob.min() < -1000 and logprob.isfinite().all() and (entropy > -1e-3).all()
    for gradient in torch.autograd.grad(mixed(logprob, entropy), (hidden, weight, bias)):
        assert gradient.isfinite().all()


def test_the_full_logits_are_never_held(monkeypatch):
    """Unless they are small: nothing that autograd keeps has rows x vocabulary numbers, and chunks are small."""
    hidden, weight, bias, targets = inputs(rows=50)
    monkeypatch.setattr(module, "KEPT_ELEMENTS", 50 * VOCABULARY - 1, raising=False)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    made, original = [], module._logits
    monkeypatch.setattr(module, "_logits", lambda *a: made.append(original(*a)) or made[-1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        logprob, _ = logprobs_and_entropy(hidden, weight, targets, bias=bias)
    logprob.sum().backward()
    assert sum(kept) < 50 * VOCABULARY + hidden.numel() + weight.numel()
    assert max(kept) <= max(hidden.numel(), weight.numel()) < 50 * VOCABULARY
    assert max(len(chunk) for chunk in made) == 3
