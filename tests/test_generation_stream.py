"""Streaming one response: the tokens are those of ``sample``, the pieces join to its text, stopping leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from palate.errors import DataError
from palate.generation.sampler import SamplingSettings, sample
from palate.generation.stream import pieces, stream
from test_sampler import CONFIGS, PROMPTS, STOP, build


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(model, prompt, settings, seed=0) -> list[int]:
    tokens = sample(model, [prompt], settings, stop_token_ids=STOP, generator=seeded(seed))
    return tokens.ids[0][tokens.response_mask[0]].tolist()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_greedy_stream_is_what_sample_draws(name) -> None:
    """For every kind of attention, also with windows shorter than the prompt."""
    model, settings = build(name), SamplingSettings(max_new_tokens=24, temperature=0)
    for prompt in PROMPTS:
        found = list(stream(model, prompt, settings, stop_token_ids=STOP, generator=seeded()))
        assert found == sampled(model, prompt, settings)


def test_a_drawn_stream_is_what_sample_draws_from_the_same_generator() -> None:
    model, settings = build("llama_gqa"), SamplingSettings(max_new_tokens=24, top_k=7, top_p=0.9, temperature=0.8)
    for seed in range(4):
        found = list(stream(model, PROMPTS[0], settings, stop_token_ids=STOP, generator=seeded(seed)))
        assert found == sampled(model, PROMPTS[0], settings, seed)


def test_it_ends_at_a_stop_token_at_the_limit_and_at_the_end_of_the_context() -> None:
    """The stop token is given and is the last; without one, max_new_tokens, or what is left of 96 tokens of context."""
    model = build("llama")
    greedy = SamplingSettings(max_new_tokens=20, temperature=0)
    free = list(stream(model, [5, 9, 11], greedy, stop_token_ids=[], generator=seeded()))
    assert len(free) == 20
    stop = free[4]
    stopped = list(stream(model, [5, 9, 11], greedy, stop_token_ids=[stop], generator=seeded()))
    assert stopped == free[: free.index(stop) + 1]
    later = SamplingSettings(max_new_tokens=20, min_new_tokens=12, temperature=0)
    kept = list(stream(model, [5, 9, 11], later, stop_token_ids=[stop], generator=seeded()))
    assert len(kept) >= 12 and stop not in kept[:12]
    endless = SamplingSettings(max_new_tokens=500, temperature=0)
    assert len(list(stream(model, [5] * 90, endless, stop_token_ids=[], generator=seeded()))) == 6
    with pytest.raises(DataError, match="no room"):
        next(stream(model, [5] * 96, greedy, stop_token_ids=[], generator=seeded()))


def test_closing_a_stream_ends_it_and_grad_mode_is_the_callers() -> None:
    model, asked = build("llama"), 0

    def count(*_: object) -> None:
        nonlocal asked
        asked += 1

    model.register_forward_hook(count)
    settings = SamplingSettings(max_new_tokens=50, temperature=0)
    opened = stream(model, [5, 9], settings, stop_token_ids=[], generator=seeded())
    next(opened), next(opened)
    assert torch.is_grad_enabled()
    opened.close()
    assert asked == 2 and torch.is_grad_enabled()


# --- pieces of text ----------------------------------------------------------------------------------------------------


def of_bytes(ids: list[int]) -> str:
    """The hardest tokenizer: every token is one byte."""
    return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    "text",
    ["plain words", "日本語と中文", "a👩‍👩‍👧b", "  two  spaces \n\n and lines\t", "é" * 5 + "\n", ""],
    ids=range(6),
)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(text) -> None:
    found = list(pieces(iter(text.encode()), of_bytes))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found) and all(found)
    assert all(piece.encode("utf-8") for piece in found)


def test_bytes_that_are_no_character_come_as_the_decoder_writes_them() -> None:
    for raw in (b"a\xffb", b"a\xe4\xbd", b"\xf0\x9f\x91", b"\xe4\xe4\xbd\xa0"):
        assert "".join(pieces(iter(raw), of_bytes)) == raw.decode("utf-8", errors="replace")


def test_a_piece_comes_as_soon_as_it_is_settled() -> None:
    """ "ab 中": a, b, nothing for the space, nothing for two of three bytes, then both at once."""
    seen: list[tuple[int, str]] = []
    read = 0

    def tokens():
        nonlocal read
        for byte in "ab 中".encode():
            read += 1
            yield byte

    for piece in pieces(tokens(), of_bytes):
        seen.append((read, piece))
    assert seen == [(1, "a"), (2, "b"), (6, " 中")]


def test_pieces_of_a_byte_level_bpe_join_to_the_chats_text() -> None:
    """A real byte-level BPE, trained on one line, and the text of ``Chat`` with its stop token taken away."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from palate.data.chat import Chat

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(["the same words again and again"], trainer)
    chat = Chat(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>"))
    said = " the 中文 👩‍👩‍👧 words, again."
    ids = [*inner.encode(said).ids, inner.token_to_id("</s>")]
    found = list(pieces(iter(ids), chat.text))
    assert "".join(found) == chat.text(ids) and said.strip() in chat.text(ids)
    assert len(found) > 5 and not any("\ufffd" in piece for piece in found)
