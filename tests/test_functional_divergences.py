"""The three estimators of KL(pi || ref), and the exact one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.functional.divergences import exact_kl, k1, k2, k3

NATS = st.floats(-50, 0, allow_nan=False)


@given(NATS, NATS)
def test_values_equal_their_definitions(logprob, reference):
    p, q = torch.tensor(logprob, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    d = logprob - reference
    assert k1(p, q).item() == pytest.approx(d, abs=1e-12)
    assert k2(p, q).item() == pytest.approx(d * d / 2, abs=1e-12)
    assert k3(p, q).item() == pytest.approx(math.exp(-d) - 1 + d, rel=1e-9, abs=1e-9)
    assert k2(p, q) >= 0 and k3(p, q) >= 0


def test_k3_keeps_the_digits_of_tiny_differences():
    """exp(-d) - 1 + d = d^2/2 - d^3/6 + ...; in float32 the naive formula gives 0 for d = 1e-4."""
    d = torch.tensor([1e-4, -1e-4, 3e-3])
    assert torch.allclose(k3(d, torch.zeros(3)), d.double().square().div(2).float(), rtol=2e-2)
    assert k3(torch.zeros(2), torch.zeros(2)).tolist() == [0, 0]


def two_distributions(seed=0, size=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, size, generator=generator, dtype=torch.float64)


def test_k1_and_k3_average_to_the_exact_kl_and_k2_does_not():
    policy, reference = two_distributions()
    p, logp, logq = policy.softmax(-1), policy.log_softmax(-1), reference.log_softmax(-1)
    kl = float((p * (logp - logq)).sum())
    assert float((p * k1(logp, logq)).sum()) == pytest.approx(kl)
    assert float((p * k3(logp, logq)).sum()) == pytest.approx(kl)
    assert float((p * k2(logp, logq)).sum()) != pytest.approx(kl, rel=0.05)
    assert float(exact_kl(policy, reference)) == pytest.approx(kl, rel=1e-12)


def test_expected_gradients_differ_as_the_papers_say():
    """As a loss over samples of pi: k1 has none, k2 has that of KL(pi||ref), k3 that of KL(ref||pi)."""
    policy, reference = two_distributions(1)
    logq, p = reference.log_softmax(-1), policy.softmax(-1)

    def expected(estimator):
        leaf = policy.clone().requires_grad_()
        (p * estimator(leaf.log_softmax(-1), logq)).sum().backward()
        return leaf.grad

    def exact(kl):
        leaf = policy.clone().requires_grad_()
        kl(leaf).backward()
        return leaf.grad

    assert expected(k1).abs().max() < 1e-12
    assert torch.allclose(expected(k2), exact(lambda x: exact_kl(x, reference)))
    assert torch.allclose(expected(k3), exact(lambda x: exact_kl(reference, x)))


def test_exact_kl_of_impossible_tokens():
    """0 log 0 = 0, in value and gradient; what pi can say and the reference cannot costs infinitely much."""
    leaf = torch.tensor([0.0, 1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    kl = exact_kl(leaf, torch.tensor([0.5, 0.0, -torch.inf], dtype=torch.float64))
    kl.backward()
    assert kl.isfinite() and leaf.grad.isfinite().all()
    assert exact_kl(torch.zeros(2), torch.tensor([0.0, -torch.inf])) == torch.inf
    assert exact_kl(torch.zeros(3, 4), torch.zeros(3, 4)).tolist() == [0, 0, 0]
