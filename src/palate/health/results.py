"""What a run of a method that samples makes worse: its own score, the duel with the reference, the end of responses, the cost.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

from palate.health.alarm import SURE, Alarm, History, average, has, having, since_start
from palate.health.leash import held_loosely

SURER = 5.0  # standard errors, estimated from ten batches and looked at after each: chance takes one beyond 3 in one run of ten
WORSE = 0.2  # of a response's standard deviation of scores
LOSES = 0.03  # of a probability, below 1/2
CUT = 0.5  # share of responses
MORE_CUT = 0.3  # above the first batch's
AT_BOUND = 0.99  # of the largest multiplier


def score_falls(history: History) -> Alarm | None:
    """Training makes the responses worse by the very reward that it maximises.

    Alarm: after a third of the run the mean score of the recent batches is lower than that of the first ones, by 5 standard
    errors and by a fifth of the standard deviation of a response's score. Not of ``ppo_lagrangian``, whose score is weighed
    anew in every batch.
    """
    late = history.seen("score")
    if not history.under_way(3) or len(history.train) < 2 * history.window or len(late) < 2:
        return None
    early = having(history.first, "score", "score/std")
    if len(early) < 2:
        return None
    if "lagrange/multiplier" in history.train[-1]:
        return None
    begun, now = average(early, "score"), average(late, "score")
    std = average(early, "score/std").mean
    error = (begun.error**2 + now.error**2) ** 0.5
    if begun.mean - now.mean <= max(SURER * error, WORSE * std):
        return None
    evidence = (
        f"the score is {now.mean:.3g} +- {now.error:.2g} in the last {len(late)} batches and was {begun.mean:.3g} +- {begun.error:.2g} "
        f"in the first {len(early)} (alarm at {WORSE * std:.2g} less, a fifth of a response's standard deviation)."
    )
    causes, remedies = held_loosely(history)
    causes.append("what is maximised is not the score alone: see reward/total, and what is charged beside it")
    numbers = {"first": begun.mean, "now": now.mean, "error": error, "std": std}
    return Alarm("score_falls", history.step, evidence, numbers, causes, remedies)


def loses_to_opponent(history: History) -> Alarm | None:
    """The policy is preferred less often than the reference (``xpo``) or the mixture with it (``nash_md``) that it began as.

    Alarm: after a third of the run the mean preference over the recent batches is below 0.47, and by 5 standard errors below 0.5.
    """
    for name, opponent in (("preference/reference", "the reference"), ("preference/mixture", "the mixture")):
        if not history.under_way(3) or not has(history.recent, name):
            continue
        wins, error = average(history.recent, name)
        if wins >= 0.5 - max(LOSES, SURER * error):
            continue
        evidence = (
            f"{name} is {wins:.3f} +- {error:.2g} in the last {len(history.recent)} batches (alarm at {0.5 - LOSES:g}): {opponent} is "
            "preferred, and it was where the policy began."
        )
        causes, remedies = held_loosely(history)
        copies = history.get("samples_per_prompt", 1.0)
        causes.append(f"few responses to a prompt, so that the gradient is noise (samples_per_prompt = {copies:g})")
        remedies.append(f"samples_per_prompt={2 * copies:g}")
        return Alarm(
            "loses_to_opponent", history.step, evidence, {"preference": wins, "error": error}, causes, remedies
        )
    return None


def responses_cut(history: History) -> Alarm | None:
    """Responses no longer come to an end: more and more are cut at the length limit.

    Alarm: length/no_eos of the recent batches is above 0.5, and 0.3 above the first batch's. Where nearly all are cut from the
    start, texts are continued up to a length, or the stop token was never trained: the metrics cannot say which.
    """
    cut = since_start(history, "length/no_eos")
    if cut is None or not cut.rose or cut.now <= CUT or cut.now - cut.before <= MORE_CUT:
        return None
    limit = history.get("sampling.max_new_tokens", 0.0)
    evidence = (
        f"{100 * cut.now:.0f} % of the responses do not end by themselves (last {len(history.recent)} batches; first batch: "
        f"{100 * cut.before:.0f} %; alarm at {100 * CUT:.0f} %) but are cut after {limit:g} tokens."
    )
    causes = ["the reward likes length, or what comes before the end"]
    remedies = []
    if "method.missing_eos_penalty" in history.settings:
        causes.append("a response without an end costs nothing, or too little (method.missing_eos_penalty)")
        other = ", or missing_eos_score below what bad responses get" * ("method.missing_eos_score" in history.settings)
        remedies.append(f"method.missing_eos_penalty=1{other}")
    causes.append(f"the limit is too low (sampling.max_new_tokens = {limit:g})")
    remedies.append(f"sampling.max_new_tokens={2 * limit:g}")
    numbers = {"first": cut.before, "now": cut.now}
    return Alarm("responses_cut", history.step, evidence, numbers, causes, remedies)


def cost_out_of_reach(history: History) -> Alarm | None:
    """``ppo_lagrangian``: the price of the cost is at its bound, and the cost is still above its limit.

    Alarm: lagrange/multiplier is at ``multiplier_max`` in all of the recent batches, whose mean cost is 3 standard errors above
    ``cost_limit``.
    """
    lines = history.seen("cost", "lagrange/multiplier")
    if len(lines) < history.window or "method.multiplier_max" not in history.settings:
        return None
    most, limit = history.get("method.multiplier_max", 0.0), history.get("method.cost_limit", 0.0)
    cost, error = average(lines, "cost")
    if min(line["lagrange/multiplier"] for line in lines) < AT_BOUND * most or cost <= limit + SURE * error:
        return None
    evidence = (
        f"in the last {len(lines)} batches the multiplier was at its bound ({most:g}), and the mean cost is {cost:.3g} +- {error:.2g} "
        f"(method.cost_limit = {limit:g})."
    )
    causes = [
        f"no response that the policy can find is so cheap (method.cost_limit = {limit:g})",
        f"the bound is too low (method.multiplier_max = {most:g})",
    ]
    remedies = [f"method.cost_limit={cost:.2g}, or prompts that can be answered within the limit"]
    remedies.append(f"method.multiplier_max={10 * most:g}")
    return Alarm("cost_out_of_reach", history.step, evidence, {"cost": cost, "limit": limit}, causes, remedies)


RULES = (score_falls, loses_to_opponent, responses_cut, cost_out_of_reach)
