"""Noise Contrastive Alignment on pairs -- Chen et al. 2024, arXiv:2402.05369.

    L = -E [ log sigmoid( beta h_w ) + 1/2 log sigmoid( -beta h_w ) + 1/2 log sigmoid( -beta h_l ) ]
    h = log pi(y|x)/pi_ref(y|x)

Each response is told from one of the reference by itself, so that absolute likelihoods are held, not only differences:
the chosen one does not fall as it may with DPO.

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: the loss on explicit rewards of K responses; soft labels and margins (refused).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from palate.methods.dpo import check_positive, log_ratios, pair_metrics, pair_weight, refuse_facts, with_reference
from palate.types import Comparisons, Mean, Models


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """One loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0.
    """
    w, r = beta * chosen, beta * rejected
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-r)


@dataclass(frozen=True)
class NCA:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
    """

    beta: float = 0.1

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin", "probability")

    def __post_init__(self) -> None:
        check_positive("nca", beta=self.beta)

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("nca", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)
        loss = nca_loss(log_ratio[batch.chosen], log_ratio[batch.rejected], self.beta)
        return {"loss": Mean.of(loss, pair_weight(batch))} | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        return {"loss": 2 * math.log(2), "reward/margin": 0.0}


METHOD = NCA
