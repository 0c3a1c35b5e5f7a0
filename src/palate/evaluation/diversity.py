"""How varied texts are: distinct n-grams (Li et al. 2016, arXiv:1510.03055), unique share, self-BLEU (Zhu et al. 2018).

A text is a string (read as lower-case words and punctuation marks) or a sequence of tokens of any kind.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

Text = str | Sequence[Hashable]


def words(text: Text) -> tuple[Hashable, ...]:
    """Lower-case words and single punctuation marks of a string; other sequences as they are.

    >>> words("Try it, don't wait.")
    ('try', 'it', ',', "don't", 'wait', '.')
    """
    if isinstance(text, str):
        return tuple(re.findall(r"\w+(?:'\w+)*|[^\w\s]", text.lower()))
    return tuple(text)


def ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    """All n-grams of a text in order; none when it is shorter than ``n``."""
    w = words(text)
    return [w[i : i + n] for i in range(len(w) - n + 1)]


def distinct(texts: Iterable[Text], n: int = 2) -> float:
    """Different n-grams / all n-grams over all texts together, in [0, 1]; 0 when there are none.

    It falls with the amount of text, so compare equal numbers of responses of like length.

    >>> distinct(["a b a b", "a b"], 2)      # ab, ba, ab, ab -> 2 of 4
    0.5
    """
    counts = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(counts) / counts.total() if counts else 0.0


def distinct_per_prompt(texts: Sequence[Text], prompts: Sequence[Hashable], n: int = 2) -> float:
    """Mean over prompts of ``distinct`` among the responses of that prompt: is one prompt always answered alike?"""
    parts = _by_prompt(texts, prompts)
    return sum(distinct(part, n) for part in parts) / len(parts)


def unique_share(texts: Sequence[Text]) -> float:
    """Different texts / all texts, in (0, 1]; 0 when there are none."""
    return len({words(text) for text in texts}) / len(texts) if texts else 0.0


def self_bleu(texts: Sequence[Text], *, n: int = 4) -> float:
    """Mean BLEU of each text against all the others, in [0, 1]; 1 = all alike. 0 when there are fewer than two.

    BLEU with uniform weights over 1..n-grams, add-one smoothing above unigrams (Lin and Och 2004), brevity penalty
    against the closest length. Quadratic in the number of texts: meant for up to a few hundred.
    """
    if len(texts) < 2:
        return 0.0
    tokens = [words(text) for text in texts]
    return sum(_bleu(t, tokens[:i] + tokens[i + 1 :], n) for i, t in enumerate(tokens)) / len(tokens)


def _bleu(candidate: tuple[Hashable, ...], references: list[tuple[Hashable, ...]], n: int) -> float:
    if not candidate:
        return 0.0
    total = 0.0
    for k in range(1, n + 1):
        have = Counter(ngrams(candidate, k))
        allowed: Counter[tuple[Hashable, ...]] = Counter()
        for reference in references:
            allowed |= Counter(ngrams(reference, k))
        smooth = 0 if k == 1 else 1
        hits = (have & allowed).total() + smooth
        if not hits:
            return 0.0
        total += math.log(hits / (have.total() + smooth)) / n
    closest = min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    return math.exp(total + min(0.0, 1 - closest / len(candidate)))


def _by_prompt(texts: Sequence[Text], prompts: Sequence[Hashable]) -> list[list[Text]]:
    if len(texts) != len(prompts) or not texts:
        raise ValueError(f"{len(texts)} texts, {len(prompts)} prompts: expected as many, and at least one")
    parts: dict[Hashable, list[Text]] = {}
    for text, prompt in zip(texts, prompts, strict=True):
        parts.setdefault(prompt, []).append(text)
    return list(parts.values())
