"""Binary Classifier Optimization -- Jung et al. 2024, arXiv:2404.04656.

    L     = -E_(desirable) log sigmoid( r - delta ) - E_(undesirable) log sigmoid( -(r - delta) )
    r     = beta log pi(y|x)/pi_ref(y|x)
    delta = ( E_(desirable) r + E_(undesirable) r ) / 2,     running means; no gradient

A classifier of good and bad responses whose logit is the implicit reward; its loss is an upper bound of DPO's, and delta
brings the bound close. The classifier's optimum is r - delta = log-odds that y is judged desirable. A policy can be that
only where these rewards make probabilities that add up to 1; elsewhere it is the nearest that do.

delta is state of the run. ``prepare`` takes the rewards of the whole batch with the policy as it is (one more forward pass
without gradient, as every microbatch needs the same delta and none sees all rows), ``adapt`` moves the running mean of each
class, and the next batch is classified with their average. So an evaluation uses what training found and changes nothing.
A class that no batch has had yet is left out of the average.

Here the loss is a mean over responses, whatever their class, as in TRL; the paper adds the two classes' means, which is
the same where both are of one size. TRL's delta is the mean over all responses since the start.

Roles: policy (trained), reference (frozen). Data: judgements. No sampling.
Left out: the paper's importance weights for prompts that are unlike in the two classes (underlying distribution matching).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.errors import ConfigError
from palate.functional.masked import masked_mean
from palate.methods.dpo import check_positive, log_ratios, with_reference
from palate.methods.reward import reward_accuracy
from palate.types import Judgements, Mean, Models


def bco_loss(log_ratio: Tensor, shift: float, desirable: Tensor, beta: float) -> Tensor:
    """-log of the probability that the classifier gives to the judgement, one loss per response, [N].

    Args:
        log_ratio: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [N].
        shift: delta, reward units.
        desirable: bool [N].
        beta: how dearly leaving the reference is paid for; > 0.
    """
    logit = beta * log_ratio - shift
    return -F.logsigmoid(torch.where(desirable, logit, -logit))


def running_mean(old: float | None, values: Tensor, mask: Tensor, decay: float) -> float | None:
    """decay * old + (1 - decay) * mean of the True slots; the mean alone at first, ``old`` where nothing counts."""
    if not mask.any():
        return old
    new = masked_mean(values.double(), mask).item()
    return new if old is None else decay * old + (1 - decay) * new


@dataclass(frozen=True)
class BCO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.01 to 0.5.
        shift_decay: how slowly delta follows the rewards, in [0, 1); 0.9 = about the last ten batches.
        desirable_reward: running mean of desirable responses' rewards; part of the run's state.
        undesirable_reward: running mean of undesirable responses' rewards; part of the run's state.
    """

    beta: float = 0.1
    shift_decay: float = 0.9
    desirable_reward: float | None = None
    undesirable_reward: float | None = None

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "judgements"
    asks_reference = "rows"

    def __post_init__(self) -> None:
        check_positive("bco", beta=self.beta)
        if not 0 <= self.shift_decay < 1:
            raise ConfigError(f"bco: shift_decay = {self.shift_decay!r}, expected a number in [0, 1).")

    @property
    def shift(self) -> float:
        """delta, reward units."""
        known = [mean for mean in (self.desirable_reward, self.undesirable_reward) if mean is not None]
        return sum(known) / len(known) if known else 0.0

    def prepare(self, models: Models, batch: Judgements) -> Judgements:
        """Reference log-probs and implicit rewards of every row of the batch."""
        batch = with_reference(models, batch)
        _, log_ratio = log_ratios(models, batch)
        metrics = {"reward/shift": Mean.of(torch.tensor(self.shift, dtype=torch.float64))}
        return replace(batch, rewards=self.beta * log_ratio.detach(), metrics=metrics)

    def loss(self, models: Models, batch: Judgements) -> dict[str, Mean]:
        """Mean over responses."""
        logprobs, log_ratio = log_ratios(models, batch)
        desirable = batch.desirable
        loss = bco_loss(log_ratio, self.shift, desirable, self.beta)
        answered = batch.tokens.response_mask.any(-1)
        good, bad = answered & desirable, answered & ~desirable
        rewards, logprobs = self.beta * log_ratio.detach(), logprobs.detach()
        lead = torch.where(desirable, 1, -1) * (rewards - self.shift)
        return {
            "loss": Mean.of(loss, answered),
            "reward/desirable": Mean.of(rewards, good),
            "reward/undesirable": Mean.of(rewards, bad),
            "reward/accuracy": Mean.of(reward_accuracy(lead), answered),
            "logprob/desirable": Mean.of(logprobs, good),
            "logprob/undesirable": Mean.of(logprobs, bad),
        }

    def adapt(self, batch: Judgements) -> BCO:
        """The method for the next batch: the running mean of each class has moved."""
        assert batch.rewards is not None
        answered = batch.tokens.response_mask.any(-1)
        return replace(
            self,
            desirable_reward=running_mean(
                self.desirable_reward, batch.rewards, answered & batch.desirable, self.shift_decay
            ),
            undesirable_reward=running_mean(
                self.undesirable_reward, batch.rewards, answered & ~batch.desirable, self.shift_decay
            ),
        )

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights, and delta is still 0."""
        return {"loss": math.log(2), "reward/desirable": 0.0, "reward/undesirable": 0.0}


METHOD = BCO
