"""A model's rows through its own modules, one batch after another: right for every model, adapter and device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from palate.errors import ModelError

if TYPE_CHECKING:
    from palate.generation.cache import RowCache
    from palate.generation.voices import Voice

# Prompt tokens of one forward, padding included. A CPU gains nothing from more and loses by the padding.
_PROMPT_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 8192}


class PlainSteps:
    """Rows of one voice that are being sampled; see ``decode.Steps``."""

    refills = False  # all rows write into the same column, so they begin together

    def __init__(self, voice: Voice) -> None:
        self.voice = voice

    def read(self, prompts: Sequence[Sequence[int]], copies: int, steps: int) -> Tensor:
        from palate.generation.cache import RowCache  # imports transformers

        device = next(self.voice.model.parameters()).device
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(length.max())
        self.cache = RowCache(
            rows=len(prompts) * copies,
            columns=width + steps,
            copies=copies,
            width=width,
            values_upright=self.voice.values_upright,
        )
        self.forward = forward_of(self.voice, self.cache)
        # Without padding no mask is needed, and attention is faster.
        self.mask: Tensor | None = None
        if int(length.min()) < width:
            self.mask = _left_mask(length.repeat_interleave(copies), width, width + steps)
        return self._read_prompts(prompts, device)

    def _read_prompts(self, prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
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
            self.cache.read_prompts(first, last)
            logits.append(self.forward(ids, (mask.cumsum(-1) - 1).clamp_(min=0), mask))
            first = last
        return torch.cat(logits)

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        self.cache.read_tokens(len(tokens))
        return self.forward(tokens[:, None], position[:, None], self.mask)

    def drop(self, done: Tensor) -> Tensor:
        left = self.cache.drop(done)
        self.mask = None if self.mask is None else self.mask[left]
        return left


def _left_mask(length: Tensor, width: int, columns: int) -> Tensor:
    """True from the column where a row's prompt begins; bool [R, columns]."""
    return torch.arange(columns, device=length.device) >= width - length[:, None]


def forward_of(voice: Voice, cache: RowCache) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
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
