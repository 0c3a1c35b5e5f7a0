"""Direct Preference Optimization -- Rafailov et al. 2023, arXiv:2305.18290.

    L = -E_(x, y_w, y_l) log sigmoid( beta * [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ] )     (eq. 7)

The policy is its own reward model: r(x, y) = beta log pi(y|x)/pi_ref(y|x), up to a term of x alone that cancels in a
pair. On comparisons that follow Bradley-Terry with reward r the fixed point is pi_ref exp(r / beta) / Z, as PPO's is.

    label smoothing (cDPO)   -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)         Mitchell 2023, eq. 3
    soft labels              -p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d)         p = P(y_w is preferred)
    anchor                   + anchor * ( -log pi(y_w|x) / |y_w| )                         Pang et al. 2024, arXiv:2404.19733

Roles: policy (trained), reference (frozen). Data: comparisons. No sampling.
Left out: margins; a pair that has one is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError, DataError
from palate.methods.reward import reward_accuracy
from palate.models.forward import response_logprobs
from palate.types import Comparisons, Judgements, Mean, Models, Rankings, Tokens

B = TypeVar("B", Comparisons, Rankings, Judgements)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0, probability: Tensor | float = 1.0
) -> Tensor:
    """Eq. 7, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        beta: how dearly leaving the reference is paid for; > 0. The paper uses 0.1 (0.5 for summaries).
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    p = (1 - label_smoothing) * probability + label_smoothing * (1 - probability)
    return expected_loss(lambda d: -F.logsigmoid(beta * d), chosen - rejected, p)


def expected_loss(loss: Callable[[Tensor], Tensor], lead: Tensor, probability: Tensor | float) -> Tensor:
    """p loss(d) + (1 - p) loss(-d): the loss of a pair whose label is right with probability p, [P]."""
    return probability * loss(lead) + (1 - probability) * loss(-lead)


@dataclass(frozen=True)
class DPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        label_smoothing: assumed share of flipped labels (cDPO), in [0, 0.5).
        anchor: weight of the chosen response's negative log-likelihood a token, >= 0; 0.2 to 1 where chosen responses
            lose probability.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    anchor: float = 0.0

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "comparisons"
    asks_reference = "rows"
    refuses = ("margin",)

    def __post_init__(self) -> None:
        check_positive("dpo", beta=self.beta)
        if not 0 <= self.label_smoothing < 0.5 or not 0 <= self.anchor < math.inf:
            raise ConfigError(
                f"dpo: label_smoothing = {self.label_smoothing!r}, anchor = {self.anchor!r}; "
                "expected label_smoothing in [0, 0.5) and anchor >= 0."
            )

    def prepare(self, models: Models, batch: Comparisons) -> Comparisons:
        """Reference log-probs of every row, once."""
        refuse_facts("dpo", batch, self.refuses)
        return with_reference(models, batch)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """Weighted mean over pairs."""
        logprobs, log_ratio = log_ratios(models, batch)  # [N] each
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]  # [P]
        probability = 1.0 if batch.probability is None else batch.probability
        loss = dpo_loss(chosen, rejected, self.beta, self.label_smoothing, probability)
        total = loss
        if self.anchor:
            total = loss - self.anchor * (logprobs / response_lengths(batch.tokens))[batch.chosen]
        weight = pair_weight(batch)
        return {
            "loss": Mean.of(total, weight),
            "loss/preference": Mean.of(loss.detach(), weight),
        } | pair_metrics(self.beta * log_ratio, logprobs, batch)

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights every log-ratio is 0 and the loss that of a coin."""
        return {"loss/preference": math.log(2), "reward/margin": 0.0}


# --- what the methods on pairs share ------------------------------------------------------------------------------


def with_reference(models: Models, batch: B) -> B:
    """The batch with the reference's summed log-probs of every row, [N]; they may have been computed before training."""
    if batch.reference_logprobs is not None:
        return batch
    assert models.reference is not None
    return replace(batch, reference_logprobs=response_logprobs(models.reference, batch.tokens))


def log_ratios(models: Models, batch: Comparisons | Rankings | Judgements) -> tuple[Tensor, Tensor]:
    """(log pi(y|x), log pi(y|x)/pi_ref(y|x)) of every row, summed over the response; [N] each, nats."""
    assert models.policy is not None and batch.reference_logprobs is not None
    logprobs = response_logprobs(models.policy, batch.tokens)
    return logprobs, logprobs - batch.reference_logprobs


def response_lengths(tokens: Tokens) -> Tensor:
    """Response tokens of every row, at least 1, [N]: what a mean over tokens divides by."""
    return tokens.response_mask.sum(-1).clamp(min=1)


def pair_weight(batch: Comparisons) -> Tensor:
    """The pairs' weights, [P]; 0 where a side has no response token, for then nothing is compared."""
    answered = batch.tokens.response_mask.any(-1)
    both = answered[batch.chosen] & answered[batch.rejected]
    return both.float() if batch.weight is None else torch.where(both, batch.weight, 0)


def refuse_facts(method: str, batch: Comparisons, facts: tuple[str, ...]) -> None:
    """Raises: DataError when a pair has a fact ("margin", "probability") for which the method's loss has no place."""
    margin, probability = batch.margin, batch.probability
    found = {
        "margin": margin is not None and bool((margin != 0).any()),
        "probability": probability is not None and bool((probability != 1).any()),
    }
    for fact in facts:
        if found[fact]:
            raise DataError(
                f'{method}: the comparisons have a "{fact}", and {method} has no place for it. Remove that field from '
                f"the records, or take a method that uses it: {_USES[fact]}."
            )


_USES = {"margin": "reward", "probability": "dpo, robust_dpo, ipo, slic, simpo or reward"}


def check_positive(method: str, **settings: float) -> None:
    """Raises: ConfigError for a setting that is not a finite number above 0."""
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{method}: {name} = {value!r}, expected a number above 0.")


def pair_metrics(rewards: Tensor, logprobs: Tensor, batch: Comparisons) -> dict[str, Mean]:
    """What every method on pairs reports.

    Args:
        rewards: implicit rewards of the rows, [N]; of a method without a reference: its score of a row.
        logprobs: of the policy, summed, [N], nats. Chosen ones that fall are likelihood displacement.

    Lengths too; and of a reward against a reference, which begins at 0, how far it goes by length.
    """
    rewards, logprobs, weight = rewards.detach(), logprobs.detach(), pair_weight(batch)
    chosen, rejected = rewards[batch.chosen], rewards[batch.rejected]
    lead = chosen - rejected
    # Right is to agree with the likelier side, which below 1/2 is the "rejected" one.
    agrees = lead if batch.probability is None else torch.where(batch.probability < 0.5, -lead, lead)
    lengths = batch.tokens.response_mask.sum(-1).to(rewards.dtype)
    metrics = {
        "reward/chosen": Mean.of(chosen, weight),
        "reward/rejected": Mean.of(rejected, weight),
        "reward/margin": Mean.of(lead, weight),
        "reward/accuracy": Mean.of(reward_accuracy(agrees), weight),
        "logprob/chosen": Mean.of(logprobs[batch.chosen], weight),
        "logprob/rejected": Mean.of(logprobs[batch.rejected], weight),
        "length/chosen": Mean.of(lengths[batch.chosen], weight),
        "length/rejected": Mean.of(lengths[batch.rejected], weight),
    }
    return metrics if batch.reference_logprobs is None else metrics | _length_metrics(lead, lengths, batch, weight)


def _length_metrics(lead: Tensor, lengths: Tensor, batch: Comparisons, weight: Tensor) -> dict[str, Mean]:
    """How far the reward goes by length, and how far the labels do; over the pairs whose sides differ in length.

    The slope is that of least squares within pairs, sum(w dr dl) / sum(w dl^2), in reward units a token.
    """
    longer = lengths[batch.chosen] - lengths[batch.rejected]  # [P], tokens
    preferred = torch.ones_like(longer) if batch.probability is None else batch.probability.to(longer.dtype)
    unlike = torch.where(longer != 0, weight, 0)
    return {
        "reward/length_slope": Mean(
            (torch.where(weight != 0, lead * longer, 0) * weight).sum(), (longer**2 * weight).sum()
        ),
        "reward/longer": Mean.of(reward_accuracy(torch.where(longer > 0, lead, -lead)), unlike),
        "length/longer_preferred": Mean.of(torch.where(longer > 0, preferred, 1 - preferred), unlike),
    }


METHOD = DPO
