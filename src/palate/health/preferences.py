"""What goes wrong in preference optimisation, seen in the metrics of the methods on pairs.

The thresholds are conventions, written beside each rule and in docs/health.md; none is from a paper.
"""

from __future__ import annotations

from collections.abc import Sequence

from palate.health.alarm import SURE, Alarm, Average, History, Line, average, has

FALL = 0.3  # nats a token: the preferred responses' perplexity is up by 35 %
FALL_OF_RESPONSE = 1.0  # nats a response: and no shorter one is called displaced for less
LENGTH_GAP = 0.15  # share of pairs
CHANCE = 0.03  # share of pairs, on either side of 1/2


def likelihood_displacement(history: History) -> Alarm | None:
    """The preferred responses lose probability, and what the margin gains goes to neither side.

    Alarm: log pi of the chosen fell by more than 0.3 nats a token and 1 nat a response, that of the rejected fell too, and
    the difference grew. On held-out pairs against the evaluation before training: the same rows, so no noise of sampling.
    Where nothing is held out, on the last batches against the first (a tenth of the run each, at least 10), and then the
    fall must be 3 standard errors above its threshold.

    That chosen responses lose some probability is usual for DPO: the loss sees their lead alone. (Pal et al. 2024,
    arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847.)
    """
    names = ("logprob/chosen", "logprob/rejected", "length/chosen")
    before: Sequence[Line]
    now: Sequence[Line]
    if len(history.held_out) >= 2:
        before, now, where = history.held_out[:1], history.held_out[-1:], "held-out pairs"
    elif len(history.train) >= 2 * history.window:
        before, now, where = history.first, history.recent, "the last batches against the first"
    else:
        return None
    if not has([*before, *now], *names):
        return None
    chosen, error = _change(before, now, names[0])
    rejected, _ = _change(before, now, names[1])
    length = max(1.0, average(now, names[2]).mean)
    slack = SURE * error if where != "held-out pairs" else 0.0
    if -chosen - slack <= max(FALL * length, FALL_OF_RESPONSE) or rejected >= 0 or chosen <= rejected:
        return None
    numbers = {
        "chosen_before": average(before, names[0]).mean,
        "chosen_now": average(now, names[0]).mean,
        "rejected_before": average(before, names[1]).mean,
        "rejected_now": average(now, names[1]).mean,
        "length": length,
        "fall_per_token": -chosen / length,
    }
    evidence = (
        f"on {where}, log pi of the preferred responses went from {numbers['chosen_before']:.1f} to "
        f"{numbers['chosen_now']:.1f} nats ({-chosen / length:.2f} nats a token less; alarm at {FALL:g}), of the others from "
        f"{numbers['rejected_before']:.1f} to {numbers['rejected_now']:.1f}: the margin grows, and the probability goes to "
        "neither."
    )
    causes, remedies = _pushed_too_far(history)
    causes.append("the two responses of a pair are much alike: pushing one down takes the other along")
    return Alarm("likelihood_displacement", history.step, evidence, numbers, causes, remedies)


def _change(before: Sequence[Line], now: Sequence[Line], name: str) -> Average:
    old, new = average(before, name), average(now, name)
    return Average(new.mean - old.mean, (old.error**2 + new.error**2) ** 0.5)


def _pushed_too_far(history: History) -> tuple[list[str], list[str]]:
    """Causes and remedies of a policy that left its reference too far behind, what the settings speak for first."""
    rate, beta = history.get("training.learning_rate", 0.0), history.settings.get("method.beta")
    rate_cause = f"learning rate too high (training.learning_rate = {rate:g})"
    causes, remedies = [rate_cause], [f"training.learning_rate={rate / 3:.2g}"]
    if beta is not None:
        small = beta < 0.05
        causes.insert(0 if small else 1, f"beta {'very small' if small else 'too small'} (method.beta = {beta:g})")
        remedies.insert(0 if small else 1, f"method.beta={max(0.1, 2 * beta):g}")
    if "method.anchor" in history.settings:
        anchor = history.get("method.anchor", 0.0)
        remedies.append(f"method.anchor={max(0.2, 2 * anchor):g}")
    else:
        remedies.append("another method: dpo with method.anchor=0.2, nca or apo_zero")
    if history.get("training.epochs", 1.0) > 1:
        causes.append(
            f"too many passes over the same pairs (training.epochs = {history.get('training.epochs', 1.0):g})"
        )
        remedies.append("training.epochs=1")
    return causes, remedies


def length_drift(history: History) -> Alarm | None:
    """The implicit reward goes by length, and more so than the labels do.

    Over the pairs whose sides differ in length: the share in which the longer one has the higher reward, and the share in
    which the longer one is preferred. Alarm: the first is more than 0.15 from 1/2 and, on that side, more than 0.15 and 3
    standard errors beyond the second, in the last tenth of the batches, a quarter of the run or more being done. For methods
    with a reference: only their reward begins at 0.

    Sum log-ratios grow with length, and DPO's answers with them: Park et al. 2024, arXiv:2403.19159.
    """
    names = ("reward/longer", "length/longer_preferred")
    if not history.under_way(4) or not has(history.recent, *names, "reward/length_slope"):
        return None
    # A batch in which no pair differs in length has 0 everywhere, which is no share; in any other a share of 0 has a slope.
    lines = [line for line in history.recent if line["reward/longer"] or line["reward/length_slope"]]
    if not lines:
        return None
    reward, labels = (average(lines, name).mean for name in names)
    gap, error = average(lines, *names)
    sign = 1 if gap > 0 else -1
    if sign * (reward - 0.5) <= LENGTH_GAP or abs(gap) <= max(LENGTH_GAP, SURE * error):
        return None
    slope = average(lines, "reward/length_slope").mean
    higher, preferred = (reward, labels) if gap > 0 else (1 - reward, 1 - labels)
    which = "longer" if gap > 0 else "shorter"
    evidence = (
        f"of pairs of unlike length the {which} response has the higher reward in {100 * higher:.0f} % and is preferred in "
        f"{100 * preferred:.0f} % (last {len(lines)} batches with such pairs; alarm at {100 * LENGTH_GAP:.0f} points between them); a "
        f"token is worth {slope:+.3g} reward units."
    )
    rate = history.get("training.learning_rate", 0.0)
    causes = ["the reward is a sum over tokens: what moves every token a little moves long responses most"]
    remedies = ["another method: ln_dpo or simpo, whose reward is a mean over tokens"]
    if preferred > 0.5 + CHANCE:
        causes.append(f"the labels go by length in part: the {which} response is preferred in {100 * preferred:.0f} %")
        remedies.append(f"data: pairs of like length, or as many in which the {which} response is not preferred")
    if gap < 0:
        causes.insert(0, f"all responses lose probability, long ones most (training.learning_rate = {rate:g})")
        remedies.insert(0, f"training.learning_rate={rate / 3:.2g}")
    elif slope > 0:
        remedies.insert(0, f"another method: r_dpo with method.alpha={slope:.2g}, what a token is worth now")
    numbers = {"reward_longer": reward, "longer_preferred": labels, "gap": gap, "slope": slope}
    return Alarm("length_drift", history.step, evidence, numbers, causes, remedies)


def accuracy_at_chance(history: History) -> Alarm | None:
    """Nothing is learnt: after a third of the run the training pairs are told apart no better than by a coin.

    Alarm: over the last half of the batches done (1,000 at most), mean reward/accuracy is within 0.03 of 1/2 with a standard
    error of 0.03 at most, and the margin no more than 3 standard errors above 0.
    """
    lines = history.train[-min(1000, (len(history.train) + 1) // 2) :]
    if not history.under_way(3) or not has(lines, "reward/accuracy", "reward/margin"):
        return None
    accuracy, margin = average(lines, "reward/accuracy"), average(lines, "reward/margin")
    if abs(accuracy.mean - 0.5) > CHANCE or accuracy.error > CHANCE or margin.mean > SURE * margin.error:
        return None
    rate = history.get("training.learning_rate", 0.0)
    evidence = (
        f"the last {len(lines)} batches have an accuracy on pairs of {accuracy.mean:.3f} +- {accuracy.error:.3f} (a coin: 0.5) "
        f"and a margin of {margin.mean:.3g} +- {margin.error:.2g} reward units."
    )
    causes = [
        f"learning rate too low (training.learning_rate = {rate:g})",
        "labels that contradict one another: the same pair is there both ways round, or they are noise",
        "what tells the two responses apart was cut off by data.max_length",
    ]
    remedies = [
        f"training.learning_rate={3 * rate:.2g}",
        "palate check --data FILE on the records",
        "a larger data.max_length",
    ]
    numbers = {"accuracy": accuracy.mean, "error": accuracy.error, "margin": margin.mean}
    return Alarm("accuracy_at_chance", history.step, evidence, numbers, causes, remedies)


def margin_negative(history: History) -> Alarm | None:
    """The reward prefers the wrong side, and more so than in the beginning.

    Alarm: after a third of the run the mean margin of the last tenth of the batches is 3 standard errors below 0, below what
    it was in the first, and accuracy is below 0.45. A method without a reference may begin below 0: log-probs are summed.
    """
    names = ("reward/margin", "reward/accuracy")
    if not history.under_way(3) or len(history.train) < 2 * history.window:
        return None
    if not has([*history.first, *history.recent], *names):
        return None
    margin, begun = average(history.recent, "reward/margin"), average(history.first, "reward/margin")
    accuracy = average(history.recent, "reward/accuracy").mean
    if margin.mean >= -SURE * margin.error or margin.mean >= begun.mean or accuracy >= 0.45:
        return None
    rate = history.get("training.learning_rate", 0.0)
    evidence = (
        f"the last {len(history.recent)} batches have a margin of {margin.mean:.4g} +- {margin.error:.2g} reward units (the "
        f"first: {begun.mean:.4g}) and an accuracy on pairs of {accuracy:.3f}."
    )
    causes = [
        f"learning rate too high: the policy is thrown from one batch to the next (training.learning_rate = {rate:g})",
        "the order of the data changes half-way: later labels contradict the earlier ones",
        "chosen and rejected are swapped in part of the data",
    ]
    remedies = [f"training.learning_rate={rate / 3:.2g}", "palate check --data FILE on the records"]
    numbers = {"margin": margin.mean, "error": margin.error, "first": begun.mean, "accuracy": accuracy}
    return Alarm("margin_negative", history.step, evidence, numbers, causes, remedies)


RULES = (likelihood_displacement, length_drift, accuracy_at_chance, margin_negative)
