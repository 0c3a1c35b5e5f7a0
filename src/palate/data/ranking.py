"""From a ranking of K to its pairs, and the split of records by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, TypeVar

from palate.data.kinds import Comparison, PromptText, Ranking, Record, at, prompt_key
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
