"""TRPO's step: the natural gradient, of a model small enough to write its Fisher matrix down, and never outside the region."""

import copy
import dataclasses
import itertools

import pytest
import torch

from enumerable import EVERYTHING, TableReward, Tabular, TabularRollout, distribution, rows_of, total_variation
from palate.errors import ConfigError
from palate.functional.trust_region import TrustRegion, conjugate_gradient
from palate.methods.trpo import TRPO
from palate.models.curvature import fisher_product, flat, kl_to_moved, put, response_distributions
from palate.training import trust_region as trust_region_module
from palate.training.loop import Run, train
from palate.training.trust_region import trust_region_step
from palate.types import Models, Tokens
from test_fixed_points import settings, table
from tiny import tiny


def weights(model):
    return [p for p in model.parameters() if p.requires_grad]


def dense_fisher(model, tokens):
    """F from its definition: sum over states of J^T (diag p - p p^T) J, J the Jacobian of the logits. Only the weights
    that some state reads have a row: (their numbers [D], F [D, D])."""
    parameters = weights(model)
    jacobians, middles = [], []
    for row, column in tokens.response_mask.nonzero().tolist():
        logits = model(tokens.ids[row : row + 1, :column]).logits[0, -1]
        slopes = [torch.autograd.grad(z, parameters, retain_graph=True) for z in logits]
        jacobians.append(torch.stack([flat(slope) for slope in slopes]).to_sparse())
        p = logits.detach().softmax(-1)
        middles.append(torch.diag(p) - p[:, None] * p)
    used = torch.cat([j.indices()[1] for j in jacobians]).unique()
    total = torch.zeros(len(used), len(used), dtype=torch.float64)
    for jacobian, middle in zip(jacobians, middles, strict=True):
        dense = jacobian.to_dense()[:, used]
        total += dense.T @ middle @ dense
    return used, total


def tabular():
    return Tabular(seed=3).double()


def test_conjugate_gradient_solves_a_system_it_never_sees():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, target = root @ root.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, target, 40, tolerance=1e-28)
    assert torch.allclose(found, torch.linalg.solve(matrix, target), atol=1e-9)


def test_the_fisher_product_is_that_of_the_matrix():
    model, tokens = tabular(), rows_of(EVERYTHING[::2])
    used, matrix = dense_fisher(model, tokens)
    assert len(used) == 3 * 2 * 7  # logits of the prefixes that responses pass through
    vector = torch.randn(len(flat(weights(model))), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = fisher_product(model, tokens, weights(model), vector)
    assert torch.allclose(found[used], matrix @ vector[used], atol=1e-10)
    assert float(found.norm()) == pytest.approx(float(found[used].norm()))  # and nothing elsewhere


def test_the_fisher_product_of_a_transformer_is_the_curvature_of_its_kl():
    """KL(old || old + e v) = e^2/2 v^T F v + O(e^3), and the odd terms cancel in the mean of +e and -e."""
    model = tiny().double()
    ids = torch.randint(3, 20, (3, 9), generator=torch.Generator().manual_seed(2))
    response = torch.arange(9).expand(3, 9) > 4
    tokens = Tokens(ids, torch.ones_like(response), response, torch.arange(3))
    parameters, old = weights(model), flat(weights(model))
    vector = torch.randn(len(old), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    product = fisher_product(model, tokens, parameters, vector)
    size = 1e-3
    kls = [float(kl_to_moved(model, tokens, parameters, old, old + sign * size * vector)) for sign in (1, -1)]
    put(parameters, old)
    assert sum(kls) / size**2 == pytest.approx(float(vector @ product), rel=1e-3)


def test_temperature_belongs_to_the_distribution():
    model, tokens = tabular(), rows_of(EVERYTHING)
    plain, hot = (torch.cat(list(response_distributions(model, tokens, temperature=t))) for t in (1.0, 2.0))
    assert torch.allclose((plain / 2).log_softmax(-1), hot)


def a_run(folder, method, policy, tokens_per_microbatch=10**6, **changes):
    models = Models(policy, copy.deepcopy(policy), TableReward(table()), Tabular(seed=9, scalar=True, scale=0.0))
    return Run(
        folder=folder,
        method=method,
        models=models,
        settings=settings(**{"batch_size": 2, "tokens_per_microbatch": tokens_per_microbatch} | changes),
        items=range(2),
        rollout=TabularRollout(policy, 60),
    )


def a_step(folder, region, tokens_per_microbatch=10**6):
    """The change of the weights in one step on 120 samples, with everything needed to do it again by hand."""
    policy = tabular()
    run = a_run(folder, TRPO(kl_coef=0.5, lam=1.0), policy, tokens_per_microbatch)
    with torch.no_grad():
        batch = run.method.prepare(run.models, run.rollout(range(2), 0))
    parameters = weights(policy)
    old = flat(parameters)
    loss = run.method.loss(run.models, batch)["loss"]
    (loss.total / loss.count).backward()
    gradient = flat([p.grad for p in parameters])
    found = trust_region_step(run, batch, parameters, region)
    return policy, batch, old, gradient, flat(parameters), found


def test_the_step_is_the_tabular_natural_gradient(tmp_path):
    """Solved with the whole matrix: -(F + damping)^-1 g, of the length at which the quadratic model of the KL is delta."""
    region = TrustRegion(delta=1e-4, damping=1e-3, iterations=200)
    _, batch, old, gradient, new, found = a_step(tmp_path, region)
    states = batch.tokens.response_mask.sum()
    used, matrix = dense_fisher(tabular(), batch.tokens)
    matrix = matrix / states + region.damping * torch.eye(len(used))
    direction = torch.linalg.solve(matrix, -gradient[used])
    expected = (2 * region.delta / (direction @ matrix @ direction)).sqrt() * direction
    shorter = region.shrink ** found["trust_region/backtracks"]
    # Conjugate gradient ends at a residual of 1e-5 of the start, which the matrix's condition, about 50, makes 5e-4 of a
    # step whose entries are up to 0.03.
    assert torch.allclose((new - old)[used], shorter * expected, atol=2e-5)
    plain = -gradient[used] * (expected.norm() / gradient.norm())
    assert not torch.allclose((new - old)[used], plain, atol=2e-3)  # the plain gradient is another direction


@pytest.mark.parametrize("delta", [1e-5, 1e-3, 1e-2, 0.1])
def test_the_step_never_leaves_the_region_and_fills_it_where_it_is_small(tmp_path, delta):
    _, batch, old, _, new, found = a_step(tmp_path, TrustRegion(delta=delta, damping=1e-6, iterations=50))
    model = tabular()
    parameters = weights(model)
    kl = float(kl_to_moved(model, batch.tokens, parameters, old, new)) / float(batch.tokens.response_mask.sum())
    assert found["trust_region/accepted"] == 1
    assert found["trust_region/kl"] == pytest.approx(kl)
    assert found["trust_region/improvement"] > 0
    assert 0.5 * delta < kl <= delta


def test_microbatches_do_not_change_the_step(tmp_path):
    region = TrustRegion(delta=1e-3, damping=1e-3, iterations=20)
    whole, cut = (a_step(tmp_path / str(size), region, size)[4] for size in (10**6, 30))
    assert torch.allclose(whole, cut, atol=1e-9)


def test_a_step_that_does_not_help_is_given_up_and_leaves_the_weights(tmp_path, monkeypatch):
    worse = itertools.count()
    monkeypatch.setattr(trust_region_module, "_surrogate", lambda run, parts: float(next(worse)))
    _, _, old, _, new, found = a_step(tmp_path, TrustRegion(backtracks=3))
    assert found["trust_region/accepted"] == 0 and torch.equal(old, new)


PHASES = ((0.02, 15, 200), (1e-3, 15, 200), (5e-5, 15, 1200))  # delta, batches, samples of each prompt in a batch


def trpo_distance(folder, phases=PHASES, **changes):
    """TV to pi_ref exp(r / kl_coef) / Z after training by the real loop; delta falls as the learning rate does elsewhere."""
    policy = Tabular(seed=3)
    reference = distribution(policy)
    target = reference * (table() / 0.5).exp()
    target = target / target.sum(-1, keepdim=True)
    for phase, (delta, steps, samples) in enumerate(phases):
        run = a_run(
            folder / str(phase),
            TRPO(
                **{"kl_coef": 0.5, "lam": 1.0, "delta": delta, "damping": 1e-4, "epochs": 8, "value_clip": None}
                | changes
            ),
            policy,
            learning_rate=0.1,
            max_steps=steps,
        )
        run.models.reference = Tabular(seed=3)
        run.rollout = TabularRollout(policy, samples)
        metrics = [line for line in train(run) if line["split"] == "train"]
        assert all(line["trust_region/kl"] <= delta for line in metrics)
    return total_variation(distribution(policy), target)


def test_trpo_reaches_the_tilted_reference(tmp_path):
    assert trpo_distance(tmp_path) < 0.03


def test_trpo_with_half_the_kl_charge_ends_elsewhere(tmp_path):
    """The same run with another coefficient is far from the point for this one: the test above can fail."""
    assert trpo_distance(tmp_path, PHASES[:2], kl_coef=0.25) > 0.08


def test_coarse_numbers_are_refused(tmp_path):
    run = dataclasses.replace(a_run(tmp_path, TRPO(), Tabular(seed=3)), dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype=float32"):
        list(train(run))


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"shrink": 1.0}, {"iterations": 0}, {"damping": -1.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TRPO(**wrong)
