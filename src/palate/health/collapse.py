"""What becomes of the responses' variety: all alike, pure noise, or nothing to tell them apart by.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from palate.health.alarm import Alarm, History, Line, average, having, since_start
from palate.health.leash import held_loosely
from palate.health.rewards import is_mastered, says_right_or_wrong

ALIKE = 0.5  # of the first batch's different pairs of tokens
SURE_OF_ITSELF = 0.1  # of the first batch's entropy
NOISE = 2.0  # times the first batch's entropy
NATS = 0.5  # a token
EQUAL = 0.95  # share of groups
NO_SPREAD = 0.01  # of the first batch's standard deviation of scores


def mode_collapse(history: History) -> Alarm | None:
    """Every prompt is answered alike, or each always in the same way.

    Alarm, in the mean of the recent batches against the first one: at most half as many different pairs of neighbouring tokens,
    as a share of all pairs and as their number (longer responses lower the share, shorter ones the number); or an entropy of a
    tenth. Not where answers are right or wrong and more are right, or nearly all: a policy that knows them is sure of them, and
    gives them in one form.
    """
    variety, entropy = _variety(history), since_start(history, "entropy")
    alike = variety is not None and max(variety.now / variety.before, variety.number) <= ALIKE
    sure = entropy is not None and entropy.fell and entropy.now <= SURE_OF_ITSELF * entropy.before
    if not (alike or sure) or _knows(history):
        return None
    numbers: dict[str, float] = {}
    told = []
    if variety is not None:
        numbers |= {"distinct_first": variety.before, "distinct_now": variety.now, "number": variety.number}
        told.append(
            f"different pairs of neighbouring tokens are {variety.now:.3g} of all (first batch: {variety.before:.3g}) and "
            f"{100 * variety.number:.0f} % as many (alarm at {100 * ALIKE:.0f} % of both)"
        )
    if entropy is not None:
        numbers |= {"entropy_first": entropy.before, "entropy_now": entropy.now}
        told.append(
            f"the entropy is {entropy.now:.3g} nats a token (first batch: {entropy.before:.3g}; alarm at "
            f"{100 * SURE_OF_ITSELF:.0f} %)"
        )
    evidence = f"in the last {len(history.recent)} batches {'; '.join(told)}."
    causes, remedies = held_loosely(history)
    if not history.get("method.entropy_coef", 1.0):
        remedies.append("method.entropy_coef=0.01")
    temperature = history.get("sampling.temperature", 1.0)
    if temperature < 1:
        causes.append(f"samples are drawn too cautiously (sampling.temperature = {temperature:g})")
        remedies.append("sampling.temperature=1")
    causes.append("a few phrases score well after every prompt: the reward does not read the prompt")
    remedies.append("an earlier checkpoint")
    return Alarm("mode_collapse", history.step, evidence, numbers, causes, remedies)


def _knows(history: History) -> bool:
    """Has the policy learnt right answers, or had it learnt them before?"""
    score = since_start(history, "score")
    learnt = score is not None and score.rose and says_right_or_wrong(history, history.recent)
    return learnt or is_mastered(history, history.recent)


class _Variety(NamedTuple):
    before: float  # share of different pairs in the first batch
    now: float  # mean over the recent ones
    number: float  # of different pairs, now by then


def _variety(history: History) -> _Variety | None:
    """None as long as there are no recent batches beside the first, or where no response has two tokens."""
    names = ("diversity/distinct_2", "length/response")
    first, lines = having(history.train[:1], *names), history.seen(*names)
    told = [line for line in lines if line["diversity/distinct_2"] > 0]
    if len(history.train) <= history.window or not first or not _number(first[0]) or not told:
        return None
    number = sum(map(_number, told)) / len(told) / _number(first[0])
    return _Variety(first[0]["diversity/distinct_2"], average(told, "diversity/distinct_2").mean, number)


def _number(line: Line) -> float:
    """Different pairs of neighbouring tokens, in a response's share of the batch."""
    return float(line["diversity/distinct_2"] * max(0.0, line["length/response"] - 1))


def entropy_rises(history: History) -> Alarm | None:
    """The policy turns to noise.

    Alarm: its mean entropy over the recent batches is twice the first batch's and 0.5 nats a token above it, and the score
    has not risen.
    """
    entropy, score = since_start(history, "entropy"), since_start(history, "score")
    if entropy is None or not entropy.rose or (score is not None and score.rose):
        return None
    if entropy.now < max(NOISE * entropy.before, entropy.before + NATS):
        return None
    evidence = (
        f"the entropy is {entropy.now:.3g} nats a token (last {len(history.recent)} batches) and was {entropy.before:.3g} in the first "
        f"batch (alarm at {NOISE:g} times, and {NATS:g} more)"
    )
    evidence += "." if score is None else f"; the score went from {score.before:.3g} to {score.now:.3g}."
    causes, remedies = held_loosely(history)
    bonus = history.get("method.entropy_coef", 0.0)
    if bonus:
        causes.insert(0, f"the entropy bonus is larger than what scores can earn (method.entropy_coef = {bonus:g})")
        remedies.insert(0, f"method.entropy_coef={bonus / 10:.2g}")
    numbers = {"entropy_first": entropy.before, "entropy_now": entropy.now}
    return Alarm("entropy_rises", history.step, evidence, numbers, causes, remedies)


def nothing_to_learn(history: History) -> Alarm | None:
    """The reward says the same of all responses that are compared, so that there is no gradient.

    Alarm, over the recent batches: 0.95 of the groups have equal scores throughout; of a method without groups, a standard
    deviation of the scores of a hundredth of the first batch's. Not where nearly all answers are right: then all is learnt.
    """
    lines = history.seen("score", "score/std")
    if len(lines) < history.window or is_mastered(history, lines):
        return None
    equal = having(lines, "groups/all_equal")
    score, std = (average(lines, name).mean for name in ("score", "score/std"))
    numbers = {"score": score, "score_std": std}
    if len(equal) == len(lines):
        numbers["all_equal"] = average(equal, "groups/all_equal").mean
        if numbers["all_equal"] < EQUAL:
            return None
        what = (
            f"the responses to one prompt all have the same score in {100 * numbers['all_equal']:.0f} % of the groups"
        )
        limit = f"{100 * EQUAL:.0f} %"
    else:
        first = history.train[0].get("score/std", math.nan)
        if not std <= NO_SPREAD * first:  # nor where it is not known
            return None
        what, limit = (
            f"scores have a standard deviation of {std:.2g} (first batch: {first:.2g})",
            f"{NO_SPREAD:g} of it",
        )
    evidence = f"in the last {len(lines)} batches {what}; alarm at {limit}. The mean score is {score:.3g}."
    causes, remedies = _why_equal(history, lines, score)
    return Alarm("nothing_to_learn", history.step, evidence, numbers, causes, remedies)


def _why_equal(history: History, lines: Sequence[Line], score: float) -> tuple[list[str], list[str]]:
    causes, remedies = [], []
    copies, temperature = history.get("samples_per_prompt", 1.0), history.get("sampling.temperature", 1.0)
    if says_right_or_wrong(history, lines):
        causes.append(
            "the prompts are too hard: hardly an answer is right"
            if score < 0.1
            else "some prompts are always answered right, the others never"
        )
        remedies.append("easier prompts" if score < 0.1 else "prompts of the difficulty between")
    else:
        causes.append("the reward does not tell the responses apart")
        remedies.append("palate score on samples.jsonl: a reward whose scores differ")
    entropy = having(lines, "entropy")
    if entropy:
        causes.append(f"the policy answers always alike (entropy {average(entropy, 'entropy').mean:.2g} nats a token)")
        remedies.append(f"a higher sampling.temperature (it is {temperature:g})")
    if "samples_per_prompt" in history.settings and "groups/all_equal" in lines[-1]:
        causes.append(f"too few responses to a prompt (samples_per_prompt = {copies:g})")
        remedies.append(f"samples_per_prompt={2 * copies:g}")
        if history.settings.get("method.name") != "dapo":
            remedies.append("another method: dapo, which draws others in their place")
    return causes, remedies


RULES = (mode_collapse, entropy_rises, nothing_to_learn)
