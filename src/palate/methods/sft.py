"""Supervised fine-tuning -- the first stage of Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, section 3.5.

    L = - sum_{b,t} m_bt log pi(y_bt | x_b, y_b,<t) / sum_{b,t} m_bt

The mask m counts the response's tokens, with the token that ends it, and nothing else; the sum below is over the whole
optimizer step, however it was cut into microbatches.

Roles: policy (trained). Data: demonstrations.
Left out: packing several rows into one (rows are unpadded instead), NEFTune.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.models.forward import token_logprobs
from palate.types import Mean, Models, Tokens


def sft_loss(logprobs: Tensor) -> Tensor:
    """Negative log-likelihood of each token, nats; the same shape as ``logprobs``."""
    return -logprobs


@dataclass(frozen=True)
class SFT:
    """Settings: none. The objective has no knob; see ``training`` for the learning rate and epochs."""

    needs = ("policy",)
    trains = ("policy",)
    reads = "demonstrations"

    def prepare(self, models: Models, batch: Tokens) -> Tokens:
        """Nothing: every term of the loss has a gradient."""
        return batch

    def loss(self, models: Models, batch: Tokens) -> dict[str, Mean]:
        """Token mean of the negative log-likelihood over response tokens."""
        assert models.policy is not None
        logprobs = token_logprobs(models.policy, batch)[batch.response_mask]  # [M]
        loss = sft_loss(logprobs)
        count = torch.ones_like(loss)
        return {"loss": Mean.of(loss, count), "logprob/token": Mean.of(logprobs.detach(), count)}


METHOD = SFT
