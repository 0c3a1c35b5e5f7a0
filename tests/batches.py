"""Batches of every kind, models for every role, and ways to write the same batch differently."""

import copy
from dataclasses import fields, is_dataclass, replace

import torch
from transformers import AutoModelForSequenceClassification

from palate.models.rewards import WeightedReward
from palate.training.loop import Run
from palate.training.settings import TrainingSettings
from palate.types import Comparisons, Judgements, Models, Rankings, Tokens, groups, microbatches
from tiny import tiny

VOCABULARY, WIDTH = 20, 10
PROMPTS = (2, 4, 1, 3)  # tokens of each group's prompt
RESPONSES = (3, 1, 5, 2, 6, 4, 1, 2, 7, 5, 3, 4)  # tokens of each row's response, three rows a group


def tokens(seed=0):
    """Four prompts with three responses each, of 1 to 7 tokens; two responses did not end by themselves."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(4).repeat_interleave(3)
    prompts = torch.randint(0, VOCABULARY, (4, WIDTH), generator=generator)
    ids = torch.randint(0, VOCABULARY, (12, WIDTH), generator=generator)
    place, begin = torch.arange(WIDTH), torch.tensor(PROMPTS)[group][:, None]
    real = place < begin + torch.tensor(RESPONSES)[:, None]
    ids = torch.where(place < begin, prompts[group], ids) * real
    response = real & (place >= begin)
    finished = torch.ones(12, dtype=torch.bool)
    finished[[2, 9]] = False
    sampler = torch.where(response, -torch.rand(12, WIDTH, generator=generator) * 3, 0)
    return Tokens(ids, real, response, group, {"finished": finished, "sampler_logprobs": sampler})


def batch_of(reads, seed=0):
    rows = tokens(seed)
    if reads in ("prompts", "demonstrations"):
        return rows
    if reads == "comparisons":  # every kind of weight, margin and certainty; a group with one pair, one with three
        chosen, rejected = torch.tensor([0, 0, 1, 3, 8, 11]), torch.tensor([1, 2, 2, 4, 6, 9])
        weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0, 1.0, 1.0])
        margin = torch.tensor([0.0, 0.5, 0.0, 1.0, 2.0, 0.3])
        probability = torch.tensor([1.0, 0.8, 0.5, 1.0, 0.9, 0.6])
        return Comparisons(rows, chosen, rejected, weight=weight, probability=probability, margin=margin)
    if reads == "corrections":  # pairs as above; in some rows nothing is changed, in others everything
        batch = batch_of("comparisons", seed)
        changed = torch.rand(rows.ids.shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.4
        changed[3], changed[8] = False, True
        return replace(batch, tokens=replace(rows, extras={**rows.extras, "changed": changed & rows.response_mask}))
    if reads == "rankings":  # no ties; ties below; ties for the best; all tied
        return Rankings(rows, torch.tensor([3, 1, 2, 1, 2, 2, 1, 1, 2, 1, 1, 1]))
    if reads == "judgements":
        return Judgements(rows, torch.arange(12) % 3 == 0)
    raise AssertionError(f"no batch for data of kind {reads!r}: add one here")


def batch_for(method, seed=0):
    """A batch of the method's kind, without the facts for which it says that it has no place; drawn by whom it says: of
    three responses to a prompt, two by the first."""
    batch = replace(batch_of(method.reads, seed), **dict.fromkeys(getattr(method, "refuses", ())))
    whose = getattr(method, "drawn_by", ())
    if len(whose) > 1:
        batch = replace(batch, extras={**batch.extras, "drawn_by": [whose[0], whose[0], whose[1]] * 4})
    return batch


def scalar_of(policy, seed=0, dtype=torch.float32):
    given = {k: v for k, v in policy.config.to_dict().items() if k not in ("id2label", "label2id")}
    settings = type(policy.config).from_dict(given | {"num_labels": 1, "pad_token_id": None})
    model = AutoModelForSequenceClassification.from_config(settings).eval()
    model.base_model.load_state_dict(policy.base_model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator) / 3)
    model.to(dtype).score.float()
    return model


def models_for(method, dtype=torch.float32, seed=0):
    """Every role the method needs, each with other weights; what is not trained is frozen."""
    models = Models()
    for number, role in enumerate(method.needs):
        causal = tiny("llama", seed=seed + number).to(dtype)
        model = (
            causal if role in ("policy", "reference") else scalar_of(tiny("llama", seed=seed + number), number, dtype)
        )
        setattr(models, role, model.requires_grad_(role in method.trains))
    if cost := getattr(method, "cost", None):  # a reward of named parts, one of which is the cost
        models.reward = WeightedReward(
            {"score": (models.reward, 1.0), cost: (scalar_of(tiny(seed=seed), 9, dtype), 0.0)}
        )
    return models


def repadded(rows, left=2, right=3, junk=10**9):
    """The same rows with padding on both sides; junk ids and NaN wherever nothing counts."""
    mask = torch.nn.functional.pad(rows.attention_mask, (left, right))

    def pad(values, fill, counts=mask):
        return torch.where(counts, torch.nn.functional.pad(values, (left, right)), fill)

    response = pad(rows.response_mask, False)
    extras = {
        name: pad(value, value.dtype == torch.bool or float("nan"), response)
        if getattr(value, "ndim", 0) == 2
        else value
        for name, value in rows.extras.items()
    }
    return replace(rows, ids=pad(rows.ids, junk), attention_mask=mask, response_mask=response, extras=extras)


def left_padded(rows):
    order = torch.argsort(rows.attention_mask.long(), dim=-1, stable=True)
    extras = {
        name: value.gather(1, order) if getattr(value, "ndim", 0) == 2 else value for name, value in rows.extras.items()
    }
    moved = [x.gather(1, order) for x in (rows.ids, rows.attention_mask, rows.response_mask)]
    return Tokens(*moved, rows.group, extras)


def rewritten(batch, change):
    """The batch with other Tokens."""
    return change(batch) if isinstance(batch, Tokens) else replace(batch, tokens=change(batch.tokens))


def trained_of(models, method):
    named = [(role, name, p) for role in method.trains for name, p in getattr(models, role).named_parameters()]
    return {f"{role}.{name}": p for role, name, p in named if p.requires_grad}


def means_and_gradient(method, models, batch, max_tokens=10**9):
    """Every average that the loop would log, and the gradient of the average loss; one way of cutting the batch."""
    with torch.no_grad():
        batch = method.prepare(models, batch)
    sums = dict(getattr(batch, "metrics", {}))
    for micro in microbatches(batch, max_tokens):
        for name, mean in method.loss(models, micro).items():
            sums[name] = sums[name] + mean if name in sums else mean
    parameters = trained_of(models, method)
    average = sums["loss"].total / sums["loss"].count
    grads = torch.autograd.grad(average, list(parameters.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }
    return {name: mean.item() for name, mean in sums.items()}, found


class Samples:
    """What ``Rollout`` does, without sampling: the prompts' groups of a fixed batch."""

    def __init__(self, batch):
        self.batch, self.parts = batch, groups(batch)

    def __call__(self, items, *seed, progress=None):
        return self.batch.select(torch.cat([self.parts[i] for i in items]))

    def texts(self, rows, numbers):
        return [{"prompt": "", "response": str(rows.ids[i].tolist())} for i in numbers]


def run_of(method, models, folder, batch=None, validation=(), **settings):
    """A run over the groups of one batch, two at a time."""
    source = Samples(batch_for(method) if batch is None else batch)
    defaults = {"learning_rate": 1e-2, "max_steps": 3, "batch_size": 2, "eval_every": 0, "save_every": 0}
    sampled = method.reads == "prompts"
    return Run(
        folder=folder,
        method=method,
        models=models,
        settings=TrainingSettings(**defaults | settings),
        items=range(4),
        validation=validation,
        collate=None if sampled else source,
        rollout=source if sampled else None,
    )


def weights_of(models):
    """A copy of every role's weights."""
    return {
        f"{f.name}.{name}": copy.deepcopy(value)
        for f in fields(models)
        if is_dataclass(models) and isinstance(getattr(models, f.name), torch.nn.Module)
        for name, value in getattr(models, f.name).state_dict().items()
    }
