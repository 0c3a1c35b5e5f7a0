"""One batch of rows: read every prompt once, then token by token until each row has stopped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.errors import ModelError
from palate.generation.draw import draw
from palate.generation.settings import SamplingSettings
from palate.generation.voices import Voice, mixed

if TYPE_CHECKING:
    from palate.generation.cache import RowCache

# Prompt tokens of one forward, padding included. A CPU gains nothing from more and loses by the padding.
_PROMPT_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Drawn:
    """What was sampled, row by row: prompt by prompt, its K samples next to each other.

    Attributes:
        ids: int64 [R, S]; right of a row's length: junk.
        logprobs: float32 [R, S], nats; see ``draw``.
        length: int64 [R], tokens drawn, stop token included.
        finished: bool [R], the last one is a stop token.
    """

    ids: Tensor
    logprobs: Tensor
    length: Tensor
    finished: Tensor

    @classmethod
    def empty(cls, rows: int, steps: int, device: torch.device | str = "cpu") -> Drawn:
        return cls(
            torch.zeros(rows, steps, dtype=torch.long, device=device),
            torch.zeros(rows, steps, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def put(self, rows: Tensor, drawn: Drawn) -> None:
        """Write another's rows into these; S may be smaller there."""
        rows, steps = rows.to(self.ids.device), drawn.ids.shape[1]
        self.ids[rows, :steps] = drawn.ids.to(self.ids.device)
        self.logprobs[rows, :steps] = drawn.logprobs.to(self.ids.device)
        self.length[rows] = drawn.length.to(self.ids.device)
        self.finished[rows] = drawn.finished.to(self.ids.device)


def decode(
    voices: Sequence[Voice],
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    copies: int,
    uniform: Tensor,
    stop: Tensor,
    limit: Tensor,
    ended: Callable[[int], None],
) -> Drawn:
    """Sample ``copies`` responses to each prompt. To be called under ``torch.no_grad`` with the models in eval mode.

    Args:
        voices: the models whose distribution is drawn from; each has a cache of its own.
        prompts: P token lists, the shortest first (for prompts of like length are read together).
        copies: K; R = P K rows.
        uniform: float64 [R, >= max(limit)], the random numbers of each row and step.
        stop: int64 [any], tokens that end a response.
        limit: int64 [R], tokens that each row may draw, >= 1.
        ended: called with the number of rows that ended, whenever some did.
    """
    from palate.generation.cache import RowCache  # imports transformers

    device, steps = limit.device, int(limit.max())
    length = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(copies)
    width, rows = len(prompts[-1]), len(length)
    size = {"rows": rows, "columns": width + steps, "copies": copies, "width": width}
    caches = [RowCache(**size, values_upright=voice.values_upright) for voice in voices]
    forwards = [_forward(voice, cache) for voice, cache in zip(voices, caches, strict=True)]
    # Without padding no mask is needed, and attention is faster.
    mask = _left_mask(length, width, width + steps) if int(length.min()) < width else None
    read = [_read_prompts(forward, prompts, cache, device) for forward, cache in zip(forwards, caches, strict=True)]
    logits = mixed(voices, read).repeat_interleave(copies, 0)
    drawn, alive = Drawn.empty(rows, steps, device), torch.arange(rows, device=device)
    for step in range(steps):
        forbidden = stop if step < settings.min_new_tokens and len(stop) else None
        tokens, logprobs = draw(logits, uniform[alive, step], settings, forbidden)
        drawn.ids[alive, step], drawn.logprobs[alive, step] = tokens, logprobs
        stopped = torch.isin(tokens, stop)
        done = stopped | (limit[alive] == step + 1)
        if done.any():
            drawn.length[alive[done]], drawn.finished[alive[done]] = step + 1, stopped[done]
            left, *_ = [cache.drop(done) for cache in caches]  # the same of all
            ended(len(alive) - len(left))
            alive, tokens = alive[left], tokens[left]
            mask = None if mask is None else mask[left]
            if not len(left):
                break
        for cache in caches:
            cache.read_tokens(len(alive))
        position = (length[alive] + step)[:, None]
        logits = mixed(voices, [forward(tokens[:, None], position, mask) for forward in forwards])
    return drawn


def _left_mask(length: Tensor, width: int, columns: int) -> Tensor:
    """True from the column where a row's prompt begins; bool [R, columns]."""
    return torch.arange(columns, device=length.device) >= width - length[:, None]


def _read_prompts(forward: Any, prompts: Sequence[Sequence[int]], cache: RowCache, device: torch.device) -> Tensor:
    """Fill the cache; the logits [P, V] of each prompt's next token."""
    logits, first, at_once = [], 0, _PROMPT_TOKENS_AT_ONCE.get(device.type, 8192)
    while first < len(prompts):
        last = first + 1
        while last < len(prompts) and (last + 1 - first) * len(prompts[last]) <= at_once:
            last += 1
        length = torch.tensor([len(prompt) for prompt in prompts[first:last]], device=device)
        width = len(prompts[last - 1])
        mask = _left_mask(length, width, width)
        ids = torch.zeros(mask.shape, dtype=torch.long, device=device)
        ids[mask] = torch.tensor([token for prompt in prompts[first:last] for token in prompt], device=device)
        cache.read_prompts(first, last)
        logits.append(forward(ids, (mask.cumsum(-1) - 1).clamp_(min=0), mask))
        first = last
    return torch.cat(logits)


def _forward(voice: Voice, cache: RowCache) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A function (ids [R, n], positions [R, n], mask [R, all columns] or None) -> logits float32 [R, V]."""
    model = voice.model
    core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]  # a PeftModel hides the signature
    accepted = inspect.signature(core.forward).parameters
    if "past_key_values" not in accepted:
        raise ModelError(
            f"{type(core).__name__} keeps no keys and values (its forward takes no past_key_values), so this sampler "
            "cannot run it. Use a decoder-only attention model."
        )
    fixed: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "return_dict": True}
    if "logits_to_keep" in accepted:
        fixed["logits_to_keep"] = 1

    def forward(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            mask = mask[:, : cache.place.past + ids.shape[1]]
        given = {"position_ids": positions} if "position_ids" in accepted else {}
        with voice.context():
            return model(input_ids=ids, attention_mask=mask, **given, **fixed).logits[:, -1].float()

    return forward
