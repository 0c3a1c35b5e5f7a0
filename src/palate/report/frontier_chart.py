"""One picture of many policies: what each earns against what it costs, with intervals, trails, names and the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate.evaluation.statistics import Interval
from palate.report.charts import _INK, _QUIET, _RULE, _SERIES, _figure, _legend

Spot = tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """One policy.

    Attributes:
        across, up: its place, with or without an interval.
        label: written beside it.
        best: no other beats it in both; it gets a ring.
        trail: places that it came by, oldest first.
    """

    across: Interval | float
    up: Interval | float
    label: str = ""
    best: bool = False
    trail: Sequence[Spot] = ()


@dataclass(frozen=True)
class Family:
    """Policies of one colour.

    Attributes:
        label: in the legend; "" = not there.
        joined: a thin line joins them in their order.
        quiet: grey, for what is only there to compare with.
    """

    label: str
    dots: Sequence[Dot]
    joined: bool = False
    quiet: bool = False


def frontier_chart(
    title: str, unit: str, families: Sequence[Family], *, across: str, up: str, root: bool = False
) -> str:
    """Dots with cross-shaped intervals, thin trails that lead to them, and a ring around those on the front.

    Args:
        title, unit: shown above the chart.
        families: beyond the fourth all have the colour of the first.
        across, up: the axes' names.
        root: the horizontal axis is spaced by the square root (of a KL, which is a distance squared, see
            Bai et al. 2022, arXiv:2204.05862, section 4.3); its numbers stay what they are.
    """
    with _figure(title, unit, wide=True) as (axes, result):
        if root:
            axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.grid(axis="x", color=_RULE, lw=0.6)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        dots = []
        loud = [family for family in families if not family.quiet]
        colours = _SERIES if len(loud) <= len(_SERIES) else [_SERIES[0]] * len(loud)
        for family, colour in [*zip(loud, colours, strict=False), *((f, _QUIET) for f in families if f.quiet)]:
            dots += _draw(axes, family, colour)
        axes.margins(0.09, 0.12)
        if root:
            axes.set_xlim(left=0)
        if 1 < len(loud) <= len(_SERIES) and all(family.label for family in loud):
            _legend(axes)
        _name(axes, dots)
    return result[0]


def _draw(axes: Any, family: Family, colour: str) -> list[Dot]:
    places = [(_middle(dot.across), _middle(dot.up)) for dot in family.dots]
    if family.joined and len(places) > 1:
        axes.plot(*zip(*places, strict=True), color=colour, lw=1.0, alpha=0.5)
    for dot, (x, y) in zip(family.dots, places, strict=True):
        if dot.trail:
            axes.plot(*zip(*dot.trail, (x, y), strict=True), color=colour, lw=1.1, alpha=0.6, marker="o", ms=2.2)
        axes.errorbar(x, y, _arms(dot.up), _arms(dot.across), fmt="none", ecolor=colour, elinewidth=1.0, alpha=0.55)
        if dot.best:
            axes.plot(x, y, marker="o", ms=10.5, mfc="none", mec=_INK, mew=0.9, ls="", zorder=3)
    axes.plot(
        [x for x, _ in places],
        [y for _, y in places],
        marker="o",
        ms=5.6,
        color=colour,
        ls="",
        label=family.label or "_",
        zorder=4,
    )
    return list(family.dots)


def _middle(value: Interval | float) -> float:
    return value.estimate if isinstance(value, Interval) else value


def _arms(value: Interval | float) -> list[list[float]] | None:
    """How far an interval reaches below and above its estimate."""
    if not isinstance(value, Interval):
        return None
    return [[max(0.0, value.estimate - value.low)], [max(0.0, value.high - value.estimate)]]


# Where a name may stand, in points from its dot, and how it is aligned; the first that is free is taken.
_PLACES = (
    (8, 5, "left"),
    (8, -10, "left"),
    (-8, 5, "right"),
    (-8, -10, "right"),
    (0, 11, "center"),
    (0, -17, "center"),
)


def _name(axes: Any, dots: Sequence[Dot]) -> None:
    """Write the names where they cover the fewest dots and other names."""
    axes.figure.canvas.draw_idle()
    taken = [_box(axes, dot, 0, 0, "center", 8.0, 8.0) for dot in dots]
    for dot in dots:
        if not dot.label:
            continue
        width = 4.5 * len(dot.label)
        boxes = [_box(axes, dot, x, y, side, width, 9.0) for x, y, side in _PLACES]
        cost = [sum(_overlap(box, other) for other in taken) + _outside(axes, box) for box in boxes]
        best = int(np.argmin(cost))
        x, y, side = _PLACES[best]
        taken.append(boxes[best])
        place = (_middle(dot.across), _middle(dot.up))
        axes.annotate(dot.label, place, (x, y), textcoords="offset points", ha=side, color=_QUIET, fontsize=7.8)


_Box = tuple[float, float, float, float]


def _box(axes: Any, dot: Dot, x: float, y: float, side: str, width: float, height: float) -> _Box:
    """Left, bottom, right, top in points."""
    at = axes.transData.transform((_middle(dot.across), _middle(dot.up))) * 72 / axes.figure.dpi
    left = at[0] + x - {"left": 0.0, "right": width, "center": width / 2}[side]
    bottom = at[1] + y - (height / 2 if height == width else 0.0)
    return left, bottom, left + width, bottom + height


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(axes: Any, box: _Box) -> float:
    frame = axes.bbox
    scale = 72 / axes.figure.dpi
    return 20 * (max(0.0, box[2] - frame.x1 * scale) + max(0.0, frame.x0 * scale - box[0]))
