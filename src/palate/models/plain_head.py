"""What makes logits of a language model's states, as a function that never holds all of them.

A head that does more than is known of here is found out by trying; ``forward.py`` then asks the whole model.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.functional.logprobs import logprobs_and_entropy


class Head(NamedTuple):
    """What makes logits of states: softcap(scale * h W^T + b)."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def scaled(self, states: Tensor) -> Tensor:
        return states if self.scale == 1.0 else states * self.scale

    def __call__(
        self, states: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        return logprobs_and_entropy(
            self.scaled(states),
            self.weight,
            targets,
            bias=self.bias,
            temperature=temperature,
            softcap=self.softcap,
            with_entropy=with_entropy,
        )


_plain: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def plain_head(model: Any) -> Head | None:
    """The model's own head as a chunked function, or None when it does something that we do not know of.

    Known: a linear layer, Gemma's soft cap, Cohere's and Granite's scale. Whether that is all is found out by trying, once
    a model.
    """
    linear = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(linear) is not nn.Linear:
        return None
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(linear.weight, linear.bias, scale, softcap)
    if model not in _plain:
        _plain[model] = _agrees(model, head)
    return head if _plain[model] else None


@torch.no_grad()
def _agrees(model: Any, head: Head) -> bool:
    """Does ``head`` on the trunk's states give the log-probs of the model's own logits?"""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.get_output_embeddings().weight.shape[0]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    own = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0, :-1]
    ours, _ = head(hidden[0, :-1], ids[0, 1:], 1.0, False)
    tolerance = 1e-3 if hidden.dtype == torch.float32 else 5e-2
    return bool(
        torch.allclose(ours.float(), own.gather(-1, ids[0, 1:, None]).squeeze(-1), atol=tolerance, rtol=tolerance)
    )
