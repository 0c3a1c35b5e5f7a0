"""From a ranking of K to its pairs or to judgements, from ratings to rankings, and the split of records by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, TypeVar

from palate.data.kinds import Comparison, Judgement, PromptText, Ranking, Record, at, prompt_key
from palate.errors import ConfigError, DataError

R = TypeVar("R", bound=Record)


def ranking_to_comparisons(ranking: Ranking) -> list[Comparison]:
    """All pairs of a ranking of K, at most C(K,2): the better ranked is chosen, ties are left out.

    The pairs of one ranking are strongly correlated, so they belong into one batch element, each with the weight
    1/(number of pairs) (Ouyang et al. 2022, arXiv:2203.02155, section 3.5); ``collate.encode_records`` does that when it
    is given the ranking itself.

    >>> [(c.chosen, c.rejected) for c in ranking_to_comparisons(Ranking("Hi", ("a", "b", "c"), (2, 1, 2)))]
    [('b', 'a'), ('b', 'c')]
    """
    return [
        Comparison(
            ranking.prompt,
            ranking.responses[better],
            ranking.responses[worse],
            annotator=ranking.annotator,
            source=ranking.source,
        )
        for better, worse in ordered_pairs(ranking.ranks)
    ]


def comparison_to_ranking(comparison: Comparison) -> Ranking:
    """A comparison as a ranking of two.

    Raises:
        DataError: it has a margin or a probability, for which a ranking has no place.

    >>> comparison_to_ranking(Comparison("Hi", "a", "b")).ranks
    (1, 2)
    """
    for name in ("margin", "probability"):
        if getattr(comparison, name) is not None:
            message = f'a comparison with a "{name}" cannot be read as a ranking of two, which has no place for it. '
            raise DataError(at(comparison.source, message + 'Train with method "reward", or remove the field.'))
    responses = (comparison.chosen, comparison.rejected)
    return Ranking(comparison.prompt, responses, (1, 2), annotator=comparison.annotator, source=comparison.source)


def ranking_to_judgements(ranking: Ranking, *, top: int = 1, bottom: int = 1) -> list[Judgement]:
    """The best of a ranking as desirable, the worst as undesirable; what stands between is left out.

    The rule: a response is desirable when fewer than ``top`` others are better, undesirable when fewer than ``bottom``
    others are worse; one that is both (all are tied, or K is small) says nothing and is left out. Being best of a poor lot
    makes no response good: of what a rating says this keeps less (see ``ratings_to_judgements``), of what a thumb says
    nothing at all.

    >>> [(j.response, j.desirable) for j in ranking_to_judgements(Ranking("Hi", ("a", "b", "c"), (2, 1, 3)))]
    [('b', True), ('c', False)]
    >>> ranking_to_judgements(Ranking("Hi", ("a", "b"), (1, 1)))
    []

    Raises:
        ConfigError: ``top`` or ``bottom`` below 1.
    """
    if top < 1 or bottom < 1:
        raise ConfigError(f"top is {top}, bottom is {bottom}. Expected whole numbers of at least 1.")
    found = []
    for response, rank in zip(ranking.responses, ranking.ranks, strict=True):
        good = sum(other < rank for other in ranking.ranks) < top
        bad = sum(other > rank for other in ranking.ranks) < bottom
        if good != bad:
            found.append(Judgement(ranking.prompt, response, good, annotator=ranking.annotator, source=ranking.source))
    return found


def comparison_to_judgements(comparison: Comparison) -> list[Judgement]:
    """Chosen as desirable, rejected as undesirable.

    Raises:
        DataError: it has a margin or a probability, for which a judgement has no place.

    >>> [j.desirable for j in comparison_to_judgements(Comparison("Hi", "a", "b"))]
    [True, False]
    """
    for name in ("margin", "probability"):
        if getattr(comparison, name) is not None:
            message = f'a comparison with a "{name}" cannot be read as two judgements, which have no place for it. '
            raise DataError(at(comparison.source, message + "Remove the field, or train on comparisons."))
    who, source = comparison.annotator, comparison.source
    return [
        Judgement(comparison.prompt, text, good, annotator=who, source=source)
        for text, good in ((comparison.chosen, True), (comparison.rejected, False))
    ]


def ratings_to_ranks(ratings: Sequence[float]) -> tuple[int, ...]:
    """Ranks of ratings, the highest first, equal ones tied: 1 + how many are higher.

    >>> ratings_to_ranks([3.0, 5.0, 3.0, 1.0])
    (2, 1, 2, 4)
    """
    return tuple(1 + sum(other > rating for other in ratings) for rating in ratings)


def ordered_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(better, worse) positions of every pair that is not tied."""
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    return [(i, j) for i, j in pairs if ranks[i] != ranks[j]]


def split_by_prompt(
    records: Sequence[R], fraction: float, seed: int = 0, *, by: Literal["prompt", "opening"] = "prompt"
) -> tuple[list[R], list[R]]:
    """Split records so that no prompt stands on both sides.

    Each prompt goes by a hash of its text and the seed: the same prompt always goes to the same side, whatever else is
    in the data. Only when that leaves a side empty does the prompt nearest to the border change sides; a single prompt
    is trained on.

    Args:
        records: of any kind.
        fraction: about which share of the prompts is for validation, in [0, 1); 0 gives an empty validation list.
        seed: another seed, another split.
        by: "prompt", or "opening": a conversation goes by its first user turn alone, so that no part of it stands on
            both sides (HH-RLHF holds several lengths of the same conversation).
    Returns:
        (train, validation), each in the order of ``records``.
    Raises:
        ConfigError: the fraction is not in [0, 1), or ``by`` is unknown.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the validation fraction is {fraction}. Expected a number in [0, 1), e.g. 0.1.")
    if by not in ("prompt", "opening"):
        raise ConfigError(f'records are split by "{by}". Expected "prompt" or "opening".')
    keys = [prompt_key(r.prompt) if by == "prompt" else _opening(r.prompt) for r in records]
    place = {key: _place(key, seed) for key in keys}
    held = {key for key, value in place.items() if value < fraction}
    if len(place) <= 1:  # the only prompt is trained on
        held = set()
    elif fraction > 0:
        if not held:
            held = {min(place, key=lambda key: place[key])}
        elif len(held) == len(place):
            held.discard(max(place, key=lambda key: place[key]))
    train = [record for record, key in zip(records, keys, strict=True) if key not in held]
    return train, [record for record, key in zip(records, keys, strict=True) if key in held]


def _opening(prompt: PromptText) -> str:
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in prompt if turn["role"] == "user"), prompt_key(prompt))


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the text and the seed."""
    digest = hashlib.sha256(f"{seed}:{key.strip()}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
