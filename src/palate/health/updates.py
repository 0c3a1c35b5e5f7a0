"""What goes wrong in the updates of a method that samples: too large, of stale samples, with a value model that knows nothing.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

from palate.health.alarm import Alarm, History, average, having

CLIPPED = 0.3  # share of response tokens
MADE_FOR_MORE = 0.01  # a clipping range below this clips most responses, and is meant to
MOVED = 0.05  # nats a token
ACCEPTED = 0.5  # share of steps
EFFECTIVE = 0.5  # share of the responses


def updates_too_large(history: History) -> Alarm | None:
    """A batch's updates go further than its samples carry.

    Alarm, in the mean of the recent batches: clip_fraction above 0.3 (not with a clipping range below 0.01, as gspo's, which is
    made for more), or kl/old above 0.05 nats a token.
    """
    lines = history.seen("kl/old")
    if len(lines) < history.window:
        return None
    moved = average(lines, "kl/old").mean
    numbers = {"kl_old": moved}
    told = [f"kl/old is {moved:.3g} nats a token (alarm at {MOVED:g})"]
    clipping = having(lines, "clip_fraction")
    ranges = [history.get(f"method.{name}", 1.0) for name in ("clip", "clip_low", "clip_high")]
    clipped = 0.0
    if clipping and min(ranges) >= MADE_FOR_MORE:
        clipped = numbers["clip_fraction"] = average(clipping, "clip_fraction").mean
        told.append(f"clip_fraction {clipped:.2f} (alarm at {CLIPPED:g})")
    if clipped <= CLIPPED and moved <= MOVED:
        return None
    evidence = f"in the last {len(lines)} batches {' and '.join(told)}: the later updates of a batch learn from what another policy drew."
    causes, remedies = _too_far(history)
    return Alarm("updates_too_large", history.step, evidence, numbers, causes, remedies)


def _too_far(history: History) -> tuple[list[str], list[str]]:
    rate = history.get("training.learning_rate", 0.0)
    causes = [f"learning rate too high (training.learning_rate = {rate:g})"]
    remedies = [f"training.learning_rate={rate / 3:.2g}"]
    epochs, parts = history.get("method.epochs", 1.0), history.get("method.minibatches", 1.0)
    if epochs * parts > 1:
        causes.append(
            f"{epochs * parts:g} updates a batch (method.epochs = {epochs:g}, method.minibatches = {parts:g})"
        )
        smaller = "method.epochs" if epochs > 1 else "method.minibatches"
        remedies.append(f"{smaller}={max(1, max(epochs if epochs > 1 else parts, 1) // 2):g}")
    if "method.target_kl" in history.settings and history.settings["method.target_kl"] is None:
        remedies.append("method.target_kl=0.02")
    if history.get("training.rollouts_ahead", 0.0):
        causes.append("the samples are one batch old (training.rollouts_ahead = 1)")
        remedies.append("training.rollouts_ahead=0")
    return causes, remedies


def samples_too_old(history: History) -> Alarm | None:
    """Half of the samples are lost to the correction for the older policy that drew them (``training.rollouts_ahead``).

    Alarm: the mean of importance/effective over the recent batches is below 0.5.
    """
    lines = history.seen("importance/effective")
    if len(lines) < history.window:
        return None
    effective = average(lines, "importance/effective").mean
    if effective >= EFFECTIVE:
        return None
    evidence = (
        f"in the last {len(lines)} batches the weighted responses were worth {100 * effective:.0f} % of as many fresh ones "
        f"(importance/effective; alarm at {100 * EFFECTIVE:.0f} %)."
    )
    causes, remedies = _too_far(history)
    if history.settings.get("training.importance") == "sequence":
        remedies.append("training.importance=token, for very long responses")
    return Alarm("samples_too_old", history.step, evidence, {"effective": effective}, causes, remedies)


def value_not_learning(history: History) -> Alarm | None:
    """The value model foresees nothing: advantages are noisier than without it.

    Alarm, after half of the run and three times as many batches as are looked at, for a new value model takes a few dozen to begin:
    value/explained_variance is 0 or less in half of the recent batches (a single one can be far below 0). A batch whose returns
    are all equal has 0 exactly, and is not counted.
    """
    lines = history.seen("value/explained_variance")
    known = sorted(line["value/explained_variance"] for line in lines if line["value/explained_variance"] != 0)
    if not history.under_way(2) or len(history.train) < 3 * history.window or len(known) <= history.window // 2:
        return None
    middle = known[len(known) // 2]
    if middle > 0:
        return None
    evidence = (
        f"in half of the last {len(known)} batches the value model explains {middle:.2f} of the returns' variance or less (1 = all, "
        "0 = what a constant does; alarm at 0)."
    )
    rate = history.settings.get("training.value_learning_rate")
    shown = history.get("training.learning_rate", 0.0) if rate is None else float(rate)
    causes = [
        f"its learning rate is too low, or so high that it is thrown about (training.value_learning_rate = {shown:g})"
    ]
    remedies = [f"training.value_learning_rate={3 * shown:.2g}; if it gets worse, {shown / 3:.2g}"]
    clip = history.settings.get("method.value_clip")
    if clip is not None:
        causes.append(f"it may not move far enough in a batch (method.value_clip = {clip:g})")
        remedies.append("method.value_clip=null")
    if "method.value_coef" in history.settings:
        value = history.get("method.value_coef", 0.1)
        remedies.append(f"method.value_coef={2 * value:g}")
    causes.append("the prompt does not tell how good its response will be")
    remedies.append("another method: rloo or reinforce_pp, which need no value model")
    return Alarm("value_not_learning", history.step, evidence, {"explained_variance": middle}, causes, remedies)


def steps_refused(history: History) -> Alarm | None:
    """``trpo`` gives up most of its steps, so that the policy stays where it is.

    Alarm: the mean of trust_region/accepted over the recent batches is below 0.5.
    """
    lines = history.seen("trust_region/accepted")
    if len(lines) < history.window:
        return None
    accepted = average(lines, "trust_region/accepted").mean
    if accepted >= ACCEPTED:
        return None
    evidence = f"of the last {len(lines)} steps {100 * accepted:.0f} % were taken (alarm at {100 * ACCEPTED:.0f} %)."
    damping, delta = history.get("method.damping", 0.1), history.get("method.delta", 0.01)
    causes = [
        f"the curvature is too noisy for its inverse (method.damping = {damping:g})",
        f"the region is larger than the quadratic model holds (method.delta = {delta:g})",
        f"too few responses a batch (training.batch_size = {history.get('training.batch_size', 0.0):g})",
    ]
    remedies = [f"method.damping={3 * damping:.2g}", f"method.delta={delta / 3:.2g}"]
    remedies.append(f"training.batch_size={2 * history.get('training.batch_size', 0.0):g}")
    return Alarm("steps_refused", history.step, evidence, {"accepted": accepted}, causes, remedies)


RULES = (updates_too_large, samples_too_old, value_not_learning, steps_refused)
