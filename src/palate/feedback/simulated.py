"""Simulated annotators: people whose taste is known, so that what is learnt from them can be checked.

An annotator sees K responses of one prompt in random order and ranks them by a gold preference with noise:

    u_i = gold_i + length_bias * (words of i) + position_bias * [i is shown first]
    P(ranking) = prod_k  exp(u_k / temperature) / sum_{j >= k} exp(u_j / temperature)          (Plackett-Luce)

and, with probability 1 - reliability, without looking: every order equally likely. Between any two of the K this is
Bradley-Terry, sigmoid((u_i - u_j) / temperature): the model that reward modelling assumes, plus the failings of real
annotators, of which length bias is systematic and can therefore be learnt. Because the probability of every label is
known, so is the accuracy that no reward model can exceed (``bayes_accuracy``).

Sources: Plackett 1975; Luce 1959; Ouyang et al. 2022 (arXiv:2203.02155), section 3.4, for rankings of K; reliability
as in Dawid and Skene 1979.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palate.data.records import Prompt, Ranking
from palate.errors import FeedbackError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SimulatedAnnotator:
    """One annotator's character.

    Attributes:
        name: written into the records.
        temperature: noise of a judgement in units of gold, >= 0. 0 = never errs; the difference of gold at which the
            better of two is preferred with probability 0.73 is one temperature.
        reliability: share of tasks done with attention, in [0, 1]; the others are ranked at random.
        length_bias: gold units per word of the response.
        position_bias: gold units given to the response that happens to be shown first.
    """

    name: str = "annotator"
    temperature: float = 1.0
    reliability: float = 1.0
    length_bias: float = 0.0
    position_bias: float = 0.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 <= self.reliability <= 1):
            raise FeedbackError(
                f"annotator {self.name!r}: temperature {self.temperature}, reliability {self.reliability}; "
                "expected temperature >= 0 and reliability in [0, 1]"
            )


def annotate(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    gold: Sequence[Sequence[float]],
    annotators: Sequence[SimulatedAnnotator],
    *,
    seed: int = 0,
    per_prompt: int = 1,
) -> list[Ranking]:
    """Have every prompt's responses ranked; prompts are dealt to annotators in turn.

    What an annotator says of a task depends on the seed, the annotator's name, the prompt and its responses, and on
    nothing else: adding prompts or annotators never changes the other labels.

    Args:
        prompts: [P].
        responses: [P][K], K may differ between prompts; equal responses of a prompt share a rank.
        gold: [P][K], the gold preference of each response.
        annotators: at least ``per_prompt`` of them, with different names.
        seed: of the noise.
        per_prompt: how many annotators rank each prompt.

    Returns:
        [P * per_prompt] rankings, 1 = best, in order of prompts; prompts with fewer than two different responses say
        nothing and are left out.

    Raises:
        FeedbackError: lengths that do not fit, gold that is not finite, too few annotators, or a name used twice.
    """
    _check(prompts, responses, gold, annotators, per_prompt)
    rankings = []
    for i, (prompt, texts, values) in enumerate(zip(prompts, responses, gold, strict=True)):
        if len(set(texts)) < 2:
            continue
        for j in range(per_prompt):
            annotator = annotators[(i * per_prompt + j) % len(annotators)]
            ranks = rank(annotator, values, texts, _generator(seed, annotator.name, prompt.prompt, tuple(texts)))
            rankings.append(Ranking(prompt.prompt, tuple(texts), ranks, annotator=annotator.name))
    return rankings


def rank(
    annotator: SimulatedAnnotator, gold: ArrayLike, responses: Sequence[str], rng: np.random.Generator
) -> tuple[int, ...]:
    """One ranking of K responses: [K], 1 = best; equal responses, and at temperature 0 equal utilities, tie."""
    distinct = list(dict.fromkeys(responses))
    value = dict(zip(responses, np.asarray(gold, dtype=np.float64), strict=True))
    first = distinct[rng.integers(len(distinct))]
    attentive = rng.random() < annotator.reliability
    utility = np.array([value[r] + annotator.length_bias * len(r.split()) for r in distinct])
    utility = utility + annotator.position_bias * np.array([r == first for r in distinct])
    # sorting utility / temperature + Gumbel noise draws from Plackett-Luce (Yellott 1977)
    noise = rng.gumbel(size=len(distinct))
    if not attentive:
        utility = noise
    elif annotator.temperature > 0:
        utility = utility / annotator.temperature + noise
    place = {r: 1 + int((utility > u).sum()) for r, u in zip(distinct, utility, strict=True)}
    return tuple(place[r] for r in responses)


def preference_probability(
    annotator: SimulatedAnnotator,
    gold_difference: ArrayLike,
    word_difference: ArrayLike = 0,
    *,
    shown: ArrayLike = 2,
) -> Floats:
    """Exact probability that the annotator ranks a above b, averaged over the order of presentation.

    Args:
        gold_difference: gold(a) - gold(b), any shape.
        word_difference: words(a) - words(b), the same shape or one number.
        shown: K, how many different responses the annotator saw together; matters for position bias only.
    """
    d = np.asarray(gold_difference, dtype=np.float64) + annotator.length_bias * np.asarray(word_difference)
    k = np.asarray(shown, dtype=np.float64)
    careful = (
        _preferred(d + annotator.position_bias, annotator.temperature)
        + _preferred(d - annotator.position_bias, annotator.temperature)
        + (k - 2) * _preferred(d, annotator.temperature)
    ) / k
    return np.asarray(annotator.reliability * careful + (1 - annotator.reliability) / 2, dtype=np.float64)


def bayes_accuracy(
    gold: Sequence[Sequence[float]],
    responses: Sequence[Sequence[str]],
    annotators: Sequence[SimulatedAnnotator],
) -> float:
    """The held-out accuracy that no reward model can exceed on these prompts' labels, in [0.5, 1].

    Each pair of different responses is labelled by a random one of the annotators; whoever knows every probability
    p = P(a above b), and so every bias, can do no better than to say the likelier side and be right max(p, 1 - p) of
    the time. Mean over all pairs, every pair counting the same. (Exact where labels have no ties, that is for
    temperatures above 0.)

    Raises:
        FeedbackError: no pair of different responses.
    """
    p = _probabilities(_pairs(gold, responses), annotators)
    return float(np.maximum(p, 1 - p).mean())


def gold_accuracy(
    gold: Sequence[Sequence[float]],
    responses: Sequence[Sequence[str]],
    annotators: Sequence[SimulatedAnnotator],
) -> float:
    """How often the gold preference itself agrees with these annotators' labels, ties of gold one half.

    Below ``bayes_accuracy`` exactly by what can be gained from knowing their biases.
    """
    pairs = _pairs(gold, responses)
    return float((0.5 + np.sign(pairs[:, 0]) * (_probabilities(pairs, annotators) - 0.5)).mean())


def _pairs(gold: Sequence[Sequence[float]], responses: Sequence[Sequence[str]]) -> Floats:
    """Gold difference, word difference and K of every pair of different responses, [pairs, 3]."""
    rows = []
    for values, texts in zip(gold, responses, strict=True):
        distinct = dict(zip(texts, values, strict=True))
        for a, b in combinations(distinct, 2):
            rows.append((distinct[a] - distinct[b], len(a.split()) - len(b.split()), len(distinct)))
    if not rows:
        raise FeedbackError("no prompt has two different responses: nothing to compare")
    return np.array(rows, dtype=np.float64)


def _probabilities(pairs: Floats, annotators: Sequence[SimulatedAnnotator]) -> Floats:
    """P(first above second) by a random annotator, [pairs]."""
    return np.asarray(
        np.mean([preference_probability(a, pairs[:, 0], pairs[:, 1], shown=pairs[:, 2]) for a in annotators], axis=0)
    )


def _preferred(difference: Floats, temperature: float) -> Floats:
    """Bradley-Terry, with its limit at temperature 0; written with tanh, which never overflows."""
    if temperature == 0:
        return np.asarray((np.sign(difference) + 1) / 2)
    return np.asarray(0.5 + 0.5 * np.tanh(difference / (2 * temperature)))


def _generator(seed: int, *names: Hashable) -> np.random.Generator:
    """A stream of its own for each task; hashed, because Python's own hash of text changes between processes."""
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _check(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[str]],
    gold: Sequence[Sequence[float]],
    annotators: Sequence[SimulatedAnnotator],
    per_prompt: int,
) -> None:
    names = [a.name for a in annotators]
    if len(set(names)) < len(names) or not 1 <= per_prompt <= len(names):
        raise FeedbackError(
            f"annotators {names}: expected different names, and at least per_prompt = {per_prompt} of them"
        )
    if not len(prompts) == len(responses) == len(gold):
        raise FeedbackError(
            f"{len(prompts)} prompts, {len(responses)} lists of responses, {len(gold)} lists of gold: expected as many"
        )
    for prompt, texts, values in zip(prompts, responses, gold, strict=True):
        if len(texts) != len(values) or not all(math.isfinite(v) for v in values):
            raise FeedbackError(
                f"{prompt.prompt!r}: {len(texts)} responses with gold {list(values)}; expected one number each"
            )
