"""A reward model that reads text, because its tokenizer is not the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from palate.errors import ModelError
from palate.models.checks import context_length
from palate.models.forward import response_scores
from palate.models.heads import base_of
from palate.models.samples import Sample, finite, read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


class TextRewardModel:
    """A reward model with another tokenizer than the policy's, smaller or larger: it reads text under its own template.

    Args:
        where: folder or hub name of a scalar model (``load_scalar``).
        chat: the policy's, to decode with.
        own_chat: the reward model's; made from its folder by default.
    Attributes:
        truncated: rows that were longer than the model's context so far; the prompt's beginning was cut.
    """

    def __init__(
        self,
        where: str,
        chat: Chat,
        *,
        own_chat: Chat | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        name: str = "reward",
    ) -> None:
        from palate.models.load import load_scalar, load_tokenizer

        tokenizer = load_tokenizer(where) if own_chat is None else own_chat.tokenizer
        self.model = load_scalar(
            where, dtype=dtype, device=device, trainable=False, tokenizer=tokenizer, new_head=False
        )
        if own_chat is None:
            from palate.data.chat import Chat as MakeChat

            own_chat = MakeChat(tokenizer, stop_token_ids=base_of(self.model).config.eos_token_id)
        self.chat, self.own_chat, self.name = chat, own_chat, name
        self.max_length = context_length(self.model, tokenizer)
        self.truncated = 0

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N], normalised as the reward model is. A response that was cut off is read without an end of text.

        Raises:
            ModelError: a score is NaN or Inf, or a response is empty in the model's own tokens; the sample is shown.
        """
        samples = read_samples(tokens, self.chat)
        if not samples:
            return Scored(tokens.ids.new_zeros(0, dtype=torch.float32), {})
        device = next(self.model.parameters()).device
        scores = response_scores(self.model, _pack([self._encode(s) for s in samples], device)).cpu()
        return Scored(finite(scores, samples, self.name).to(tokens.ids.device), {})

    def _encode(self, sample: Sample) -> tuple[list[int], list[bool]]:
        ids, mask = self.own_chat.encode(sample.prompt, sample.response)
        ids, mask = list(ids), list(mask)
        if not sample.finished:
            while len(ids) > 1 and mask[-1] and ids[-1] in self.own_chat.stop_token_ids:
                ids.pop()
                mask.pop()
        if len(ids) > self.max_length:
            self.truncated += 1
            ids, mask = ids[-self.max_length :], mask[-self.max_length :]
            mask[0] = False  # nothing stands before it
        if not any(mask):
            raise ModelError(f'reward "{self.name}" has nothing to read in this response.{sample.show()}')
        return ids, mask


def _pack(rows: Sequence[tuple[list[int], list[bool]]], device: torch.device) -> Tokens:
    """Right-padded rows, each its own group; masks come from lengths."""
    width = max(len(ids) for ids, _ in rows)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    response = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in rows])
    attention = torch.arange(width) < lengths[:, None]
    return Tokens(ids.to(device), attention.to(device), response.to(device), torch.arange(len(rows), device=device))
