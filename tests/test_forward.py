"""The forward room: however rows are padded, ordered, cut or batched, the numbers are those of each row alone."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from palate.functional import logprobs as functional
from palate.models import forward
from palate.models.forward import (
    response_logprobs,
    response_scores,
    score_responses,
    token_logprobs,
    token_logprobs_and_entropy,
    token_values,
)
from palate.models.roles import AdapterOff
from palate.types import Comparisons, Mean, Scored, Tokens, microbatches
from tiny import tiny, trained

ARCHITECTURES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {},
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 1.5, "attn_logit_softcapping": 2.0, "sliding_window": 3},
    "mistral": {"sliding_window": 4},
}
WIDTH, VOCABULARY = 11, 20
LENGTHS, PROMPTS, GROUPS = (11, 4, 7, 7, 2, 9), (3, 2, 5, 1, 1, 4), (0, 0, 1, 2, 2, 3)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request):
    return tiny(request.param, **ARCHITECTURES[request.param])


def scalar_of(policy, **config):
    """A reward or value model with the policy's trunk and a random head."""
    given = {k: v for k, v in policy.config.to_dict().items() if k not in ("id2label", "label2id")}
    settings = type(policy.config).from_dict(given | {"num_labels": 1, "pad_token_id": None})
    model = AutoModelForSequenceClassification.from_config(settings).float().eval()
    model.base_model.load_state_dict(policy.base_model.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def batch(seed=0):
    """Rows of many lengths; the fifth has a single response token; the last one's response ends before its row does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(LENGTHS), WIDTH), generator=generator)
    place, length, prompt = torch.arange(WIDTH), torch.tensor(LENGTHS)[:, None], torch.tensor(PROMPTS)[:, None]
    real = place < length
    response = real & (place >= prompt)
    response[5, 8] = False
    return Tokens(ids * real, real, response, torch.tensor(GROUPS))


def alone(tokens, row):
    """Ids and response mask of one row without padding."""
    real = tokens.attention_mask[row]
    return tokens.ids[row][real][None], tokens.response_mask[row][real]


def slow_logprobs(model, tokens, temperature=1.0):
    """The model's own logits of every row alone: lists of log-probs and entropies of its response tokens."""
    logprobs, entropies = [], []
    for row in range(len(tokens)):
        ids, response = alone(tokens, row)
        logp = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        where = response.nonzero()[:, 0]
        logprobs.append(logp[where - 1, ids[0, where]])
        entropies.append(-(logp.exp() * logp).sum(-1)[where - 1])
    return torch.cat(logprobs), torch.cat(entropies)


def repadded(tokens, left, right, junk):
    """The same rows with more padding on both sides, and junk ids in every padded slot."""
    n, width = tokens.ids.shape

    def pad(values, fill):
        out = torch.full((n, left + width + right), fill, dtype=values.dtype)
        out[:, left : left + width] = values
        return out

    mask = pad(tokens.attention_mask, False)
    ids = torch.where(mask, pad(tokens.ids, 0), junk)
    return replace(tokens, ids=ids, attention_mask=mask, response_mask=pad(tokens.response_mask, False))


def left_padded(tokens, junk=7):
    """Every row's real tokens at its end."""
    order = torch.argsort(tokens.attention_mask.long(), dim=-1, stable=True)
    real = tokens.attention_mask.gather(1, order)
    ids = torch.where(real, tokens.ids.gather(1, order), junk)
    return replace(tokens, ids=ids, attention_mask=real, response_mask=tokens.response_mask.gather(1, order))


VARIANTS = {
    "more right padding": lambda t: repadded(t, 0, 5, 0),
    "left padding": left_padded,
    "both sides, ids out of the vocabulary": lambda t: repadded(t, 3, 2, 10**9),
    "both sides, negative ids": lambda t: repadded(t, 1, 4, -100),
    "padding that looks like the end of text": lambda t: repadded(t, 2, 2, 2),
}


def near(a, b, tolerance=2e-5):
    return torch.allclose(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def same_gradients(a, b, tolerance=5e-5):
    return all(near(a[name], b[name], tolerance * max(1.0, b[name].abs().max().item())) for name in b)


def weighted(values, mask):
    """A loss in which every response token has another weight, in order of rows and positions."""
    picked = values[mask]
    return (picked * torch.linspace(0.5, 1.5, len(picked))).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_are_those_of_the_models_own_logits(policy, temperature):
    tokens = batch()
    with torch.no_grad():
        logprobs, entropies = token_logprobs_and_entropy(policy, tokens, temperature=temperature)
        wanted = slow_logprobs(policy, tokens, temperature)
        assert near(token_logprobs(policy, tokens, temperature=temperature), logprobs)
    mask = tokens.response_mask
    assert logprobs.shape == entropies.shape == mask.shape and logprobs.dtype == torch.float32
    assert near(logprobs[mask], wanted[0]) and near(entropies[mask], wanted[1])
    assert (logprobs[~mask] == 0).all() and (entropies[~mask] == 0).all() and (logprobs[:, 0] == 0).all()


def test_gradients_are_those_of_the_models_own_logits(policy):
    tokens = batch()
    logprobs, entropies = token_logprobs_and_entropy(policy, tokens)
    mask = tokens.response_mask
    ours = gradients(policy, weighted(logprobs, mask) + weighted(entropies, mask))
    slow_logp, slow_entropy = slow_logprobs(policy, tokens)
    weight = torch.linspace(0.5, 1.5, len(slow_logp))
    assert same_gradients(ours, gradients(policy, (slow_logp * weight).sum() + (slow_entropy * weight).sum()))


def test_the_known_heads_are_run_in_chunks_and_not_through_all_logits(policy, monkeypatch):
    def refuse(*_):
        raise AssertionError("the model's own logits were asked for")

    with torch.no_grad():
        token_logprobs(policy, batch())  # which once checks the head
        monkeypatch.setattr(forward, "_whole_model", refuse)
        token_logprobs(policy, batch())


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_neither_logprobs_nor_gradients(policy, variant):
    tokens = batch()
    padded = VARIANTS[variant](tokens)
    found = []
    for rows in (tokens, padded):
        logprobs, entropies = token_logprobs_and_entropy(policy, rows)
        mask = rows.response_mask
        loss = weighted(logprobs, mask) + weighted(entropies, mask)
        found.append((logprobs[mask], entropies[mask], response_logprobs(policy, rows), gradients(policy, loss)))
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        assert near(a, b)
    assert same_gradients(found[1][3], found[0][3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_neither_values_nor_scores_nor_their_gradients(policy, variant):
    model, tokens = scalar_of(policy), batch()
    found = []
    for rows in (tokens, VARIANTS[variant](tokens)):
        values, scores = token_values(model, rows), response_scores(model, rows)
        loss = weighted(values, rows.response_mask) + (scores * torch.arange(6.0)).sum()
        found.append((values[rows.response_mask], scores, gradients(model, loss)))
    assert near(found[0][0], found[1][0]) and near(found[0][1], found[1][1])
    assert same_gradients(found[1][2], found[0][2])


@pytest.mark.parametrize("bucket", [1, 12, 30, 10**6])
def test_bucket_size_changes_nothing(policy, bucket, monkeypatch):
    tokens, model = batch(), scalar_of(policy)

    def everything():
        logprobs = token_logprobs(policy, tokens)
        values = token_values(model, tokens)
        return (
            logprobs,
            values,
            response_scores(model, tokens),
            gradients(policy, weighted(logprobs, tokens.response_mask)),
        )

    wanted = everything()
    monkeypatch.setitem(forward.BUCKET_TOKENS, "cpu", bucket)
    monkeypatch.setattr(functional, "CHUNK_ELEMENTS", bucket)
    found = everything()
    assert all(near(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))
    assert same_gradients(found[3], wanted[3])


def test_row_order_and_company_change_nothing(policy):
    tokens, model = batch(), scalar_of(policy)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        for function in (token_logprobs, token_values):
            role = policy if function is token_logprobs else model
            whole = function(role, tokens)
            assert near(function(role, tokens.select(order)), whole[order])
            for row in range(6):
                single = tokens.select(torch.tensor([row]))
                assert single.ids.shape[1] == LENGTHS[row]
                assert near(function(role, single)[0], whole[row, : LENGTHS[row]])
        scores = response_scores(model, tokens)
        assert near(response_scores(model, tokens.select(order)), scores[order])
        assert near(torch.cat([response_scores(model, tokens.select(torch.tensor([r]))) for r in range(6)]), scores)


@pytest.mark.parametrize("prepare", [lambda t: t, left_padded, VARIANTS["both sides, negative ids"]])
@pytest.mark.parametrize("budget", [1, 15, 20, 10**6])
def test_microbatches_change_neither_average_nor_gradient(policy, budget, prepare):
    """Whole groups, each once, and the sum over parts is the whole; also for rows that are padded on the left."""
    tokens = prepare(replace(batch(), extras={"number": torch.arange(6), "names": list("abcdef")}))
    whole = Mean.of(token_logprobs(policy, tokens), tokens.response_mask)
    total, seen = None, []
    for part in microbatches(tokens, budget):
        seen.append(part)
        mean = Mean.of(token_logprobs(policy, part), part.response_mask)
        total = mean if total is None else total + mean
    assert near(total.total, whole.total) and total.count == whole.count
    assert same_gradients(gradients(policy, total.total), gradients(policy, whole.total))
    assert sorted(torch.cat([part.extras["number"] for part in seen]).tolist()) == list(range(6))
    for part in seen:
        numbers = part.extras["number"].tolist()
        assert part.extras["names"] == ["abcdef"[i] for i in numbers]
        assert [GROUPS[i] for i in numbers] == part.group.tolist()
        assert {i for i in range(6) if GROUPS[i] in set(part.group.tolist())} == set(numbers)
        fits = int(part.attention_mask.sum()) <= budget
        assert fits or len(part.group.unique()) == 1


def test_pairs_follow_their_rows_when_a_batch_is_cut():
    tokens = batch()
    pairs = Comparisons(
        tokens,
        chosen=torch.tensor([1, 3]),
        rejected=torch.tensor([0, 4]),
        weight=torch.tensor([0.5, 2.0]),
        margin=torch.tensor([1.0, 3.0]),
        reference_logprobs=torch.arange(6.0),
    )
    part = pairs.select(torch.tensor([5, 4, 3]))
    assert (part.chosen.tolist(), part.rejected.tolist()) == ([2], [1])
    assert (part.weight.tolist(), part.margin.tolist(), part.reference_logprobs.tolist()) == ([2.0], [3.0], [5, 4, 3])
    assert part.probability is None
    for budget in (1, 20, 10**6):
        parts = list(microbatches(pairs, budget))
        assert sum(len(part.chosen) for part in parts) == 2
        assert sum(float(part.weight.sum()) for part in parts) == 2.5


@pytest.mark.parametrize("with_shared", ["nothing", "part of the prompt", "the prompt", "prompt and first words"])
def test_what_the_rows_of_a_group_share_changes_nothing(policy, with_shared):
    """One group of five rows with a common beginning, or each row a group of its own: same numbers, same gradients."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (5, WIDTH), generator=generator)
    shared = {"nothing": 0, "part of the prompt": 2, "the prompt": 4, "prompt and first words": 7}[with_shared]
    ids[:, :shared] = ids[0, :shared]
    place, length = torch.arange(WIDTH), torch.tensor([11, 5, 8, 8, 10])[:, None]
    real = place < length
    together = Tokens(ids * real, real, real & (place >= 4), torch.zeros(5, dtype=torch.int64))
    apart, model, found = replace(together, group=torch.arange(5)), scalar_of(policy), []
    for rows in (together, apart):
        mask = rows.response_mask
        logprobs, entropies = token_logprobs_and_entropy(policy, rows)
        values, scores = token_values(model, rows), response_scores(model, rows)
        loss = weighted(logprobs, mask) + weighted(entropies, mask)
        score_loss = weighted(values, mask) + (scores * torch.arange(5.0)).sum()
        found.append((logprobs, entropies, values, scores, gradients(policy, loss), gradients(model, score_loss)))
    wanted = slow_logprobs(policy, together)
    assert near(found[0][0][together.response_mask], wanted[0]) and near(found[0][1][together.response_mask], wanted[1])
    for a, b in zip(found[0][:4], found[1][:4], strict=True):
        assert near(a, b)
    assert same_gradients(found[0][4], found[1][4]) and same_gradients(found[0][5], found[1][5])


def test_scores_and_values_are_read_at_the_right_token(policy):
    """The score at the last response token, the value one token before the token that it is the value for."""
    tokens, model = batch(), scalar_of(policy)
    with torch.no_grad():
        values, scores = token_values(model, tokens), response_scores(model, tokens)
        for row in range(6):
            ids, response = alone(tokens, row)
            every = model.score(model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]
            where = response.nonzero()[:, 0]
            assert near(scores[row], every[where[-1]])
            assert near(values[row][tokens.response_mask[row]], every[where - 1])
            if response[-1]:
                assert near(scores[row], model(input_ids=ids).logits[0, 0])
    assert values.shape == tokens.ids.shape and scores.shape == (6,)
    assert (values[~tokens.response_mask] == 0).all()


def test_normalisation_is_subtract_mean_and_divide_by_std(policy):
    plain, normalised, tokens = scalar_of(policy), scalar_of(policy, score_mean=0.75, score_std=2.0), batch()
    with torch.no_grad():
        assert near(response_scores(normalised, tokens), (response_scores(plain, tokens) - 0.75) / 2)
        mask = tokens.response_mask
        assert near(token_values(normalised, tokens)[mask], (token_values(plain, tokens)[mask] - 0.75) / 2)
        found = score_responses(normalised, tokens)
    assert found.parts == {} and near(found.scores, response_scores(normalised, tokens))


def test_a_reward_that_is_no_model_is_called():
    tokens, scored = batch(), Scored(torch.arange(6.0), {"length": torch.ones(6)})
    assert score_responses(lambda given: scored if given is tokens else None, tokens) is scored


def adapted(policy):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapter_off_is_the_model_without_its_adapter(architecture):
    tokens = batch()
    with torch.no_grad():
        before = token_logprobs(tiny(architecture), tokens)
        lora = trained(adapted(tiny(architecture)))
        on = token_logprobs(lora, tokens)
        off = token_logprobs(AdapterOff(lora), tokens)
        again = token_logprobs(lora, tokens)
    assert near(off, before, 1e-6) and torch.equal(on, again)
    assert (on - off).abs().max() > 1e-2
    wanted, _ = slow_logprobs(lora, tokens)
    assert near(on[tokens.response_mask], wanted)


def test_a_head_that_does_something_unknown_is_taken_from_the_model_itself():
    tokens = batch()
    scaled = tiny("llama")
    scaled.lm_head.register_forward_hook(lambda module, given, logits: 3 * logits + torch.arange(VOCABULARY) / 10)
    subclassed = tiny("llama")
    subclassed.lm_head.__class__ = type("Linear", (torch.nn.Linear,), {"forward": lambda s, x: -(x @ s.weight.T)})
    for model in (scaled, subclassed):
        logprobs, entropies = token_logprobs_and_entropy(model, tokens, temperature=0.5)
        wanted = slow_logprobs(model, tokens, 0.5)
        mask = tokens.response_mask
        assert near(logprobs[mask], wanted[0]) and near(entropies[mask], wanted[1])
        assert same_gradients(gradients(model, logprobs.sum()), gradients(model, wanted[0].sum()))


def test_rows_without_a_response_give_zeros_and_no_gradient(policy):
    tokens, model = batch(), scalar_of(policy)
    empty = replace(tokens, response_mask=torch.zeros_like(tokens.response_mask))
    one = tokens.response_mask.clone()
    one[1] = False
    logprobs = token_logprobs(policy, empty)
    assert (
        (logprobs == 0).all() and (token_values(model, empty) == 0).all() and (response_scores(model, empty) == 0).all()
    )
    logprobs.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in policy.parameters())
    policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        some = token_logprobs(policy, replace(tokens, response_mask=one))
        assert near(some[2:], token_logprobs(policy, tokens)[2:]) and (some[1] == 0).all()


def test_a_response_at_the_first_token_is_refused(policy):
    tokens = batch()
    mask = tokens.response_mask.clone()
    mask[0, 0] = True
    with pytest.raises(AssertionError, match="begins with a response token"):
        token_logprobs(policy, replace(tokens, response_mask=mask))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_give_the_same_numbers_within_their_rounding(dtype):
    tokens, exact = batch(), tiny("llama")
    model = tiny("llama").to(dtype)
    scalar, exact_scalar = scalar_of(exact).to(dtype), scalar_of(exact)
    scalar.score.float() if dtype == torch.bfloat16 else None
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    with torch.no_grad():
        logprobs, entropies = token_logprobs_and_entropy(model, tokens)
        wanted = token_logprobs_and_entropy(exact, tokens)
        assert logprobs.dtype == entropies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert near(logprobs, wanted[0], tolerance) and near(entropies, wanted[1], tolerance)
        assert near(response_scores(scalar, tokens), response_scores(exact_scalar, tokens), 3 * tolerance)
        assert near(token_values(scalar, tokens), token_values(exact_scalar, tokens), 3 * tolerance)


def test_bf16_products_over_float32_weights():
    tokens, exact, mixed = batch(), tiny("llama"), tiny("llama")
    mixed.compute_dtype = torch.bfloat16
    with torch.no_grad():
        difference = (token_logprobs(mixed, tokens) - token_logprobs(exact, tokens)).abs().max()
    assert 0 < difference < 0.1
    token_logprobs(mixed, tokens).sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixed.parameters())
