"""One response, token by token, as it is drawn: for a person who is waiting for it.

The same loop as ``decode`` for a single row, with the same random numbers: what is streamed is what ``sampler.sample``
draws from the same generator state (up to rounding: ``sample`` may use other kernels, see there). Stopping early is
closing the iterator; nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from palate.generation.checks import check_angles, check_request, check_room, context_length
from palate.generation.draw import draw
from palate.generation.plain import forward_of
from palate.generation.sampler import _seed
from palate.generation.settings import SamplingSettings
from palate.generation.uniform import uniforms
from palate.generation.voices import Voice

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


def stream(
    model: nn.Module,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    stop_token_ids: Sequence[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """The tokens of one response to one prompt, each as soon as it is drawn.

    Args:
        model: a causal language model in eval mode; see ``sampler.sample``. One stream at a time.
        prompt: token ids, at least one.
        settings: temperature, top-p, top-k, and how long.
        stop_token_ids: tokens that end a response; the one that does is given too, so a last token that is none of
            them says that the response was cut at ``max_new_tokens`` or at the end of the model's context.
        generator: where the seed is drawn from, at the first token; nothing at temperature 0.

    Raises:
        ConfigError, DataError, ModelError: at the first token, as ``sampler.sample``.
    """
    from palate.generation.cache import RowCache  # imports transformers

    context = context_length(model)
    check_request(model, [prompt], 1, stop_token_ids, 1, None)
    check_room([prompt], context, None)
    check_angles([model], [prompt], settings.max_new_tokens, context, None)
    device = next(model.parameters()).device
    steps, stops = min(settings.max_new_tokens, context - len(prompt)), set(stop_token_ids)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    uniform = uniforms(_seed(generator) if settings.temperature else 0, zero, zero, steps)
    stop = torch.tensor(sorted(stops), dtype=torch.long, device=device)
    cache = RowCache(rows=1, columns=len(prompt) + steps, copies=1, width=len(prompt))
    forward = forward_of(Voice(model), cache)
    cache.read_prompts(0, 1)
    ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
    positions = torch.arange(len(prompt), device=device)[None]
    for step in range(steps):
        with torch.no_grad():  # not around the yield: the caller's own mode is the caller's
            logits = forward(ids, positions, None)
            forbidden = stop if step < settings.min_new_tokens and len(stop) else None
            drawn, _ = draw(logits, uniform[:, step], settings, forbidden)
        token = int(drawn)
        yield token
        if token in stops:
            return
        cache.read_tokens(1)
        ids, positions = drawn[:, None], torch.full((1, 1), len(prompt) + step, device=device)


def pieces(tokens: Iterable[int], text: Callable[[list[int]], str]) -> Iterator[str]:
    """Tokens as pieces of text; joined, they are ``text`` of all the tokens.

    A token may hold a part of a character only (byte-level BPE), and the end of a text may still change (white space
    before a stop token, half a character): such an end is held back until it is settled. Every piece is valid UTF-8.

    Args:
        tokens: e.g. ``stream(...)``.
        text: the text of ids, e.g. ``Chat.text``. It is assumed that a longer list only adds to the text, apart from the
            end that is held back.
    """
    ids: list[int] = []
    given = ""
    for token in tokens:
        ids.append(token)
        settled = text(ids).rstrip(UNFINISHED).rstrip()
        if len(settled) > len(given) and settled.startswith(given):
            yield settled[len(given) :]
            given = settled
    whole = text(ids)
    if len(whole) > len(given) and whole.startswith(given):
        yield whole[len(given) :]
