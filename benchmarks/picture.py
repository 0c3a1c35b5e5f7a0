"""The pictures: ``picture.png`` of the jobs, ``scaling.png`` of how cost grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scaling
from catalogue import JOBS
from report import summary, wanted_of

# Palate stands out; its peers are greys and blues. Colours that differ in lightness too, for print and for the colour-blind.
COLOURS = {
    "palate": "#d1495b",
    "TRL": "#8d99ae",
    "TRL, malloc tuned": "#3d5a80",
    "transformers generate": "#8d99ae",
    "transformers generate, malloc tuned": "#3d5a80",
    "transformers generate, static cache": "#98c1d9",
    "transformers continuous batching": "#c9ada7",
    "vLLM": "#e9c46a",
}
PANELS = (  # figure, title, factor, and the most that is drawn: a longer bar is cut, its number says how long it is
    ("speed_ratio", "tokens per second, multiple of the peer's", 1, 12),
    ("memory_ratio", "memory above import, share of the peer's", 1, 2.5),
    ("share", "share of the matrix-multiply peak, %", 100, 100),
)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Whatever there is to draw."""
    import matplotlib

    matplotlib.use("Agg")
    rows = [row for row in summary(results) if "tokens_s" in row]
    vocabulary = results["settings"]["vocabulary"]
    for threads in sorted({row["threads"] for row in rows}, reverse=True):
        most = threads == max(row["threads"] for row in rows)
        here = [row for row in rows if row["threads"] == threads]
        _bars(here, vocabulary, folder / ("picture.png" if most else f"picture-{threads}.png"))
    grown = scaling.summary([run for run in results["runs"] if run.get("axis")])
    if any("tokens_s" in row for row in grown):
        _curves(grown, folder / "scaling.png")


def _bars(rows: Sequence[dict[str, Any]], vocabulary: int, path: Path) -> None:
    """For each job a bar a tool, and a mark where palate's is wanted to reach (of memory: to stay below)."""
    import matplotlib.pyplot as plt

    places, labels, y = {}, {}, 0.0
    for job in JOBS:
        of_job = [row for row in rows if row["job"] == job]
        for row in of_job:
            places[job, row["tool"]] = y
            y += 1
        if of_job:
            labels[JOBS[job].title] = y - (len(of_job) + 1) / 2
            y += 0.8
    height = 1.5 + 0.2 * y
    figure, axes = plt.subplots(1, 3, figsize=(14, height), sharey=True)
    for ax, (name, title, factor, most) in zip(axes, PANELS, strict=True):
        for row in rows:
            if name in row:
                at, length = places[row["job"], row["tool"]], min(row[name] * factor, most)
                ax.barh(at, length, 0.9, color=COLOURS.get(row["tool"], "#bbbbbb"))
                number = f"{row[name] * factor:.0f}" if factor == 100 else f"{row[name]:.2f}"
                number += " →" if length == most else ""
                paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
                place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7, "zorder": 3}
                ax.annotate(number, (length, at), **place, bbox=paper)
            if row["tool"] == "palate":
                for wanted, limit, _ in wanted_of(row["job"], vocabulary):
                    if wanted == name:
                        at = places[row["job"], "palate"]
                        ax.plot([limit * factor] * 2, [at - 0.6, at + 0.6], color="black", linewidth=1.6)
        ax.set_title(title, fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.1, y=0.01)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(list(labels.values()), list(labels))
    axes[0].invert_yaxis()
    shown = {tool: COLOURS.get(tool, "#bbbbbb") for tool in dict.fromkeys(row["tool"] for row in rows)}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in shown.values()]
    handles.append(plt.Line2D([], [], color="black", linewidth=1.6))
    threads = rows[0]["threads"]
    axes[0].set_xlabel(f"{threads} thread{'s' * (threads > 1)}", fontsize=9, loc="left")
    figure.legend(handles, [*shown, "wanted"], loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.7 / height, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A column for each axis: speed above, memory below, both on logarithmic scales."""
    import matplotlib.pyplot as plt

    present = [axis for axis in scaling.AXES if any(row["axis"] == axis and "tokens_s" in row for row in rows)]
    threads = rows[0]["threads"]
    figure, axes = plt.subplots(2, len(present), figsize=(1 + 3.3 * len(present), 5.6), squeeze=False)
    for column, axis in enumerate(present):
        for line, (name, title) in enumerate((("tokens_s", "tokens/s"), ("memory_mb", "MB above import"))):
            ax, values = axes[line][column], scaling.AXES[axis].values
            for tool in ("palate", "TRL"):
                found = [(r["value"], r[name]) for r in rows if r["axis"] == axis and r["tool"] == tool and name in r]
                if found:
                    ax.plot(*zip(*found, strict=True), marker="o", markersize=4, color=COLOURS[tool], label=tool)
            failed = [r["value"] for r in rows if r["axis"] == axis and r["tool"] == "TRL" and "error" in r]
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            if line == 0:
                ax.set_title(f"{scaling.AXES[axis].title}\n({JOBS[scaling.AXES[axis].job].title})", fontsize=10)
            ax.set_xticks(
                values, [f"{value // 1024}k" if value >= 8192 else f"{value:,}" for value in values], fontsize=8
            )
            ax.minorticks_off()
            ax.tick_params(axis="y", labelsize=8)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#eeeeee")
            for value in failed:
                ax.axvline(value, color=COLOURS["TRL"], linestyle=":", linewidth=1)
                ax.annotate("TRL: none", (value, 0.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=90)
            if column == 0:
                ax.set_ylabel(title)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{threads} thread{'s' * (threads > 1)}", fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
