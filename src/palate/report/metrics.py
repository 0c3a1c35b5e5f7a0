"""From a run's ``metrics.jsonl`` to charts: which metrics belong together, and how they are called for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.report.charts import Curve, line_chart

Line = Mapping[str, Any]


class _Chart(NamedTuple):
    title: str
    unit: str
    metrics: Mapping[str, str]  # name -> label in the legend when there are several
    level: float | None = None


_CHARTS = (
    _Chart("Loss", "", {"loss": "train"}),
    _Chart("Accuracy on pairs", "0.5 = chance", {"reward/accuracy": "train"}, 0.5),
    _Chart("Margin", "chosen minus rejected, reward units", {"reward/margin": "train"}),
    _Chart("Score", "what the reward model says, reward units", {"score": "train"}),
    _Chart("Gold", "what the score stands for", {"score/gold": "gold", "gold": "gold"}),
    _Chart("KL to the reference", "nats a sequence", {"kl/reference": "train"}),
    _Chart("Length", "tokens a response", {"length/response": "train"}),
    _Chart("Entropy", "nats a token", {"entropy": "entropy"}),
    _Chart("KL to the sampling policy", "nats a token", {"kl/old": "KL"}),
    _Chart("Clip fraction", "share of tokens", {"clip_fraction": "clipped"}),
    _Chart("Value model", "explained variance, 1 = perfect", {"value/explained_variance": "explained variance"}, 0.0),
    _Chart("Diversity", "different pairs of neighbouring tokens, share", {"diversity/distinct_2": "distinct-2"}),
    _Chart("No end of text", "share of responses", {"length/no_eos": "unfinished"}),
)
_QUIET_GROUPS = ("time/", "tokens/")


def read_metrics(where: Path) -> list[dict[str, Any]]:
    """All whole lines; a half-written last one is left out. Empty when there is no file."""
    if not where.exists():
        return []
    lines = []
    for text in where.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def metric_charts(lines: Sequence[Line]) -> tuple[list[str], list[str]]:
    """Charts of the metrics that matter, and of all the others (without times and token counts), as figures.

    Among the others is also what says nothing in this run: a metric that never moved, and the loss of a policy gradient,
    which is about 0 by construction.
    """
    telling = [chart for chart in _CHARTS if _tells(chart, lines)]
    known = [figure for chart in telling if (figure := _figure(chart, lines))]
    drawn = {name for chart in telling for name in chart.metrics}
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    rest = [n for n in names if n not in drawn and n != "step" and not n.startswith(_QUIET_GROUPS)]
    return known, [figure for n in rest if (figure := _figure(_Chart(n, "", {n: "train"}), lines))]


def loss_tells(lines: Sequence[Line]) -> bool:
    """Does a falling loss mean progress? Not that of a policy gradient, which is about advantages of mean 0."""
    return not any("clip_fraction" in line for line in lines)


def _tells(chart: _Chart, lines: Sequence[Line]) -> bool:
    if "loss" in chart.metrics:
        return loss_tells(lines)
    return len({line[name] for line in lines for name in chart.metrics if name in line}) != 1


def curve(
    lines: Sequence[Line], metric: str, *, split: str = "train", label: str = "", marked: bool = False
) -> Curve | None:
    """The metric over steps, or None when it was measured less than twice."""
    points = [
        (line["step"], line[metric])
        for line in lines
        if line.get("split", "train") == split
        and isinstance(line.get(metric), int | float)
        and line[metric] == line[metric]
    ]
    if len(points) < 2:
        return None
    return Curve(label or metric, [s for s, _ in points], [v for _, v in points], marked)


def _figure(chart: _Chart, lines: Sequence[Line]) -> str | None:
    curves = []
    for metric, label in chart.metrics.items():
        curves.append(curve(lines, metric, label=label))
        curves.append(curve(lines, metric, split="validation", label="held out", marked=True))
    found = [c for c in curves if c is not None]
    return line_chart(chart.title, chart.unit, found, level=chart.level) if found else None
