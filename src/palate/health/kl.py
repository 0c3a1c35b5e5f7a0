"""What goes wrong with the distance to the reference, and with what is called the same policy.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

from palate.health.alarm import SURE, Alarm, History, average, having
from palate.health.leash import held_loosely

FAR = 20.0  # nats a response
FAR_A_TOKEN = 0.5  # nats a token, and a long response may go further than 20
LAST = 3  # batches that must all say so: one batch's estimate is noise
LARGE_SCORES = 3.0  # their standard deviation, in reward units
BELOW = 0.1  # nats a response
DISAGREES = {"float32": 1e-4, "bfloat16": 5e-2}  # nats a token


def kl_explosion(history: History) -> Alarm | None:
    """The policy has gone further from its reference than responses that are still language do.

    Alarm: kl/reference is above 20 nats a response, and above 0.5 nats a token, in the mean of the recent batches and in each of
    the last three, for one batch's estimate is noise. Where the settings allow more (``kl_budget``, twice
    ``adaptive_kl_target``), above that.
    """
    lines = history.seen("kl/reference", "length/response")
    if len(lines) < LAST:
        return None
    kl, length = average(lines, "kl/reference").mean, average(lines, "length/response").mean
    target = history.get("method.adaptive_kl_target", 0.0)
    limit = max(FAR, FAR_A_TOKEN * length, 2 * target, history.get("method.kl_budget", 0.0))
    if min(kl, *(line["kl/reference"] for line in lines[-LAST:])) <= limit:
        return None
    earlier = having(history.train[: -len(lines)][-history.window :], "kl/reference")
    before = average(earlier, "kl/reference").mean if earlier else history.train[0].get("kl/reference", 0.0)
    evidence = (
        f"the policy is {kl:.1f} nats a response from its reference, {kl / max(1.0, length):.2f} a token (mean of the last "
        f"{len(lines)} batches, {before:.1f} before them; alarm at {limit:.0f} nats a response)."
    )
    causes, remedies = held_loosely(history)
    numbers = {"kl": kl, "kl_before": before, "kl_per_token": kl / max(1.0, length), "limit": limit}
    spread = having(lines, "score/std")
    if spread and (std := average(spread, "score/std").mean) > LARGE_SCORES:
        causes.insert(1, f"scores are large beside the price of a nat: their standard deviation is {std:.3g}")
        own = "method.normalise_scores"
        remedies.insert(1, f"{own}=true" if own in history.settings else "normalise: reference, beside the reward")
        numbers["score_std"] = std
    coefficients = having([history.train[0], lines[-1]], "kl/coef")
    if target and len(coefficients) == 2:
        start, now = (line["kl/coef"] for line in coefficients)
        horizon = history.get("method.adaptive_kl_horizon", 0.0)
        causes.insert(0, f"the coefficient follows too slowly: kl/coef went from {start:.3g} to {now:.3g}")
        remedies.insert(0, f"method.adaptive_kl_horizon={horizon / 4:g}")
    if "method.kl_budget" in history.settings:
        remedies.append(f"method.kl_budget={limit:.0f}, which ends the run in time")
    return Alarm("kl_explosion", history.step, evidence, numbers, causes, remedies)


def kl_negative(history: History) -> Alarm | None:
    """A KL is never negative: the responses do not come from the policy whose log-probabilities are used.

    Alarm: the mean of kl/reference over the recent batches is below -0.1 nats a response, and by 3 standard errors below 0.
    """
    lines = history.seen("kl/reference")
    if len(lines) < history.window:
        return None
    kl, error = average(lines, "kl/reference")
    if kl >= -max(BELOW, SURE * error):
        return None
    evidence = (
        f"kl/reference is {kl:.3g} +- {error:.2g} nats a response over the last {len(lines)} batches; the true value is never "
        f"below 0 (alarm at {-BELOW:g})."
    )
    filters = {"sampling.top_p": 1.0, "sampling.top_k": 0.0, "sampling.min_new_tokens": 0.0}
    on = [key for key, off in filters.items() if history.get(key, off) != off]
    causes = [f"responses are drawn from a distribution that {key} = {history.get(key, 0.0):g} has cut" for key in on]
    remedies = [f"{key}={filters[key]:g}" for key in on]
    causes.append("what samples is not the policy that is trained: other weights, another temperature or template")
    remedies.append("training.old_logprobs=trainer, and a look at kl/sampler")
    return Alarm("kl_negative", history.step, evidence, {"kl": kl, "error": error}, causes, remedies)


def sampler_disagrees(history: History) -> Alarm | None:
    """Sampler and trainer give the same tokens different probabilities.

    Alarm: kl/sampler above 1e-4 nats a token in each of the last three batches; 0.05 where the run computes in bfloat16.
    Not with ``training.rollouts_ahead``, where the sampler is one update behind.
    """
    lines = having(history.train[-LAST:], "kl/sampler")
    if len(lines) < LAST or history.get("training.rollouts_ahead", 0.0):
        return None
    dtype = str(history.settings.get("dtype", "float32"))
    limit, least = DISAGREES.get(dtype, max(DISAGREES.values())), min(line["kl/sampler"] for line in lines)
    if least <= limit:
        return None
    engine = history.settings.get("engine", "embedded")
    evidence = (
        f"in each of the last {LAST} batches kl/sampler is {least:.2g} nats a token or more (alarm at {limit:g} in {dtype}): the "
        "sampler does not draw from the policy that is trained."
    )
    causes = [f"the sampler computes otherwise than the trainer (engine = {engine}, dtype = {dtype})"]
    remedies = []
    if engine != "embedded":  # whose log-probs the trainer computes by itself
        remedies.append("engine=embedded")
    elif history.settings.get("training.old_logprobs") != "trainer":
        remedies.append("training.old_logprobs=trainer")
    if dtype != "float32":
        remedies.append("dtype=float32")
    if not remedies:
        remedies.append("a report of the model's build: in float32 the embedded sampler should agree up to rounding")
    return Alarm("sampler_disagrees", history.step, evidence, {"kl": least, "limit": limit}, causes, remedies)


RULES = (kl_explosion, kl_negative, sampler_disagrees)
