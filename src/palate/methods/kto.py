"""Kahneman-Tversky Optimization -- Ethayarajh et al. 2024, arXiv:2402.01306.

    L   = E_(x, y) [ w_y - v(x, y) ]                                                                    (eq. 8)
    v   = w_D sigmoid( beta (h - z0) )      y desirable
          w_U sigmoid( beta (z0 - h) )      y undesirable

    h   = log pi(y|x)/pi_ref(y|x)
    z0  = max( 0, mean_i log pi(y_{i+1}|x_i)/pi_ref(y_{i+1}|x_i) ),   a bare estimate of KL(pi, pi_ref); no gradient

Every response is judged on its own. z0 is taken over the whole batch with the policy as it is, on prompts with the
response to another prompt, and summed over tokens. The loss saturates: where desirable outweighs undesirable a response
gains, else its probability goes to 0; the fixed point is not pi_ref exp(r / beta) / Z.

Roles: policy (trained), reference (frozen). Data: judgements. No sampling.
Left out: the variant without a reference; comparisons, unless split into one judgement a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palate.errors import DataError
from palate.methods.dpo import check_positive, log_ratios, with_reference
from palate.methods.reward import reward_accuracy
from palate.models.forward import context_length, response_logprobs
from palate.types import Judgements, Mean, Models, Tokens, groups


def kto_loss(
    log_ratio: Tensor,
    kl: Tensor | float,
    desirable: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Eq. 8, one loss per response, [N]; between 0 and the weight.

    Args:
        log_ratio: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [N].
        kl: z0 >= 0, nats, without gradient; [N] or one number.
        desirable: bool [N].
        beta: how fast the value saturates; > 0. The paper uses 0.1.
        desirable_weight, undesirable_weight: > 0.
    """
    gain = desirable_weight * (1 - torch.sigmoid(beta * (log_ratio - kl)))
    loss = undesirable_weight * (1 - torch.sigmoid(beta * (kl - log_ratio)))
    return torch.where(desirable, gain, loss)


def mismatched(tokens: Tokens, longest: int | None = None) -> Tokens:
    """Every response after the prompt of the group before its own (of the last group, for the first); right-padded.

    With one response a prompt these are the paper's pairs (x_i, y_{i+1}).

    Args:
        tokens: rows, each of which fits.
        longest: tokens of a row at most; a prompt that is too long for another's response loses its beginning.
    """
    parts = groups(tokens)
    before = {int(tokens.group[rows[0]]): parts[i - 1][0] for i, rows in enumerate(parts)}
    begun = tokens.response_mask.cumsum(-1) > 0  # [N, T]: from the first response token on
    is_prompt, is_response = tokens.attention_mask & ~begun, tokens.attention_mask & begun
    ids, answers, group = [], [], []
    for row in range(len(tokens)):
        donor = before[int(tokens.group[row])]
        prompt, answer = tokens.ids[donor][is_prompt[donor]], is_response[row]
        if longest is not None:
            prompt = prompt[-max(1, longest - int(answer.sum())) :]
        ids.append(torch.cat([prompt, tokens.ids[row][answer]]))
        answers.append(torch.cat([torch.zeros_like(prompt, dtype=torch.bool), tokens.response_mask[row][answer]]))
        group.append(tokens.group[donor])
    real = [torch.ones_like(mask) for mask in answers]
    padded = [pad_sequence(rows, batch_first=True) for rows in (ids, real, answers)]  # type: ignore[no-untyped-call, unused-ignore]
    return Tokens(padded[0], padded[1], padded[2], torch.stack(group))


@dataclass(frozen=True)
class KTO:
    """Settings.

    Attributes:
        beta: how fast the value saturates, > 0; 0.01 to 0.5.
        desirable_weight: of desirable responses, > 0. Where the classes are of unlike size, choose the two weights so that
            desirable_weight * n_desirable / (undesirable_weight * n_undesirable) is from 1 to about 4/3.
        undesirable_weight: of undesirable responses, > 0.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    needs = ("policy", "reference")
    trains = ("policy",)
    reads = "judgements"
    asks_reference = "rows and more"

    def __post_init__(self) -> None:
        weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        check_positive("kto", beta=self.beta, **weights)

    def prepare(self, models: Models, batch: Judgements) -> Judgements:
        """Reference log-probs of every row, and z0 of the whole batch.

        Raises:
            DataError: all rows answer one prompt, so that no response can be put after another's.
        """
        assert models.policy is not None and models.reference is not None
        if len(groups(batch)) < 2:
            raise DataError(
                "kto: a batch with a single prompt; its KL estimate needs the response to another. "
                "Set training.batch_size to 2 or more, and give as many prompts to train and to validate on."
            )
        others = mismatched(batch.tokens, context_length(models.policy))
        ratio = response_logprobs(models.policy, others) - response_logprobs(models.reference, others)  # [N]
        estimate = Mean.of(ratio, others.response_mask.any(-1))
        kl = (estimate.total / estimate.count.clamp(min=1)).clamp(min=0).detach()
        metrics = {"kl/mismatched": Mean(kl * estimate.count, estimate.count)}
        return replace(with_reference(models, batch), kl=kl.expand(len(batch)).clone(), metrics=metrics)

    def loss(self, models: Models, batch: Judgements) -> dict[str, Mean]:
        """Mean over responses."""
        assert batch.kl is not None
        logprobs, log_ratio = log_ratios(models, batch)
        desirable, weights = batch.desirable, (self.desirable_weight, self.undesirable_weight)
        loss = kto_loss(log_ratio, batch.kl, desirable, self.beta, *weights)
        answered = batch.tokens.response_mask.any(-1)
        good, bad = answered & desirable, answered & ~desirable
        reward, logprobs = self.beta * log_ratio.detach(), logprobs.detach()
        lead = torch.where(desirable, 1, -1) * (reward - self.beta * batch.kl)
        return {
            "loss": Mean.of(loss, answered),
            "reward/desirable": Mean.of(reward, good),
            "reward/undesirable": Mean.of(reward, bad),
            "reward/accuracy": Mean.of(reward_accuracy(lead), answered),
            "logprob/desirable": Mean.of(logprobs, good),
            "logprob/undesirable": Mean.of(logprobs, bad),
        }

    def at_reference(self) -> dict[str, float]:
        """While policy and reference are the same weights."""
        loss = (
            {"loss": self.desirable_weight / 2} if math.isclose(self.desirable_weight, self.undesirable_weight) else {}
        )
        return {"reward/desirable": 0.0, "reward/undesirable": 0.0} | loss


METHOD = KTO
