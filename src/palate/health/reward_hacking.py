"""Reward hacking: the score rises, and the responses do not get better.

That responses get worse no metric of the trained reward can say. What can be seen: something else that judges them and is not
trained on falls (``over_optimisation``, the one proof), the members of an ensemble disagree, the score leaves the range that
a reward model has seen, or it comes with length. The last three are signs, and samples have to be read.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from palate.health.alarm import SURE, Alarm, Average, History, Line, average, has, since_start
from palate.health.leash import held_loosely, price
from palate.health.rewards import is_learned, says_right_or_wrong, watched

LOST = 1 / 3  # share of what was gained
DISAGREEMENT = 2.0  # times that of the first batch
OUT_OF_RANGE = 5.0  # standard deviations of the first batch's scores, and reward units
LONGER, SHORTER = 1.5, 0.5  # times the first batch's length
TOKENS = 10.0  # and a difference of fewer is none


def over_optimisation(history: History) -> Alarm | None:
    """What the score stands for has fallen from its best, and the score has not.

    It is a part of the reward that is measured and not trained on (its weight is 0). The batches are cut into windows. Alarm: in
    the recent one the part is lower than in its best window, by 3 standard errors and by a third of what it had gained, while the
    score is no lower, and above the first batch's. A part named "gold" raises it as well when it never rose and is lower than
    in the first batch; of another less may be better.

    Gao et al. 2022, arXiv:2210.10760.
    """
    score = since_start(history, "score")
    if score is None or not score.rose:
        return None
    for name in watched(history):
        found = _best(history, f"score/{name}")
        if found is None or not (found.rose or name == "gold"):
            continue
        now = average(history.recent, found.metric)
        lost, gained = found.there.mean - now.mean, found.there.mean - found.first
        if lost <= max(SURE * _error(found.there, now), LOST * gained):
            continue
        if not _lower(found.lines, history.recent, "score"):
            return _over_optimised(history, found, now.mean)
    return None


class _Best(NamedTuple):
    """Where a metric was best: in a window of batches, or in the first batch."""

    metric: str
    lines: Sequence[Line]
    there: Average
    first: float  # in the first batch
    rose: bool  # since then


def _best(history: History, metric: str) -> _Best | None:
    """Before the recent batches; None where the metric is not there, or nothing is before them."""
    change = since_start(history, metric)
    if change is None or not has(history.recent, metric):
        return None
    found = _Best(metric, history.train[:1], Average(change.before, change.noise / SURE), change.before, False)
    for lines, there in history.in_windows(metric):
        if there.mean > found.there.mean:
            rose = there.mean - change.before > SURE * there.error * math.sqrt(1 + len(lines))
            found = _Best(metric, lines, there, change.before, rose)
    return found


def _lower(then: Sequence[Line], now: Sequence[Line], metric: str) -> bool:
    """Has it fallen surely? From one batch only if it is lower at all."""
    old, new = average(then, metric), average(now, metric)
    return new.mean < old.mean - (SURE * _error(old, new) if len(then) > 1 else 0.0)


def _error(one: Average, other: Average) -> float:
    return (one.error**2 + other.error**2) ** 0.5


def _over_optimised(history: History, found: _Best, part: float) -> Alarm:
    best, now = found.lines, history.recent
    scores = average(best, "score").mean, average(now, "score").mean
    where = f"in steps {best[0]['step']}-{best[-1]['step']}" if len(best) > 1 else "in the first batch"
    rose = f"rose from {found.first:.3g} to" if found.rose else "was"
    evidence = (
        f"{found.metric}, which is measured and not trained on, {rose} {found.there.mean:.3g} {where} and is {part:.3g} in the last "
        f"{len(now)} batches, while the score went from {scores[0]:.3g} to {scores[1]:.3g}."
    )
    numbers = {"first": found.first, "best": found.there.mean, "now": part}
    numbers |= {"score_then": scores[0], "score_now": scores[1]}
    causes, remedies = held_loosely(history)
    causes.insert(0, "the policy has learnt what the reward has wrong, and is paid for it")
    remedies.append(f"training.best_metric={found.metric} training.best_is=highest, which keeps the best checkpoint")
    if has([*best, *now], "kl/reference"):
        spent = average(best, "kl/reference").mean
        numbers |= {"kl_then": spent, "kl_now": average(now, "kl/reference").mean}
        evidence += f" Then the policy was {spent:.1f} nats from its reference, now it is {numbers['kl_now']:.1f}."
        if "method.kl_budget" in history.settings and found.rose:
            remedies.insert(1, f"method.kl_budget={spent:.2g}, the KL at which it was best")
    remedies.append("a better reward: fresh comparisons of the policy's own samples, or an ensemble with take: min")
    return Alarm("over_optimisation", history.step, evidence, numbers, causes, remedies)


def ensemble_disagrees(history: History) -> Alarm | None:
    """The policy goes where the members of the reward's ensemble no longer agree, and its score rises there.

    Alarm: the mean of ensemble_std over the recent batches is twice that of the first batch, and the score has risen.

    Coste et al. 2023, arXiv:2310.02743.
    """
    score = since_start(history, "score")
    names = [name for name in history.train[0] if name.endswith("ensemble_std")] if history.train else []
    for name in names:
        spread = since_start(history, name)
        if score is None or spread is None or not (score.rose and spread.rose and spread.before > 0):
            continue
        times = spread.now / spread.before
        if times < DISAGREEMENT:
            continue
        evidence = (
            f"{name} is {spread.now:.3g} reward units in the last {len(history.recent)} batches and was {spread.before:.3g} in the "
            f"first batch ({times:.1f} times; alarm at {DISAGREEMENT:g}), while the score went from {score.before:.3g} to "
            f"{score.now:.3g}."
        )
        causes, remedies = held_loosely(history)
        causes.insert(0, "the responses are unlike all that the reward models were trained on")
        remedies.insert(0, "reward: take: min, or mean_minus_variance")
        remedies.append("fresh comparisons of the policy's own samples, and the reward models trained again")
        numbers = {"first": spread.before, "now": spread.now, "score_first": score.before, "score_now": score.now}
        return Alarm("ensemble_disagrees", history.step, evidence, numbers, causes, remedies)
    return None


def score_out_of_range(history: History) -> Alarm | None:
    """The score of a reward model is far beyond what it gave the responses that it was trained on.

    Alarm: it has risen by more than 5 standard deviations of the first batch's scores, and by more than 5 reward units, which
    in log-odds means that the present responses would be preferred to the first in 99 of 100 cases. Only where a model judges:
    right answers may become as many as they like.
    """
    score = since_start(history, "score")
    if score is None or not score.rose or not is_learned(history) or not has(history.train[:1], "score/std"):
        return None
    std = history.train[0]["score/std"]
    limit = OUT_OF_RANGE * max(1.0, std)
    if score.now - score.before <= limit or says_right_or_wrong(history, history.recent):
        return None
    evidence = (
        f"the score went from {score.before:.3g} to {score.now:.3g} (last {len(history.recent)} batches), where the first batch's "
        f"responses had a standard deviation of {std:.3g} (alarm at a rise of {limit:.3g}): no comparison showed the reward model "
        "such scores."
    )
    causes, remedies = held_loosely(history)
    causes.insert(0, "the policy has learnt what the reward model has wrong, and is paid for it")
    remedies.append(
        "read samples.jsonl; if they are not better, fresh comparisons of them, and the reward model trained again"
    )
    remedies.append("a part named gold with weight 0 in the reward, which says what the score is worth")
    numbers = {"first": score.before, "now": score.now, "std": std, "limit": limit}
    return Alarm("score_out_of_range", history.step, evidence, numbers, causes, remedies)


def length_hacking(history: History) -> Alarm | None:
    """The score rises, and the responses become much longer (or shorter) with it.

    Alarm: the mean length of the recent batches is 1.5 times the first batch's, or half of it, with 10 tokens or more between
    them, and the score has risen. Not where answers are right or wrong, which longer thought may make right; nor where a part
    that is not trained on has risen too. Whether the longer responses are better the metrics cannot say.
    """
    score, length = since_start(history, "score"), since_start(history, "length/response")
    if score is None or length is None or not score.rose or not (length.rose or length.fell):
        return None
    times = length.now / max(1.0, length.before)
    if SHORTER < times < LONGER or abs(length.now - length.before) < TOKENS:
        return None
    if says_right_or_wrong(history, history.recent) or _confirmed(history):
        return None
    slope = (score.now - score.before) / (length.now - length.before)
    which = "longer" if times > 1 else "shorter"
    evidence = (
        f"responses have {length.now:.1f} tokens (last {len(history.recent)} batches) and had {length.before:.1f} in the first batch "
        f"({times:.2f} times; alarm at {LONGER:g} and {SHORTER:g}), while the score went from {score.before:.3g} to {score.now:.3g}: "
        f"{slope:+.2g} reward units a token. The metrics cannot say whether the {which} ones are better: read samples.jsonl."
    )
    causes = [f"the reward goes by length: {which} responses score higher for being {which}"]
    remedies = [f"reward: one more part, {{length: {-slope:.2g}}}: a token pays for what it has gained at most"]
    key = price(history)
    if key is not None:
        value = history.get(key, 0.0)
        causes.append(f"leaving the reference is cheap ({key} = {value:g})")
        remedies.append(f"{key}={max(0.05, 2 * value):g}")
    unfinished = history.seen("length/no_eos")
    charged = "method.missing_eos_penalty"
    if times > 1 and unfinished and average(unfinished, "length/no_eos").mean > 0.1 and not history.get(charged, 1.0):
        causes.append(f"responses that never end are not charged ({charged} = 0)")
        remedies.append("method.missing_eos_penalty=1")
    remedies.append(
        "the reward model trained again on pairs of like length; its evaluation.json says how far it goes by length"
    )
    numbers = {"length_first": length.before, "length_now": length.now, "times": times, "slope": slope}
    return Alarm("length_hacking", history.step, evidence, numbers, causes, remedies)


def _confirmed(history: History) -> bool:
    """Does something that is not trained on say that the responses got better?"""
    changes = [since_start(history, f"score/{name}") for name in watched(history)]
    return any(change is not None and change.rose for change in changes)


RULES = (over_optimisation, ensemble_disagrees, score_out_of_range, length_hacking)
