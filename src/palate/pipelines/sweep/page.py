"""What a sweep found: one table, one picture, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from palate.errors import ConfigError
from palate.evaluation.frontier import less_is_better, pareto
from palate.pipelines.measure import interval
from palate.pipelines.sweep.plan import METHOD, Plan, label_of, short_key
from palate.pipelines.sweep.run import Measuring, Outcome
from palate.report.charts import _SERIES
from palate.report.frontier_chart import Dot, Family, Spot, frontier_chart
from palate.report.metrics import read_metrics
from palate.report.page import Page, Section, Table, write_page
from palate.run_folder import write_text
from palate.settings_tree import closest

SEEDS = ("seed", "training.seed")
NAMES = {
    "kl": "sequence KL to the reference, nats",
    "score": "reward",
    "gold": "gold",
    "accuracy": "accuracy on held-out pairs",
    "margin": "log-ratio margin on held-out pairs, nats",
    "nll": "negative log-likelihood, nats a pair",
    "held_out/loss": "held-out loss",
}
_TRAINING = {"kl": "kl/reference"}  # what a quantity is called in metrics.jsonl


def axes_of(text: str | None, outcomes: Sequence[Outcome]) -> tuple[str, str] | None:
    """The two quantities of the picture; None while nothing was measured.

    Args:
        text: "kl,score" or any two quantities that were measured; None = the distance and the best that there is: gold,
            else two parts of a reward whose weights are swept, else the score, else what the policy says of held-out
            pairs, else the loss.
    Raises:
        ConfigError: not two, or one that was not measured.
    """
    chosen = split_axes(text)
    known = list(dict.fromkeys(name for outcome in outcomes for name in outcome.measured))
    if not known:
        return None
    if chosen is not None:
        for name in chosen:
            if name not in known:
                near = closest(name, known)
                hint = f' Did you mean "{near}"?' if near else ""
                raise ConfigError(f'--axes: "{name}" was not measured.{hint} Measured: {", ".join(known)}.')
        return chosen
    parts = [name for name in known if name.startswith("score/")]
    if "gold" not in known and "score" not in known and len(parts) >= 2:
        return parts[0], parts[1]
    across = next((name for name in ("kl", "nll", "length/response") if name in known), known[0])
    up = next(
        (n for n in ("gold", "score", *parts, "accuracy", "held_out/loss") if n in known and n != across), known[-1]
    )
    return across, up


def split_axes(text: str | None) -> tuple[str, str] | None:
    """ "kl,score" as two names.

    Raises:
        ConfigError: not two different ones.
    """
    if text is None:
        return None
    names = [part.strip() for part in text.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise ConfigError(f"--axes: found {text!r}, expected two different quantities, as in kl,score.")
    return names[0], names[1]


def on_the_front(outcomes: Sequence[Outcome], axes: tuple[str, str] | None) -> set[str]:
    """Names of the runs that no other beats in both quantities, by their estimates."""
    if axes is None:
        return set()
    placed = [o for o in outcomes if all(axis in o.measured for axis in axes)]
    points = [(o.measured[axes[0]][0], o.measured[axes[1]][0]) for o in placed]
    best = pareto(points, (less_is_better(axes[0]), less_is_better(axes[1])))
    return {o.setting.name for o, is_best in zip(placed, best, strict=True) if is_best}


def write_sweep(
    plan: Plan, outcomes: Sequence[Outcome], measuring: Measuring, axes: tuple[str, str] | None, about: str
) -> None:
    """sweep.json, sweep.csv and sweep.html into the sweep's folder."""
    plan.out.mkdir(parents=True, exist_ok=True)
    best = on_the_front(outcomes, axes)
    write_text(plan.out / "sweep.json", json.dumps(as_json(plan, outcomes, axes, best), indent=1, default=str) + "\n")
    write_text(plan.out / "sweep.csv", _csv(plan, outcomes, best))
    table, text = table_of(plan, outcomes, axes, best), _text(axes, about)
    charts = [picture(plan, outcomes, axes, best, measuring)] if axes is not None else []
    done = sum(outcome.state == "finished" for outcome in outcomes)
    failed = [f"{o.setting.name}: {o.error}" for o in outcomes if o.state == "failed"]
    page = Page(
        title=f"Sweep of {', '.join(dict.fromkeys(s.config.method.name for s in plan.settings))}",
        lead=f"{done} of {len(outcomes)} settings done: {', '.join(plan.keys) or 'one setting'}.",
        sections=[Section("What each setting bought", text, charts=charts), Section("Settings", table=table)],
        alarms=failed,
        footer=f"{plan.out.name}; each run's own page is in its folder",
    )
    write_page(page, plan.out / "sweep.html")


def as_json(plan: Plan, outcomes: Sequence[Outcome], axes: tuple[str, str] | None, best: set[str]) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "out": str(plan.out),
        "swept": list(plan.keys),
        "axes": list(axes) if axes else None,
        "runs": [
            {
                "name": o.setting.name,
                "method": o.setting.config.method.name,
                "settings": dict(o.setting.values),
                "state": o.state,
                **({"error": o.error} if o.error else {}),
                "seconds": round(o.seconds, 1),
                "on_the_front": o.setting.name in best,
                "measured": o.measured,
                **({"way": o.way} if o.way else {}),
            }
            for o in outcomes
        ],
    }


def _csv(plan: Plan, outcomes: Sequence[Outcome], best: set[str]) -> str:
    names = list(dict.fromkeys(name for o in outcomes for name in o.measured))
    wide = {name for o in outcomes for name, value in o.measured.items() if len(value) == 3}
    columns = [c for name in names for c in ((name, f"{name}_low", f"{name}_high") if name in wide else (name,))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *plan.keys, "state", "on_the_front", *columns])
    for o in outcomes:
        cells: list[Any] = []
        for name in names:
            found = o.measured.get(name, [])
            cells += (list(found) + [""] * 3)[: 3 if name in wide else 1]
        on_front = str(o.setting.name in best).lower()
        writer.writerow([o.setting.name, *(o.setting.values[key] for key in plan.keys), o.state, on_front, *cells])
    return text.getvalue()


def table_of(
    plan: Plan, outcomes: Sequence[Outcome], axes: tuple[str, str] | None, best: set[str], *, brief: bool = False
) -> Table:
    """Swept settings, the picture's quantities, a mark for the front, and (unless brief) what else was measured."""
    known = dict.fromkeys(name for o in outcomes for name in o.measured)
    drawn = list(axes or ())
    others = [n for n in known if n not in drawn and (n in _MORE or n.startswith("score/"))]
    heads = [short_key(key) or "method" for key in plan.keys] or ["run"]
    columns = [*heads, *drawn, "front", *([] if brief else others)]
    rows = []
    for o in outcomes:
        first = [label_of({METHOD: value}) for value in o.setting.values.values()] or [o.setting.name]
        cells = [_cell(o.measured[name]) if name in o.measured else "" for name in (*drawn, *others)]
        mark = o.state if o.state != "finished" else "●" if o.setting.name in best else ""
        rows.append((*first, *cells[: len(drawn)], mark, *([] if brief else cells[len(drawn) :])))
    return Table(columns, rows, numbers=[*heads, *drawn, *others])


_MORE = ("kl", "score", "gold", "accuracy", "margin", "nll", "length/response", "length/no_eos", "held_out/loss")


def _cell(values: Sequence[float]) -> str:
    found = interval(values)
    return f"{values[0]:.3g}" if found is None else f"{found.estimate:z.2f} [{found.low:z.2f}, {found.high:z.2f}]"


def _text(axes: tuple[str, str] | None, about: str) -> str:
    if axes is None:
        return about
    better = [f"{name}: {'less' if less_is_better(name) else 'more'} is better" for name in axes]
    ring = "A ring: no other setting is at least as good in both and better in one, by the estimates alone."
    return f"{about} {'; '.join(better)}. {ring}"


def picture(
    plan: Plan, outcomes: Sequence[Outcome], axes: tuple[str, str], best: set[str], measuring: Measuring
) -> str:
    """One dot a run. The colour is the swept setting with two to four values, a line joins the others in their order."""
    placed = [o for o in outcomes if all(axis in o.measured for axis in axes)]
    keys = [key for key in plan.keys if key not in SEEDS]
    seeded = len(keys) < len(plan.keys)
    colour = _coloured(keys, placed, seeded)
    families: dict[Any, list[Outcome]] = {}
    for o in placed:
        families.setdefault(str(o.setting.values[colour]) if colour else "", []).append(o)
    rest = [key for key in keys if key != colour] or [*keys]
    drawn = []
    for members in families.values():
        if len(rest) == 1:
            members = sorted(members, key=lambda o: _order(o.setting.values[rest[0]]))
        labels = [label_of({key: o.setting.values[key] for key in rest}) for o in members]
        dots = [
            _dot(o, axes, label, o.setting.name in best, measuring) for o, label in zip(members, labels, strict=True)
        ]
        title = label_of({colour: members[0].setting.values[colour]}) if colour else ""
        drawn.append(Family(title, _one_name_each(dots), joined=len(rest) == 1 and not seeded))
    start = placed[0].start if placed else {}
    if all(axis in start for axis in axes) and all(o.start == start for o in placed):
        x, y = (interval(start[axis]) or start[axis][0] for axis in axes)
        drawn.append(Family("", [Dot(x, y, "reference")], quiet=True))
    across, up = (NAMES.get(name, name) for name in axes)
    title = f"{axes[1]} against {axes[0]}".replace("kl", "KL")
    return frontier_chart(title, "", drawn, across=across, up=up, root=axes[0] == "kl")


def _coloured(keys: Sequence[str], placed: Sequence[Outcome], seeded: bool) -> str | None:
    """The method, else the last key, of those with few enough values; only where something is left to write at a dot."""
    few = [key for key in keys if 1 < len({str(o.setting.values[key]) for o in placed}) <= len(_SERIES)]
    if METHOD in few:
        return METHOD
    return few[-1] if few and (len(keys) > 1 or seeded) else None


def _order(value: Any) -> tuple[int, Any]:
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _one_name_each(dots: Sequence[Dot]) -> list[Dot]:
    """Runs that differ by their seed alone carry one name between them."""
    seen: set[str] = set()
    named = []
    for dot in dots:
        named.append(Dot(dot.across, dot.up, "" if dot.label in seen else dot.label, dot.best, dot.trail))
        seen.add(dot.label)
    return named


def _dot(o: Outcome, axes: tuple[str, str], label: str, best: bool, measuring: Measuring) -> Dot:
    x, y = (o.measured[axis] for axis in axes)
    return Dot(interval(x) or x[0], interval(y) or y[0], label, best, _trail(o, axes, measuring))


_BLOCKS = 8


def _trail(o: Outcome, axes: tuple[str, str], measuring: Measuring) -> list[Spot]:
    """What was measured at checkpoints; else, of a method that samples and scores as it trains, its own metrics."""
    if o.way:
        points = [(point[axes[0]][0], point[axes[1]][0]) for point in o.way if all(axis in point for axis in axes)]
        return points[:-1]  # the last checkpoint is the model itself
    if axes[0] != "kl" or o.setting.config.method.settings.reads != "prompts" or measuring.reward is not None:
        return []
    names = [_TRAINING.get(axis, axis) for axis in axes]
    lines = [line for line in read_metrics(o.setting.config.out / "metrics.jsonl") if line.get("split") == "train"]
    found = [(float(line[names[0]]), float(line[names[1]])) for line in lines if all(name in line for name in names)]
    size = max(1, -(-len(found) // _BLOCKS))  # a batch alone is noise
    blocks = [found[i : i + size] for i in range(0, len(found), size)]
    return [(fmean(x for x, _ in block), fmean(y for _, y in block)) for block in blocks]
