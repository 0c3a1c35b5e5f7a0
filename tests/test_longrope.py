"""Models that turn a row by other angles once it is long (LongRoPE): sampled as they are trained, or not at all."""

import json

import pytest
import torch

import palate
from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.records import Prompt
from palate.environment import Environment
from palate.errors import DataError
from palate.generation.sampler import sample
from palate.generation.settings import SamplingSettings
from palate.generation.stream import stream
from palate.models.forward import token_logprobs
from palate.models.save import save_model
from palate.training.environments import Conversations
from tiny import longrope, tiny, tokenizer_of

TURNING = 12


def drawn(model, lengths, new, **more):
    prompts = [[4 + (7 * p + i) % 16 for i in range(length)] for p, length in enumerate(lengths)]
    options = {"stop_token_ids": [], "generator": torch.Generator().manual_seed(0), "samples_per_prompt": 2} | more
    return sample(model, prompts, SamplingSettings(max_new_tokens=new), **options)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
@pytest.mark.parametrize("lengths", [(2, 5, 8), (13, 17, 20), (2, 13, 8, 20)], ids=["short", "long", "both"])
def test_the_sampler_says_the_trainers_log_probs(architecture, lengths):
    """Rows that reach the length, rows that begin above it, and both in one call, where company would show."""
    model = longrope(architecture, TURNING)
    tokens = drawn(model, lengths, 4)
    mask, said = tokens.response_mask, tokens.extras["sampler_logprobs"]
    with torch.no_grad():
        assert torch.allclose(said[mask], token_logprobs(model, tokens)[mask], atol=1e-5)


def test_it_matters():
    """The other angles are far from rounding: a row of 12 tokens, alone and beside one of 13."""
    model = longrope("llama", TURNING)
    ids = torch.randint(4, 20, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, beside = model(ids[:1, :12]).logits[0], model(ids).logits[0, :12]
    assert (alone.log_softmax(-1) - beside.log_softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("length", "new", "more"),
    [(9, 4, {}), (12, 1, {}), (1, 60, {}), (9, 8, {"max_length": 13})],
)
def test_a_row_that_may_cross_is_refused_before_anything_is_drawn(length, new, more):
    longest, beside = (13, 2) if more else (length + new, 13)
    found = rf"prompt 1 has {length} tokens, .* may have {longest}: .* rows of more than 12 tokens .*LongRoPE.*data.max_length to 12, lower sampling.max_new_tokens"
    with pytest.raises(DataError, match=found):
        drawn(longrope("llama", TURNING), (beside, length), new, **more)


@pytest.mark.parametrize("length", [8, 13])
def test_a_row_that_cannot_cross_is_not(length):
    model = longrope("llama", TURNING)
    assert len(drawn(model, (length,), 4)) == 2
    assert len(drawn(model, (length,), 9, max_length=TURNING if length < TURNING else None)) == 2
    assert len(drawn(tiny(), (9,), 8)) == 2


def test_the_other_models_length_counts_too():
    with pytest.raises(DataError, match="more than 12 tokens"):
        drawn(tiny(), (9,), 4, other=longrope("llama", TURNING), mixture=0.5)


def test_a_stream_refuses_too():
    with pytest.raises(DataError, match="more than 12 tokens"):
        next(
            stream(
                longrope("llama", TURNING),
                [4] * 9,
                SamplingSettings(max_new_tokens=4),
                stop_token_ids=[],
                generator=torch.Generator(),
            )
        )


def test_a_conversation_refuses_what_may_become_longer():
    """Its first turns would be drawn by the one set of angles, and its later ones by the other."""
    chat = Chat(tokenizer_of())
    items, _ = encode_records([Prompt("a b", {}, "line 1")], "prompts", chat, max_length=24)
    given = {"policy": longrope("llama", TURNING), "chat": chat, "sampling": SamplingSettings(max_new_tokens=2)}
    given |= {"environment": Environment(lambda *_, **__: None, "m:f"), "max_turns": 3}
    with pytest.raises(DataError, match="line 1.*may have 64: .* rows of more than 12 tokens"):
        Conversations(**given)(items, 0)
    Conversations(**given, max_length=TURNING).check_angles(items)


@pytest.mark.parametrize("fits", [True, False])
def test_a_run_refuses_before_its_first_step(fits, tmp_path, monkeypatch):
    """The long prompt would come in a later batch, or be held out."""
    tokenizer = tokenizer_of()
    save_model(longrope("llama", TURNING), tokenizer, tmp_path / "base")
    prompts = ["a b", "c d", "e f", "g h i j k l m n"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    (tmp_path / "lengths_taste.py").write_text("def few(prompts, responses):\n    return [len(r) for r in responses]\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def run():
        palate.train(
            "rloo",
            model=tmp_path / "base",
            reward="lengths_taste:few",
            data={"train": tmp_path / "prompts.jsonl", "max_length": 12 if fits else 20},
            out=tmp_path / "run",
            sampling={"max_new_tokens": 4 if fits else 6},
            training={"batch_size": 1, "max_steps": 1},
            quiet=True,
        )

    if fits:
        run()
        return
    with pytest.raises(DataError, match=r"prompts.jsonl:4: .*LongRoPE"):
        run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
