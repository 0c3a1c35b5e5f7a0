"""Exploratory Preference Optimization (XPO) -- Xie et al. 2024, arXiv:2405.21046; DPO as in Rafailov et al. 2023,
arXiv:2305.18290.

    y ~ pi(.|x),   y' ~ pi_ref(.|x),   no gradient through the sampling                               (algorithm 1)
    L = alpha * log pi(y'|x) - p log sigmoid( beta (h - h') ) - (1 - p) log sigmoid( beta (h' - h) )
    h = log pi(y|x)/pi_ref(y|x)

    labels   soft   p = sigmoid( r(x, y) - r(x, y') )     hard   p = 1 where y scores higher, 1/2 where both are equal

Minimising alpha * log pi(y'|x) takes probability away from what the reference writes, and so is optimistic about all else:
the policy explores. As alpha goes to 0 the fixed point (soft labels) goes to pi_ref exp(r / beta) / Z. With K samples of
each, all K * K pairs are compared, each weighing 1/K^2.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: the pairs of earlier batches (algorithm 1 fits all pairs since the beginning); alpha that falls over a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.functional.pairs import group_shares, labelled, pairs_between
from palate.methods._compared import compared, of_rows, reference_sums
from palate.methods._sampled import check_choice, check_settings, measure, rows_drawn_by
from palate.methods.dpo import DPO, dpo_loss, log_ratios, pair_metrics, pair_weight
from palate.methods.online_dpo import LABELS
from palate.models.forward import response_logprobs
from palate.types import Comparisons, Mean, Models, Tokens


def xpo_loss(
    chosen: Tensor, rejected: Tensor, explored: Tensor, beta: float, alpha: float, probability: Tensor | float = 1.0
) -> Tensor:
    """DPO and the price of writing what the reference writes, one loss per pair, [P].

    Args:
        chosen, rejected: log pi(y|x)/pi_ref(y|x) in nats, summed over response tokens, [P].
        explored: log pi(y'|x) of the pair's response from the reference, nats, [P].
        beta: > 0. alpha: >= 0.
        probability: how surely chosen is preferred, in [0, 1]; [P] or one number.
    """
    return dpo_loss(chosen, rejected, beta, probability=probability) + alpha * explored


@dataclass(frozen=True)
class XPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.05 to 0.5. With soft labels reward units a nat.
        alpha: weight of the optimism, >= 0; 1e-6 to 1e-4. 0 = DPO on a sample of the policy and one of the reference.
        labels: "soft", the probability that the reward gives, or "hard", the higher score is preferred.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution, for the metrics; set from ``sampling.temperature``. The policy that is
            trained is the one at temperature 1.
    """

    beta: float = 0.1
    alpha: float = 1e-5
    labels: str = "soft"
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = ("policy", "reference", "reward")
    trains = ("policy",)
    reads = "prompts"
    drawn_by = ("policy", "reference")
    at_reference = DPO.at_reference  # every log-ratio is 0, whatever the labels

    def __post_init__(self) -> None:
        check_settings("xpo", self)
        check_choice("xpo", "labels", self.labels, LABELS)

    def prepare(self, models: Models, batch: Tokens) -> Comparisons:
        """Scores, a pair for each response of the policy and each of the reference, reference log-probs."""
        assert models.reference is not None
        mine, its = (rows_drawn_by("xpo", batch, who) for who in self.drawn_by)
        first, second = pairs_between(batch.group, mine, its)
        said = compared("xpo", self, models, batch, first, second)
        own = batch.select(mine)
        found = measure(models, own, self.temperature, of_rows(said.scored, mine))
        sums = said.ranked.new_zeros(len(batch), dtype=torch.float32)
        sums[mine] = reference_sums(models, own, found, self.temperature)
        sums[its] = response_logprobs(models.reference, batch.select(its))
        weight = group_shares(batch.group[first])
        metrics = found.metrics | {
            "score/reference": Mean.of(said.scored.scores[its]),
            "preference/reference": Mean.of(said.probability, weight),
        }
        chosen, rejected, sure = labelled(first, second, said.probability, self.labels)
        return Comparisons(batch, chosen, rejected, weight, sure, None, sums, said.scored.scores, metrics=metrics)

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """The mean over prompts of the mean over their pairs."""
        logprobs, log_ratio = log_ratios(models, batch)  # [N] each
        chosen, rejected = log_ratio[batch.chosen], log_ratio[batch.rejected]  # [P]
        whose = torch.tensor([who == "reference" for who in batch.tokens.extras["drawn_by"]], device=logprobs.device)
        explored = logprobs[torch.where(whose[batch.chosen], batch.chosen, batch.rejected)]
        assert batch.probability is not None
        loss = xpo_loss(chosen, rejected, explored, self.beta, self.alpha, batch.probability)
        weight = pair_weight(batch)
        return {
            "loss": Mean.of(loss, weight),
            "loss/preference": Mean.of((loss - self.alpha * explored).detach(), weight),
            "logprob/reference_sample": Mean.of(explored.detach(), weight),
        } | pair_metrics(self.beta * log_ratio, logprobs, batch)


METHOD = XPO
