"""Simulated voters on pairs, good and bad in ways that the annotator model does not assume.

A voter looks at a share of the pairs and clicks through the others. Looking, they see

    x = direction (gold_left - gold_right) / temperature + logistic noise

and say "tie" where |x| < tie_width, else the side that x favours. Clicking through, they take the left with
probability ``click_left``. So a bad annotator here is a *mixture*, where ``annotator_model`` has one logit per vote: what
that model finds in these votes is not put there by its own formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palate.errors import FeedbackError
from palate.feedback.votes import Outcome, Vote


@dataclass(frozen=True)
class Voter:
    """One simulated voter.

    Attributes:
        name: written into the votes.
        temperature: noise of a look, in units of gold, > 0.
        tie_width: of x, >= 0; 0 = never a tie.
        attention: share of pairs looked at, in [0, 1].
        click_left: of those not looked at, the share that goes left, in [0, 1].
        contrary: says the opposite of what is seen.
        seconds: median time of a vote, > 0; times are log-normal with sd 0.5 of the log.
    """

    name: str
    temperature: float = 1.0
    tie_width: float = 0.3
    attention: float = 1.0
    click_left: float = 0.5
    contrary: bool = False
    seconds: float = 30.0

    def __post_init__(self) -> None:
        shares = (self.attention, self.click_left)
        if not (self.temperature > 0 and self.tie_width >= 0 and self.seconds > 0 and all(0 <= s <= 1 for s in shares)):
            raise FeedbackError(f"{self}: expected temperature and seconds > 0, tie_width >= 0 and shares in [0, 1]")


@dataclass(frozen=True)
class SimulatedVotes:
    """Votes on prompts 0 .. P-1 with responses 0 .. K-1, and the gold [P, K] that they are about."""

    votes: list[Vote]
    gold: NDArray[np.float64]


def simulate_votes(
    voters: Sequence[Voter], *, prompts: int, responses: int = 2, votes_per_pair: int = 3, seed: int = 0
) -> SimulatedVotes:
    """Every pair of each prompt's responses, each judged by ``votes_per_pair`` different voters drawn at random.

    Gold is standard normal; sides are random.
    """
    if not 1 <= votes_per_pair <= len(voters) or prompts < 1 or responses < 2:
        raise FeedbackError(
            f"{prompts} prompts of {responses} responses, {votes_per_pair} votes a pair of {len(voters)} voters: "
            "expected one prompt, two responses and as many voters as votes a pair, at least"
        )
    rng = np.random.default_rng(seed)
    gold = rng.normal(size=(prompts, responses))
    votes = []
    for p in range(prompts):
        for i in range(responses):
            for j in range(i):
                for k in rng.permutation(len(voters))[:votes_per_pair]:
                    left, right = (i, j) if rng.random() < 0.5 else (j, i)
                    outcome = _vote(voters[k], gold[p, left] - gold[p, right], rng)
                    seconds = voters[k].seconds * float(np.exp(0.5 * rng.normal()))
                    votes.append(Vote(p, left, right, outcome, voters[k].name, seconds))
    return SimulatedVotes(votes, gold)


def _vote(voter: Voter, difference: float, rng: np.random.Generator) -> Outcome:
    if rng.random() >= voter.attention:
        return "left" if rng.random() < voter.click_left else "right"
    x = (-difference if voter.contrary else difference) / voter.temperature + rng.logistic()
    return "tie" if abs(x) < voter.tie_width else "left" if x > 0 else "right"
