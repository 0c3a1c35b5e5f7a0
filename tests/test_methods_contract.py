"""What every method in palate/methods must do, without a new line for a new one."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from batches import (
    batch_for,
    batch_of,
    left_padded,
    means_and_gradient,
    models_for,
    repadded,
    rewritten,
    run_of,
    weights_of,
)
from palate.config import load_config, load_settings
from palate.data.kinds import KINDS
from palate.errors import DataError
from palate.lookup import method_names
from palate.models.forward import response_logprobs, response_scores
from palate.training.loop import train
from palate.types import Method

DOCS = Path(__file__).resolve().parents[1] / "docs" / "methods"


@pytest.fixture(params=method_names())
def module(request):
    return importlib.import_module(f"palate.methods.{request.param}")


@pytest.fixture
def method(module):
    return module.METHOD()


def name_of(module):
    return module.__name__.rpartition(".")[2]


def near(a, b, tolerance=3e-5):
    scale = max(1.0, float(b.abs().max())) if len(b) else 1.0
    return torch.allclose(a, b, atol=tolerance * scale, rtol=0)


def assert_same(found, wanted):
    for name, value in wanted[0].items():
        assert found[0][name] == pytest.approx(value, abs=3e-5, rel=3e-5), name
    assert found[0].keys() == wanted[0].keys()
    for name, gradient in wanted[1].items():
        assert near(found[1][name], gradient), name


def test_the_docstring_names_paper_roles_and_data(module):
    doc = module.__doc__
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", doc)
    roles = re.search(r"^Roles: (.*?)\. Data: (.*)", doc, re.MULTILINE)
    assert roles, "a line `Roles: ... Data: ...`"
    for role in module.METHOD.needs:
        trained = "trained" if role in module.METHOD.trains else "frozen"
        assert f"{role} ({trained})" in roles[1]
    assert module.METHOD.reads in roles[2]


def test_defaults_construct_a_frozen_dataclass_whose_fields_are_described(module, method):
    assert isinstance(method, Method)
    assert set(method.trains) <= set(method.needs) <= {"policy", "reference", "reward", "value"}
    assert method.reads in KINDS
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1
    for field in dataclasses.fields(method):
        assert re.search(rf"\b{field.name}\b.*: \S", module.METHOD.__doc__.split("Attributes:")[1]), field.name


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return type(value)(7.0, 1 / 3, 0.1) if hasattr(value, "_fields") else value
    return value * 0.75 if isinstance(value, float) else value + 1 if isinstance(value, int) else value


def test_settings_round_trip_through_yaml(module, method, tmp_path):
    given = {f.name: changed(getattr(method, f.name)) for f in dataclasses.fields(method)}
    for values in ({}, {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}):
        settings = {"model": "policy", "out": "run", "data": {"train": "data.jsonl"}, "method": values}
        config = load_settings(name_of(module), settings=settings)
        file = tmp_path / f"{len(values)}.yaml"
        file.write_text(config.to_yaml())
        again = load_config(file=file).method.settings
        assert again == config.method.settings == module.METHOD(**(given if values else {}))


@pytest.mark.parametrize("change", [repadded, left_padded])
def test_padding_changes_neither_loss_nor_gradient(method, change):
    models, batch = models_for(method), batch_for(method)
    assert_same(means_and_gradient(method, models, rewritten(batch, change)), means_and_gradient(method, models, batch))


def test_row_order_changes_neither_loss_nor_gradient(method):
    models, batch = models_for(method), batch_for(method)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert_same(means_and_gradient(method, models, batch.select(order)), means_and_gradient(method, models, batch))


@pytest.mark.parametrize("max_tokens", [1, 30, 45])
def test_microbatches_change_neither_loss_nor_gradient(method, max_tokens):
    models, batch = models_for(method), batch_for(method)
    assert_same(means_and_gradient(method, models, batch, max_tokens), means_and_gradient(method, models, batch))


def test_what_a_method_has_no_place_for_is_refused_by_name(module, method):
    for fact in getattr(method, "refuses", ()):
        kept = {name: None for name in ("margin", "probability") if name != fact}
        with pytest.raises(DataError, match=f'{name_of(module)}: .*"{fact}"'):
            method.prepare(models_for(method), dataclasses.replace(batch_of(method.reads), **kept))


def test_a_row_without_a_response_token_changes_neither_loss_nor_gradient(method):
    """Of a pair on comparisons; the other pairs and rows are as before."""
    if method.reads not in ("comparisons", "corrections", "judgements") or "policy" not in method.trains:
        pytest.skip("said elsewhere")
    models, batch = models_for(method), batch_for(method)
    mask = batch.tokens.response_mask.clone()
    mask[5] = False  # in no pair
    empty = dataclasses.replace(batch, tokens=dataclasses.replace(batch.tokens, response_mask=mask))
    if method.reads in ("comparisons", "corrections"):
        wanted = means_and_gradient(method, models, empty)
        pair = {"chosen": torch.cat([batch.chosen, torch.tensor([3])]), "weight": torch.ones(7)}
        pair["weight"][:6] = batch.weight
        pair["rejected"] = torch.cat([batch.rejected, torch.tensor([5])])
        if batch.probability is not None:
            pair["probability"] = torch.cat([batch.probability, torch.ones(1)])
        assert_same(means_and_gradient(method, models, dataclasses.replace(empty, **pair)), wanted)
    else:
        without = torch.tensor([i for i in range(12) if i != 5])
        assert_same(
            means_and_gradient(method, models, empty), means_and_gradient(method, models, batch.select(without))
        )


def test_the_gradient_is_not_nothing(method):
    _, gradient = means_and_gradient(method, models_for(method), batch_for(method))
    for role in method.trains:
        assert any(g.abs().max() > 1e-6 for name, g in gradient.items() if name.startswith(role))


def test_loss_is_a_mean_and_metrics_carry_no_gradient(method):
    models, batch = models_for(method), batch_for(method)
    with torch.no_grad():
        batch = method.prepare(models, batch)
    for name, mean in method.loss(models, batch).items():
        assert mean.total.ndim == 0 and float(mean.count) > 0
        assert mean.total.requires_grad == (name == "loss"), name


def test_a_real_step_changes_what_is_trained_and_nothing_else(method, tmp_path):
    models = models_for(method)
    before = weights_of(models)
    metrics = list(train(run_of(method, models, tmp_path)))
    after = weights_of(models)
    assert len(metrics) == 3 and all(math.isfinite(m["loss"]) for m in metrics)
    for role in method.needs:
        same = [torch.equal(after[name], old) for name, old in before.items() if name.startswith(f"{role}.")]
        assert all(same) if role not in method.trains else not all(same)


def test_the_same_seed_gives_the_same_metrics_and_another_seed_does_not(method, tmp_path):
    found = []
    for number, seed in enumerate((3, 3, 4)):
        run = run_of(method, models_for(method), tmp_path / str(number), seed=seed)
        list(train(run))
        found.append((run.folder / "metrics.jsonl").read_bytes())
    assert found[0] == found[1] != found[2]


@torch.no_grad()
def stretched(models, factor):
    """Logits or scores a thousand times too large: log-ratios and leads of +-1000 and more."""
    for role in ("policy", "reward", "value"):
        model = getattr(models, role)
        parts = [part for part, _ in model.rewards.values()] if hasattr(model, "rewards") else [model]
        for part in parts:
            if part is not None:
                head = getattr(part, "lm_head", None) or part.score
                head.weight.mul_(factor)
    return models


@torch.no_grad()
def largest(models, rows):
    """The largest log-probability or score of a response, without its sign."""
    if models.policy is not None:
        return response_logprobs(models.policy, rows).abs().max()
    return response_scores(models.reward, rows).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", ["before the batch is prepared", "after"])
def test_extreme_log_ratios_give_finite_loss_and_gradient(method, dtype, when):
    """Also after: then the policy is thousands of nats from the one that sampled."""
    models, batch = models_for(method, dtype), batch_for(method)
    if when == "before the batch is prepared":
        stretched(models, 1e4)
    with torch.no_grad():
        prepared = method.prepare(models, batch)
    if when == "after":
        stretched(models, 1e4)
    loss = method.loss(models, prepared)["loss"].total
    assert loss.isfinite() and largest(models, batch.tokens) > 1000
    parameters = [p for role in method.trains for p in getattr(models, role).parameters()]
    for gradient in torch.autograd.grad(loss, parameters, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_bf16_is_near_float32(method):
    batch = batch_for(method)
    exact, _ = means_and_gradient(method, models_for(method), batch)
    low, gradient = means_and_gradient(method, models_for(method, torch.bfloat16), batch)
    assert low["loss"] == pytest.approx(exact["loss"], abs=0.1, rel=0.03)
    assert all(g.isfinite().all() for g in gradient.values())


def test_a_docs_page_exists(module):
    page = DOCS / f"{name_of(module)}.md"
    assert page.is_file(), f"write {page}"
    text = page.read_text(encoding="utf-8")
    for field in dataclasses.fields(module.METHOD):
        assert field.name in text, f"{page}: says nothing of the setting {field.name}"
