"""Rules asked as a run's metrics come; each alarm is raised once, in ``alarms.jsonl`` and aloud."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from palate.health import collapse, kl, preferences, results, reward_hacking, reward_model, updates
from palate.health.alarm import History, Rule, text
from palate.training import log

Metrics = dict[str, Any]
RULES: tuple[Rule, ...] = (
    *preferences.RULES,
    *reward_model.RULES,
    *kl.RULES,
    *reward_hacking.RULES,
    *collapse.RULES,
    *updates.RULES,
    *results.RULES,
)
FILE = "alarms.jsonl"


def alarmed(
    stream: Iterable[Metrics],
    folder: Path,
    history: History,
    say: Callable[[str], None],
    rules: Sequence[Rule] = RULES,
) -> Iterator[Metrics]:
    """The same metrics; what goes wrong is written and said when it is first seen.

    A rule that fails is said to, once, and not asked again: it must not end the training that it watches.

    Args:
        stream: from the loop, which has cut the run's files back to its checkpoint and written a line when it yields it. An
            alarm is written before the loop goes on, so a checkpoint knows of it: a resumed run raises the same alarms.
        folder: the run's.
        history: empty; filled from the run's ``metrics.jsonl``, so a resumed run knows what was before.
        say: told the alarm in words.
    """
    raised: set[str] | None = None
    for metrics in stream:
        if raised is None:
            raised = {alarm["name"] for alarm in log.read(folder, FILE)}
            for line in log.read(folder, "metrics.jsonl"):
                history.add(line)
        else:
            history.add(metrics)
        for rule in rules if history.is_due else ():
            if rule.__name__ in raised:
                continue
            try:
                alarm = rule(history)
            except Exception as error:  # noqa: BLE001  # whatever it was: training goes on
                raised.add(rule.__name__)
                say(f"The rule {rule.__name__} failed and is not asked again ({type(error).__name__}: {error}).")
                continue
            if alarm is not None:
                raised.add(alarm.name)
                log.append(folder, FILE, alarm.entry())
                say(f"ALARM {text(alarm.entry())}")
        yield metrics
