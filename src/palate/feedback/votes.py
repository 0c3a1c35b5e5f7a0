"""A vote: one person saw two responses side by side and said which is better, or that neither is.

A ranking of K is not C(K,2) votes. Its pairs follow from one another (a above b and b above c gives a above c), and a
Plackett-Luce ranking is K - 1 choices. So ``ranking_votes`` gives each of the C(K,2) pairs the weight

    (K - 1) / C(K,2) = 2 / K,

and a ranking counts as K - 1 votes in all: point estimates use every pair, standard errors do not pretend to more
evidence than there was. (A composite likelihood; Varin, Reid and Firth 2011, section 4.1 on weights. For training the
same thought gives 1/C(K,2) and one batch element: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

from palate.data.kinds import Ranking, prompt_key
from palate.errors import FeedbackError

Outcome = Literal["left", "right", "tie"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True)
class Vote:
    """One judgement of one pair.

    Attributes:
        prompt: what both responses answer; any hashable key.
        left, right: keys of the two responses, different, as they stood on the screen. A response is known by
            (prompt, key), so keys need to be unique within a prompt only.
        outcome: "left", "right" or "tie".
        annotator: who said so.
        seconds: how long it took, > 0, or None.
        weight: how many independent votes it counts as, in (0, 1]; below 1 for the pairs of a ranking.
        sides_known: False where ``left`` and ``right`` say nothing about the screen; then it is no evidence of a bias
            to one side.
    """

    prompt: Hashable
    left: Hashable
    right: Hashable
    outcome: Outcome
    annotator: str
    seconds: float | None = None
    weight: float = 1.0
    sides_known: bool = True

    def __post_init__(self) -> None:
        where = f"the vote of {self.annotator!r} on {self.prompt!r}"
        if self.left == self.right:
            raise FeedbackError(f"{where} compares {self.left!r} with itself. Expected two responses.")
        if self.outcome not in OUTCOMES:
            raise FeedbackError(f"{where} is {self.outcome!r}. Expected {', '.join(map(repr, OUTCOMES))}.")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise FeedbackError(f"{where} took {self.seconds} seconds. Expected a number above 0, or None.")
        if not 0 < self.weight <= 1:
            raise FeedbackError(f"{where} has the weight {self.weight}. Expected a number in (0, 1].")


def ranking_votes(
    prompt: Hashable,
    responses: Sequence[Hashable],
    ranks: Sequence[float],
    annotator: str,
    *,
    seconds: float | None = None,
) -> list[Vote]:
    """All C(K,2) pairs of one ranking, each of weight 2/K; ties stay ties; sides unknown.

    Args:
        responses: [K] different keys, K >= 2.
        ranks: [K], lower = better, equal = tie.
        seconds: for the whole ranking; each pair is given seconds / (K - 1), the time of one choice.

    >>> [(v.left, v.right, v.outcome, round(v.weight, 3)) for v in ranking_votes("p", "abc", (1, 2, 2), "anna")]
    [('a', 'b', 'left', 0.667), ('a', 'c', 'left', 0.667), ('b', 'c', 'tie', 0.667)]
    """
    k = len(responses)
    if len(ranks) != k or k < 2 or len(set(responses)) < k:
        raise FeedbackError(
            f"the ranking of {prompt!r} by {annotator!r}: {len(ranks)} ranks for the responses {list(responses)}. "
            "Expected one rank for each of two or more different responses."
        )
    each = None if seconds is None else seconds / (k - 1)
    votes = []
    for i, j in combinations(range(k), 2):
        outcome: Outcome = "left" if ranks[i] < ranks[j] else "right" if ranks[j] < ranks[i] else "tie"
        votes.append(Vote(prompt, responses[i], responses[j], outcome, annotator, each, 2 / k, sides_known=False))
    return votes


def record_votes(rankings: Sequence[Ranking]) -> list[Vote]:
    """``ranking_votes`` of records; a response's key is its text, a prompt's key ``prompt_key``.

    Equal texts within a record are one response (their ranks must be equal).

    Raises:
        FeedbackError: a record without an annotator, or one whose equal texts have different ranks.
    """
    votes = []
    for record in rankings:
        key = prompt_key(record.prompt)
        if record.annotator is None:
            raise FeedbackError(
                f"{record.source or repr(key)}: no annotator. Name who ranked, e.g. with a file's name."
            )
        ranks: dict[str, int] = {}
        for text, rank in zip(record.responses, record.ranks, strict=True):
            if ranks.setdefault(text, rank) != rank:
                raise FeedbackError(
                    f"{record.source or repr(key)}: the same response at ranks {ranks[text]} and {rank}."
                )
        if len(ranks) > 1:
            votes.extend(ranking_votes(key, list(ranks), list(ranks.values()), record.annotator))
    return votes
