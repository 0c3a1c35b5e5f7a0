"""What holds a policy near its reference, and what can be drawn tighter: causes and remedies that several alarms share."""

from __future__ import annotations

from palate.health.alarm import History

SMALL = 0.02  # reward units a nat: less is a small price for scores of standard deviation 1
USUAL = 0.05  # what a run without a price is told to begin with


def price(history: History) -> str | None:
    """The setting that is the price of leaving the reference; None of a method that has none."""
    return next((key for key in ("method.kl_coef", "method.beta") if key in history.settings), None)


def held_loosely(history: History) -> tuple[list[str], list[str]]:
    """Causes and remedies of a policy that goes too far, what the settings speak for first."""
    if "method.delta" in history.settings:
        delta = history.get("method.delta", 0.0)
        causes, remedies = [f"steps too long (method.delta = {delta:g})"], [f"method.delta={delta / 3:.2g}"]
    else:
        rate = history.get("training.learning_rate", 0.0)
        causes = [f"learning rate too high (training.learning_rate = {rate:g})"]
        remedies = [f"training.learning_rate={rate / 3:.2g}"]
    key = price(history)
    if key is not None:
        value = history.get(key, 0.0)
        small = value < SMALL
        what = "nothing holds the policy back" if not value else f"leaving the reference is {'very ' * small}cheap"
        causes.insert(0 if small else 1, f"{what} ({key} = {value:g})")
        remedies.insert(0 if small else 1, f"{key}={max(USUAL, 2 * value):g}")
    if "method.adaptive_kl_target" in history.settings and history.settings["method.adaptive_kl_target"] is None:
        remedies.append("method.adaptive_kl_target=6")
    return causes, remedies
