"""Online DPO (OAIF) -- Guo et al. 2024, arXiv:2402.04792; the loss is that of DPO, Rafailov et al. 2023, arXiv:2305.18290.

    y_1 .. y_K ~ pi(.|x),   no gradient through the sampling
    L = - 1/P sum_pairs [ p_ij log sigmoid( beta (h_i - h_j) ) + (1 - p_ij) log sigmoid( beta (h_j - h_i) ) ]
    h = log pi(y|x)/pi_ref(y|x)

    labels   soft   p_ij = sigmoid( r_i - r_j )         what the reward model, trained by Bradley-Terry, says of the pair
             hard   p_ij = 1 where y_i scores higher, 1/2 where both are equal                               (algorithm 1)
    pairs    all        every pair of the prompt's K responses, each weighing 1/C(K, 2)
             extremes   the best against the worst; prompts whose scores are all equal are left out

With soft labels the fixed point is pi_ref exp(r / beta) / Z whatever pairs are compared, so beta means what kl_coef does
elsewhere. Hard labels do not depend on the unit of the score, and pull further. A reward that compares gives p_ij itself.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: other losses on the same pairs (IPO, SLiC); a language model as annotator.
"""

from __future__ import annotations

from dataclasses import dataclass

from palate.functional.pairs import extremes, group_shares, labelled, pairs_within
from palate.methods._compared import compared, reference_sums, with_pairs_only
from palate.methods._sampled import check_choice, check_settings, group_metrics, measure
from palate.methods.dpo import DPO
from palate.types import Comparisons, Mean, Models, Tokens

LABELS = ("soft", "hard")


@dataclass(frozen=True)
class OnlineDPO:
    """Settings.

    Attributes:
        beta: how dearly leaving the reference is paid for, > 0; 0.05 to 0.5. With soft labels reward units a nat.
        labels: "soft", the probability that the reward gives, or "hard", the higher score is preferred.
        pairs: "all" of the prompt's responses, or "extremes", the best against the worst.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution, for the metrics; set from ``sampling.temperature``. The policy that is
            trained is the one at temperature 1.
    """

    beta: float = 0.1
    labels: str = "soft"
    pairs: str = "all"
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = ("policy", "reference", "reward")
    trains = ("policy",)
    reads = "prompts"
    group_size = 2
    first_look = "pairs"
    at_reference = DPO.at_reference  # every log-ratio is 0, whatever the labels

    def __post_init__(self) -> None:
        check_settings("online_dpo", self)
        check_choice("online_dpo", "labels", self.labels, LABELS)
        check_choice("online_dpo", "pairs", self.pairs, ("all", "extremes"))

    @property
    def off_policy(self) -> str:
        """With soft labels the fixed point is the same whoever drew the pairs; hard ones have no correction."""
        return "nothing" if self.labels == "soft" else ""

    def prepare(self, models: Models, batch: Tokens) -> Comparisons:
        """Scores, pairs with their labels, reference log-probs; rows that are in no pair end here."""
        first, second = pairs_within(batch.group)
        said = compared("online_dpo", self, models, batch, first, second)
        found = measure(models, batch, self.temperature, said.scored)
        metrics = found.metrics | group_metrics("online_dpo", said.ranked, batch.group)
        probability = said.probability
        if self.pairs == "extremes":
            first, second = extremes(said.ranked, batch.group)
            probability = compared("online_dpo", self, models, batch, first, second, said.scored).probability
        chosen, rejected, sure = labelled(first, second, probability, self.labels)
        weight = group_shares(batch.group[chosen])
        sums = reference_sums(models, batch, found, self.temperature)
        return with_pairs_only(
            Comparisons(batch, chosen, rejected, weight, sure, None, sums, found.scores, metrics=metrics)
        )

    def loss(self, models: Models, batch: Comparisons) -> dict[str, Mean]:
        """dpo's: the mean over prompts of the mean over their pairs."""
        return DPO(beta=self.beta).loss(models, batch)


METHOD = OnlineDPO
