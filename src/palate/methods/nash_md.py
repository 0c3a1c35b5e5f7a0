"""Nash-MD with a policy gradient -- Munos et al. 2023 (Nash learning from human feedback), arXiv:2312.00886, section 7.

    y ~ pi(.|x),   y' ~ pi_b(.|x),   no gradient through the sampling
    pi_b(y'_t|s_t) = pi(y'_t|s_t)^(1-b) pi_ref(y'_t|s_t)^b / Z(s_t)                  the mixture, normalised token by token
    R(x, y) = P(y preferred to y'|x) - kl_coef * sum_t [ log pi(y_t|s_t) - log pi_ref(y_t|s_t) ]
    L = - E ( R(x, y_i) - mean of the R of the prompt's other responses ) log pi(y_i|x)

The KL charge belongs to the whole response. Multiplying each token's log-ratio with the same token's log-probability, as
some code does, leaves out what a token does to the KL of later ones, and ends elsewhere.

P is what a reward says that compares, or sigmoid( r(x, y) - r(x, y') ) of one that scores. The fixed point is

    pi proportional to pi_ref exp( P(y preferred to pi_b) / kl_coef ),

with b = 0 the regularised Nash equilibrium: no policy is preferred to it once the KL is paid. With b = 1 it is the best
response to the reference. With K samples of each, P is the mean over the K opponents of the prompt.

Roles: policy (trained), reference (frozen), reward (frozen). Data: prompts.
Left out: the mixture of whole responses (it cannot be sampled token by token), Nash-EMA, several updates a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palate.functional.advantages import leave_one_out
from palate.functional.pairs import pairs_between
from palate.functional.policy_gradient import probability_ratio
from palate.methods._compared import compared, of_rows
from palate.methods._sampled import (
    check_settings,
    measure,
    policy_metrics,
    rows_drawn_by,
    sequence_rewards,
    trajectories,
    with_groups,
)
from palate.methods.reinforce import reinforce_loss
from palate.models.forward import token_logprobs_and_entropy
from palate.models.preferences import mean_of_rows
from palate.types import Mean, Models, Tokens, Trajectories


@dataclass(frozen=True)
class NashMD:
    """Settings.

    Attributes:
        kl_coef: price of leaving the reference, probability per nat, >= 0; 0.005 to 0.2. The paper's tau.
        mixture: b, the reference's share in the opponent, in [0, 1]: 0 = self-play, 1 = the reference itself.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
        temperature: of the sampling distribution; set from ``sampling.temperature``.
    """

    kl_coef: float = 0.05
    mixture: float = 0.125
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    needs = ("policy", "reference", "reward")
    trains = ("policy",)
    reads = "prompts"
    group_size = 4
    drawn_by = ("policy", "mixture")
    first_look = "ratio"

    def __post_init__(self) -> None:
        check_settings("nash_md", self)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """How often each response is preferred, less the KL charge and the others' mean; opponents end here."""
        mine, opponents = (rows_drawn_by("nash_md", batch, who) for who in self.drawn_by)
        first, second = pairs_between(batch.group, mine, opponents)
        said = compared("nash_md", self, models, batch, first, second)
        wins = mean_of_rows(said.probability, first, len(batch))[mine]
        tokens = batch.select(mine)
        found = measure(models, tokens, self.temperature, of_rows(said.scored, mine))
        rewards = sequence_rewards(found, wins, tokens.response_mask, self.kl_coef)
        advantages = leave_one_out(rewards, tokens.group)
        found.metrics["preference/mixture"] = Mean.of(wins)
        return with_groups("nash_md", trajectories(tokens, found, rewards, advantages, self.kl_coef))

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Mean over responses; one without a token weighs nothing."""
        assert models.policy is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens, temperature=self.temperature)
        loss = reinforce_loss(logprobs, batch.advantages, mask)
        ratio = probability_ratio(logprobs, batch.logprobs)
        metrics = policy_metrics(batch, logprobs, entropy, ratio, torch.zeros_like(mask), mask)
        return {"loss": Mean.of(loss, mask.any(-1))} | metrics


METHOD = NashMD
