"""Charts as inline SVG whose colours and fonts are the page's, so that they follow its light and dark dress.

matplotlib draws with stand-in colours; each is then replaced by a CSS variable of the page (``page.css``).
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from palate.evaluation.reward_model import Bin

# stand-in colour -> what the page calls it
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--quiet)",
    "#030303": "var(--rule)",
    "#040401": "var(--series-1)",
    "#040402": "var(--series-2)",
    "#040403": "var(--series-3)",
    "#040404": "var(--series-4)",
}
_INK, _QUIET, _RULE, *_SERIES = _COLOURS
_SIZE, _WIDE = (4.6, 2.55), (8.4, 4.4)


@dataclass(frozen=True)
class Curve:
    """One line: its name in the legend and its points; ``marked`` for the few values of a held-out evaluation."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    marked: bool = False


def line_chart(
    title: str, unit: str, curves: Sequence[Curve], *, across: str = "step", level: float | None = None
) -> str:
    """Curves over steps. Long noisy ones are drawn thin, with a running mean over them.

    Args:
        title, unit: shown above the chart.
        curves: at least one, up to four.
        across: what the horizontal axis is.
        level: a horizontal line to compare with (chance, a target).
    """
    with _figure(title, unit) as (axes, result):
        for curve, colour in zip(curves, _SERIES, strict=False):
            _draw(axes, curve, _SERIES[1] if curve.marked else colour)  # held out looks the same in every chart
        if level is not None:
            axes.axhline(level, color=_QUIET, lw=0.9, ls=(0, (4, 3)))
        axes.set_xlabel(across)
        axes.yaxis.get_major_formatter().set_useOffset(False)  # 8.7473, not 0.0003 with a small +8.747 above
        if all(float(step).is_integer() for curve in curves for step in curve.steps):
            axes.xaxis.get_major_locator().set_params(integer=True)  # there is no step 1.5
        if len(curves) > 1:
            _legend(axes)
    return result[0]


def reliability_chart(bins: Sequence[Bin]) -> str:
    """How often the reward model was right against how sure it was; the area of a dot is its number of pairs."""
    with _figure("Calibration", "accuracy against confidence") as (axes, result):
        axes.plot([0.5, 1], [0.5, 1], color=_QUIET, lw=0.9, ls=(0, (4, 3)))
        most = max(b.pairs for b in bins)
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        axes.plot(x, y, color=_SERIES[0], lw=1.2)
        axes.scatter(x, y, s=[20 + 160 * b.pairs / most for b in bins], color=_SERIES[0], alpha=0.75, lw=0, zorder=3)
        axes.set_xlabel("confidence")
        axes.set_ylim(min(0.45, min(y) - 0.05), 1.03)
    return result[0]


def distribution_chart(title: str, unit: str, groups: Mapping[str, ArrayLike], *, bins: int = 26) -> str:
    """Histograms over each other, as shares."""
    with _figure(title, unit) as (axes, result):
        data = {name: np.asarray(values, dtype=np.float64) for name, values in groups.items()}
        every = np.concatenate(list(data.values()))
        edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), bins + 1)
        for (name, values), colour in zip(data.items(), _SERIES, strict=False):
            shares = np.full(len(values), 1 / len(values))
            axes.hist(values, edges, weights=shares, color=colour, alpha=0.28, lw=0)
            axes.hist(values, edges, weights=shares, color=colour, histtype="step", lw=1.4, label=name)
            axes.axvline(values.mean(), color=colour, lw=1.1, ls=(0, (1, 2)))
        axes.set_ylabel("share")
        _legend(axes)
    return result[0]


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    steps, values = np.asarray(curve.steps, dtype=np.float64), np.asarray(curve.values, dtype=np.float64)
    if curve.marked:
        axes.plot(steps, values, color=colour, lw=1.4, marker="o", ms=3.4, label=curve.label, zorder=3)
        return
    smooth = running_mean(values, len(values) // 40)  # below 40 points: the values themselves
    if len(values) >= 40:
        axes.plot(steps, values, color=colour, lw=0.7, alpha=0.3)
    axes.plot(steps, smooth, color=colour, lw=1.7, label=curve.label, solid_capstyle="round")


def running_mean(values: ArrayLike, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean of each value with up to ``width`` values on either side; the same length."""
    v = np.asarray(values, dtype=np.float64)
    total = np.concatenate([[0.0], np.cumsum(v)])
    place = np.arange(len(v))
    low, high = np.maximum(place - width, 0), np.minimum(place + width + 1, len(v))
    return np.asarray((total[high] - total[low]) / (high - low))


def _legend(axes: Any) -> None:
    axes.legend(loc="best", frameon=False, fontsize=8, labelcolor=_INK, handlelength=1.4, borderaxespad=0.2)


@contextmanager
def _figure(title: str, unit: str, *, wide: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """An empty chart in the house style; after the block, ``result[0]`` is its SVG. A wide one takes the whole row."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 8.5,
        "axes.edgecolor": _RULE,
        "axes.labelcolor": _QUIET,
        "xtick.color": _QUIET,
        "ytick.color": _QUIET,
    }
    result: list[str] = []
    with mpl.rc_context(settings):
        figure = Figure(figsize=_WIDE if wide else _SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y", color=_RULE, lw=0.6)
        axes.set_axisbelow(True)
        axes.locator_params(nbins=5)
        yield axes, result
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        result.append(_for_page(text.getvalue(), title, unit, "chart wide" if wide else "chart"))


def _for_page(svg: str, title: str, unit: str, dress: str) -> str:
    """The bare element, in the page's colours and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # how older and newer matplotlib name the font
    svg = re.sub(r" *font-family: [^;\"]*;?", "", svg)
    for stand_in, name in _COLOURS.items():
        svg = svg.replace(stand_in, name)
    label = html.escape(f"{title}, {unit}" if unit else title)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    caption = f"<figcaption>{html.escape(title)}<small>{html.escape(unit)}</small></figcaption>"
    return f'<figure class="{dress}">{caption}{svg}</figure>'
