"""The embedded sampler: responses of a Hugging Face causal language model, with the log-probs they were drawn at.

Each prompt is read once for all its samples; prompts of like length are read together; rows that have stopped leave the
batch, and others take their places; keys and values are written in place. Llama-shaped models on the CPU run in a
step of our own (``flat.py``), all others through their own modules (``plain.py``), one batch after another. Token ids go
in and token ids come out: nothing is decoded and tokenised again.

What holds for random numbers (``uniform.py``): the same generator state, prompts and weights give the same samples, and
the generator moves on by one draw however much is sampled. A sample does not depend on the other rows, on
``max_batch_rows`` or on ``samples_per_prompt`` -- except that matrix products of another shape round otherwise, and now
and then a draw falls between the two results; the row goes another way from there. On a tiny model and 30,000 tokens
that happened in no row in fp32 and in one in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.generation.checks import check_angles, check_request, check_room, context_length, name_prompt
from palate.generation.decode import Batch, Drawn, Rows, decode
from palate.generation.settings import SamplingSettings
from palate.generation.uniform import uniforms
from palate.generation.voices import ready, voices_of
from palate.models.rotary import turning_length
from palate.types import Tokens

__all__ = ["SamplingSettings", "sample"]

_TOGETHER = 8  # rows that begin together where others are on their way
_SHARING = 16  # the same where rows share prompts and none waits: less of them is padding


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    samples_per_prompt: int = 1,
    stop_token_ids: Sequence[int],
    generator: torch.Generator,
    max_batch_rows: int = 64,
    records: Sequence[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    other: nn.Module | None = None,
    mixture: float = 0.0,
    numbers: Sequence[tuple[int, int]] | None = None,
    max_length: int | None = None,
) -> Tokens:
    """Sample ``samples_per_prompt`` responses to each of P prompts.

    The model is used as it is (fp32 or bf16, CPU or CUDA, with or without adapters), in eval mode, and left as it was.
    The cache takes 2 x layers x key-value heads x head size x bytes a number for each row and each token of its prompt
    and ``max_new_tokens``; in the flat step (``flat.py``) a prompt of several samples is held once, in the others each
    row is as wide as its batch's longest prompt. The flat step holds a second copy of the weights while it samples.

    Args:
        model: a causal language model of transformers, a ``PeftModel`` of one, or ``AdapterOff``. Layers that keep a
            recurrent state instead of keys and values (Mamba, linear attention) are refused.
        prompts: token ids, each at least one.
        settings: temperature, top-p, top-k, and how long.
        samples_per_prompt: K >= 1; N = P K rows come back.
        stop_token_ids: tokens that end a response, several allowed; none = every response is ``max_new_tokens`` long.
        generator: where the seed is drawn from; one draw a call, none when ``settings.temperature`` is 0.
        max_batch_rows: rows sampled at once, >= 1; more is faster and takes more memory. In the flat step others take
            the places of those that end, else a batch ends with its longest row. K above it is cut in parts, each of
            which reads the prompt again.
        records: one fact for each prompt, handed on in ``extras["records"]``; its ``source``, if any, is named in
            errors.
        progress: called with (rows done, N) whenever rows end.
        other: a second such model of the same vocabulary, with a cache of its own.
        mixture: its share b in [0, 1]: tokens are drawn from model^(1-b) other^b, normalised at every token
            (``voices.py``), and ``sampler_logprobs`` are the mixture's. 0 runs the model alone, 1 the other alone.
        numbers: of each prompt, the (prompt, sample) number that its random numbers are a function of, so that a sample
            goes on as it would in other company; None = (0, 0), (1, 0), ...
        max_length: tokens of prompt and response together, where that is less than the model's context.

    Returns:
        Rows ordered by prompt, then sample, right-padded with id 0, on the model's device; ``group`` is the prompt's
        number. ``response_mask`` is True for drawn tokens, the stop token included. ``extras``: ``finished`` bool [N],
        the row ended with a stop token (False: it was cut at ``max_new_tokens`` or at the end of the model's context);
        ``sampler_logprobs`` float32 [N, T], log-softmax(logits / temperature) in nats before top-p, top-k and
        ``min_new_tokens`` (temperature 0: of the logits as they are), 0 outside the response; ``records``, if given.

    Raises:
        ConfigError: K, ``max_batch_rows``, ``mixture`` or a stop token is out of range, or ``records`` is not one for
            each prompt.
        DataError: a prompt is empty, holds an id outside the vocabulary, leaves no room in the model's context, or may grow
            to where LongRoPE turns rows otherwise.
        ModelError: a model has layers that the cache cannot serve, its logits are NaN, or vocabularies differ.
    """
    voices = voices_of(model, other, mixture)
    context = min(context_length(voice.model) for voice in voices)
    context = context if max_length is None else min(context, max_length)
    for voice in voices:
        check_request(voice.model, prompts, samples_per_prompt, stop_token_ids, max_batch_rows, records)
    check_room(prompts, context, records)
    check_angles([voice.model for voice in voices], prompts, settings.max_new_tokens, context, records)
    device, rows = next(voices[0].model.parameters()).device, len(prompts) * samples_per_prompt
    place = torch.tensor(numbers or [(p, 0) for p in range(len(prompts))], device=device)
    seed = _seed(generator) if settings.temperature else 0
    stop = torch.tensor(sorted(set(stop_token_ids)), dtype=torch.long, device=device)
    ended = 0

    def count(more: int) -> None:
        nonlocal ended
        ended += more
        if progress is not None:
            progress(ended, rows)

    before = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long, device=device)
    limit = (context - before).clamp(max=settings.max_new_tokens)
    longest = int((before + limit).max()) if rows else 0

    def uniform(row: torch.Tensor) -> torch.Tensor:
        prompt, number = row // samples_per_prompt, row % samples_per_prompt
        return uniforms(seed, place[prompt, 0], place[prompt, 1] + number, int(limit.max()))

    facts = Rows(uniform, *(each.repeat_interleave(samples_per_prompt) for each in (limit, before)))
    # no_grad, not inference_mode: whatever a model keeps of a forward must stay usable in training.
    with torch.no_grad(), ready(voices, device, min(rows, max_batch_rows), longest) as steps:
        together = max_batch_rows
        if all(each.refills for each in steps):
            few = _SHARING if 1 < samples_per_prompt and rows <= max_batch_rows else _TOGETHER
            together = min(together, max(few, samples_per_prompt, max_batch_rows // _TOGETHER))
        turns = [turning_length(voice.model) for voice in voices]
        batches = _batches(prompts, samples_per_prompt, together, device, turns)
        drawn = decode(voices, steps, batches, facts, settings, stop=stop, max_rows=max_batch_rows, ended=count)
    return _tokens(prompts, samples_per_prompt, drawn, device, records)


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))


def _batches(
    prompts: Sequence[Sequence[int]], copies: int, max_rows: int, device: torch.device, turns: Sequence[float]
) -> Iterator[Batch]:
    """Every row once: prompts of like length together, a prompt's samples together if they fit.

    No batch holds rows on both sides of a length in ``turns``: a model's rotary angles are those of a batch's longest row.
    """
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    sides = [list(side) for _, side in groupby(by_length, lambda p: sum(len(prompts[p]) > turn for turn in turns))]
    for first in range(0, copies, max_rows):
        samples = torch.arange(first, min(first + max_rows, copies), device=device)
        at_once = max_rows // len(samples)
        for side in sides:
            for start in range(0, len(side), at_once):
                some = side[start : start + at_once]
                rows = torch.tensor(some, device=device)[:, None] * copies + samples
                yield Batch([prompts[p] for p in some], rows.flatten())


def _tokens(
    prompts: Sequence[Sequence[int]],
    copies: int,
    drawn: Drawn,
    device: torch.device,
    records: Sequence[Any] | None,
) -> Tokens:
    """Prompts and responses as right-padded rows; refuses responses drawn from NaN."""
    drawn = Drawn(*(each.cpu() for each in (drawn.ids, drawn.logprobs, drawn.length, drawn.finished)))
    drawn_mask = torch.arange(drawn.ids.shape[1]) < drawn.length[:, None]
    broken = (drawn.logprobs.isnan() & drawn_mask).any(-1).nonzero()[:, 0].tolist()
    if broken:
        raise ModelError(
            f"the model's logits are NaN for {len(broken)} of {len(drawn.ids)} samples, first for "
            f"{name_prompt(broken[0] // copies, records)}. Its weights are NaN or infinite, or overflow in its dtype: "
            "load an earlier checkpoint, or use float32 or bfloat16."
        )
    before = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.long).repeat_interleave(copies)[:, None]
    after = before + drawn.length[:, None]
    column = torch.arange(int(after.max()) if len(after) else 0)
    attention_mask, response_mask = column < after, (column >= before) & (column < after)
    ids = torch.zeros(attention_mask.shape, dtype=torch.long)
    ids[column < before] = torch.tensor(
        [t for prompt in prompts for _ in range(copies) for t in prompt], dtype=torch.long
    )
    ids[response_mask] = drawn.ids[drawn_mask]
    logprobs = torch.zeros(ids.shape)
    logprobs[response_mask] = drawn.logprobs[drawn_mask]
    extras: dict[str, Any] = {"finished": drawn.finished.to(device), "sampler_logprobs": logprobs.to(device)}
    if records is not None:
        extras["records"] = [record for record in records for _ in range(copies)]
    return Tokens(
        ids.to(device),
        attention_mask.to(device),
        response_mask.to(device),
        torch.arange(len(prompts), device=device).repeat_interleave(copies),
        extras,
    )
