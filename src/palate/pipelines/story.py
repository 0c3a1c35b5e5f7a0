"""What a pipeline has to say in the end: a table for the terminal and a page with curves and samples.

Two policies are told about, before (SFT) and after (RL); and, where the pipeline has one, a third that learned from the
same preferences directly (DPO).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import ConfigError
from palate.evaluation.reward_model import Bin
from palate.evaluation.statistics import Interval
from palate.report.charts import Curve, distribution_chart, line_chart, reliability_chart
from palate.report.frontier_chart import Dot, Family, frontier_chart
from palate.report.metrics import metric_charts, read_metrics
from palate.report.page import Headline, Page, Sample, Section, Table, write_page

if TYPE_CHECKING:
    from palate.pipelines.recipe import Recipe
    from palate.pipelines.stages import Report


def write_story(settings: Report, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Write report.html into the stage's folder; the figures hold the table and where the page is.

    Raises:
        ConfigError: the settings name a stage that the pipeline does not have.
    """
    known = [step.name for step in recipe.steps]
    needed, more = ("sft", "reward", "rl", "answers", "examine", "compare"), ("direct", "compare_direct", "frontier")
    for role in (*needed, *(role for role in more if getattr(settings, role))):
        if getattr(settings, role) not in known:
            raise ConfigError(
                f"report: {role}: no stage {getattr(settings, role)!r} in this pipeline. Stages: {', '.join(known)}."
            )
    if bool(settings.direct) != bool(settings.compare_direct):
        raise ConfigError("report: direct and compare_direct name the two stages of one policy. Give both, or neither.")
    done = {name: _record(recipe, name) for name in known}
    compared = _json(recipe.out / settings.compare / "comparison.json")
    direct = _json(recipe.out / settings.compare_direct / "comparison.json") if settings.compare_direct else None
    examined = _json(recipe.out / settings.examine / "reward_model.json")
    ceiling = done[settings.answers]["figures"].get("ceiling")
    samples = read_metrics(recipe.out / settings.compare / "samples.jsonl")
    table = _table(settings, compared, direct, examined, ceiling)
    page = Page(
        title=settings.title,
        lead=_lead(compared, direct, examined, ceiling, settings),
        headlines=_headlines(compared, examined, ceiling),
        table=table,
        samples=_samples(samples[: settings.samples]),
        before=settings.sft.upper(),
        after=settings.rl.upper(),
        samples_text="Held-out prompts, first drawn answers, not chosen by hand; beside each its gold preference.",
        sections=[
            *_frontier(recipe, settings),
            Section("What changed", charts=_changes(compared, recipe.out / settings.rl, settings)),
            *(_training(recipe.out / name, title) for name, title in _trained(settings)[::-1]),
            Section(
                "Reward model on held-out rankings",
                "How sure it was against how often it was right, on prompts that no stage was trained on.",
                charts=[reliability_chart([Bin(**b) for b in examined["bins"]])],
                table=_length_table(examined),
            ),
            Section("The run", table=_times(done)),
        ],
        footer=f"{recipe.name}; folder {recipe.out.name}; variables: {_variables(recipe)}",
    )
    write_page(page, folder / "report.html")
    return {"print": _for_terminal(table, samples[:3], recipe, folder)}


def _trained(settings: Report) -> list[tuple[str, str]]:
    return [
        (settings.sft, "Supervised fine-tuning"),
        (settings.reward, "Reward model"),
        (settings.rl, "Reinforcement learning"),
        *([(settings.direct, "Directly from the preferences")] if settings.direct else []),
    ]


def _json(where: Path) -> Any:
    return json.loads(where.read_text(encoding="utf-8"))


def _record(recipe: Recipe, name: str) -> dict[str, Any]:
    where = recipe.out / ".stages" / f"{name}.json"
    record: dict[str, Any] = _json(where) if where.exists() else {"figures": {}}
    return record


def _lead(
    compared: dict[str, Any],
    direct: dict[str, Any] | None,
    examined: dict[str, Any],
    ceiling: float | None,
    settings: Report,
) -> str:
    noise = "" if ceiling is None else f"; their noise allows {100 * ceiling:.1f} %"
    text = (
        f"On {compared['prompts']} prompts that it never saw, the model after reinforcement learning is preferred to the one "
        f"before in {100 * compared['win_rate'][0]:.0f} % of answers, at {compared['kl'][0]:.1f} nats from it. "
        f"Its reward model agrees with the annotators on {100 * examined['accuracy']['estimate']:.1f} % of held-out "
        f"pairs{noise}."
    )
    if direct is not None:
        text += (
            f" {settings.direct.upper()}, from the same rankings without a reward model: "
            f"{100 * direct['win_rate'][0]:.0f} % at {direct['kl'][0]:.1f} nats."
        )
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _headlines(compared: dict[str, Any], examined: dict[str, Any], ceiling: float | None) -> list[Headline]:
    accuracy = Interval(**examined["accuracy"])
    low, high = compared["win_rate"][1:]
    return [
        Headline(
            "Win rate", f"{100 * compared['win_rate'][0]:.1f} %", f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        ),
        Headline("Distance", f"{compared['kl'][0]:.1f}", "nats a sequence, from the model before"),
        Headline(
            "Reward model",
            f"{100 * accuracy.estimate:.1f} %",
            "held-out accuracy" + ("" if ceiling is None else f"; ceiling {100 * ceiling:.1f} %"),
        ),
        Headline(
            "Gold preference",
            f"{compared['before']['gold'][0]:.2f} → {compared['after']['gold'][0]:.2f}",
            f"{compared['gold_gain'][0]:+.2f} on the same prompts",
        ),
    ]


def _table(
    settings: Report,
    compared: dict[str, Any],
    direct: dict[str, Any] | None,
    examined: dict[str, Any],
    ceiling: float | None,
) -> Table:
    before, others = compared["before"], [compared] if direct is None else [compared, direct]
    names = [f"before ({settings.sft.upper()})", f"after ({settings.rl.upper()})"]
    names += [f"after ({settings.direct.upper()})"] if direct is not None else []

    def row(name: str, first: str, show: Callable[[dict[str, Any]], str], what: str) -> tuple[str, ...]:
        return (name, first, *(show(other) for other in others), what)

    def fact(name: str, key: str, show: Callable[[Any], str], what: str) -> tuple[str, ...]:
        return row(name, show(before[key]), lambda other: show(other["after"][key]), what)

    def only_rl(name: str, value: str, what: str) -> tuple[str, ...]:
        return (name, "", value, *([""] * (len(others) - 1)), what)

    rows = [
        row(
            f"win rate over {settings.sft.upper()}, by gold",
            "",
            lambda other: _percent(other["win_rate"]),
            "wins + ties/2, 95 % interval over prompts",
        ),
        fact("gold preference", "gold", _interval, "mean; what guests really want"),
        fact("reward model's score", "score", lambda value: f"{value[0]:.2f}", "mean; what RL was trained on"),
        row(f"sequence KL to {settings.sft.upper()}", "0", lambda other: _interval(other["kl"]), "nats"),
        fact("length", "words", lambda value: f"{value:.1f}", "words"),
        fact("unfinished", "unfinished", lambda value: f"{100 * value:.1f} %", "no end of text"),
        fact("distinct-2, all", "distinct_2", lambda value: f"{value:.3f}", "different word pairs"),
        fact("distinct-2, one prompt", "distinct_2_per_prompt", lambda value: f"{value:.3f}", "among its answers"),
        fact("unique answers", "unique", lambda value: f"{100 * value:.1f} %", "of all"),
        only_rl("reward model, held out", Interval(**examined["accuracy"]).percent(), f"on {examined['pairs']} pairs"),
        only_rl("its ceiling", "" if ceiling is None else f"{100 * ceiling:.1f} %", "best that noisy labels allow"),
    ]
    length = examined.get("length") or {}
    if length:
        rows.append(only_rl("the longer one wins", f"{100 * length['longer_wins']['estimate']:.1f} %", "same pairs"))
    return Table(["", *names, "what"], rows, numbers=names)


def _frontier(recipe: Recipe, settings: Report) -> list[Section]:
    """Gold against distance, all runs on the same held-out prompts; nothing where no stage traced them."""
    if not settings.frontier:
        return []
    found = _json(recipe.out / settings.frontier / "frontier.json")
    begin, before = Interval(*found["start"]["gold"]), settings.sft.upper()
    families = [Family("", [Dot(0.0, begin, before)], quiet=True)]
    for name, points in found["runs"].items():
        trail = [(0.0, begin.estimate), *((p["kl"][0], p["gold"][0]) for p in points[:-1])]
        end = points[-1]
        families.append(Family(name, [Dot(Interval(*end["kl"]), Interval(*end["gold"]), name, trail=trail)]))
    text = (
        f"{found['prompts']} held-out prompts, answered {found['samples_per_prompt']} x at every point. A small dot is a "
        "checkpoint on the way, a large one the end, with 95 % intervals. Higher at the same distance is better."
    )
    chart = frontier_chart(
        "Gold preference against distance",
        "",
        families,
        across=f"sequence KL to {before}, nats",
        up="gold preference",
    )
    return [Section("What distance bought", text, charts=[chart])]


def _length_table(examined: dict[str, Any]) -> Table | None:
    length = examined.get("length")
    if not length:
        return None
    rows = [
        ("the longer one wins", Interval(**length["longer_wins"]).percent(), "what counting tokens reaches"),
        ("accuracy, longer chosen", _share(length["accuracy_longer_chosen"]), ""),
        ("accuracy, shorter chosen", _share(length["accuracy_shorter_chosen"]), ""),
        ("score and length", f"{length['correlation']:+.2f}", "correlation over all responses"),
        ("score and length, same prompt", f"{length['correlation_within']:+.2f}", "correlation of differences"),
        ("negative log-likelihood", f"{examined['nll']:.3f}", "nats a pair; knowing nothing is 0.693"),
        ("calibration error", f"{examined['ece']:.3f}", "0 = means what it says"),
    ]
    return Table(["", "value", "what"], rows, numbers=["value"])


def _changes(compared: dict[str, Any], run: Path, settings: Report) -> list[str]:
    """How gold is spread before and after; how score and gold grew with the distance."""
    values = compared["gold_values"]
    charts = [
        distribution_chart(
            "Gold preference", "held out", {settings.sft: values["before"], settings.rl: values["after"]}
        )
    ]
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line.get("split", "train") == "train"]
    names = {name: label for name, label in (("score", "score"), ("score/gold", "gold")) if lines and name in lines[0]}
    if names and "kl/reference" in lines[0]:
        distance = [sqrt(max(0.0, line["kl/reference"])) for line in lines]
        order = sorted(range(len(lines)), key=distance.__getitem__)
        curves = [
            Curve(label, [distance[i] for i in order], [lines[i][name] for i in order]) for name, label in names.items()
        ]
        charts.append(line_chart("What distance buys", "over the square root of the KL", curves, across="√KL to SFT"))
    return charts


def _training(folder: Path, title: str) -> Section:
    charts, more = metric_charts(read_metrics(folder / "metrics.jsonl"))
    config = folder / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.exists() else ""
    return Section(title, charts=charts, more_charts=more, settings=settings)


def _times(done: dict[str, dict[str, Any]]) -> Table:
    rows = [
        (name, f"{record.get('seconds', 0):.0f}", ", ".join(_figure(k, v) for k, v in record["figures"].items()))
        for name, record in done.items()
        if "seconds" in record
    ]
    return Table(["stage", "seconds", "figures"], rows, numbers=["seconds"])


def _figure(name: str, value: Any) -> str:
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def _variables(recipe: Recipe) -> str:
    return ", ".join(f"{k} {v}" for k, v in recipe.variables.items()) or "none"


def _samples(entries: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(e["prompt"], e["before"], e["after"], e["before_gold"], e["after_gold"]) for e in entries]


def _percent(values: list[float]) -> str:
    return Interval(*values).percent()


def _interval(values: list[float]) -> str:
    return f"{values[0]:.2f} [{values[1]:.2f}, {values[2]:.2f}]"


def _share(value: dict[str, float] | None) -> str:
    return "no such pair" if value is None else Interval(**value).percent()


def _for_terminal(table: Table, samples: list[dict[str, Any]], recipe: Recipe, folder: Path) -> list[str]:
    """Lines that the runner prints: the table, a few samples, where the page is."""
    widths = [max(len(row[i]) for row in [table.columns, *table.rows]) for i in range(len(table.columns))]
    lines = [""]
    for row in [table.columns, *table.rows]:
        cells = [
            cell.rjust(w) if column in table.numbers else cell.ljust(w)
            for cell, w, column in zip(row, widths, table.columns, strict=True)
        ]
        lines.append("   " + "   ".join(cells).rstrip())
    for entry in samples:
        lines += [
            "",
            f"   {entry['prompt']}",
            f"     before {entry['before_gold']:+5.2f}   {entry['before']}",
            f"     after  {entry['after_gold']:+5.2f}   {entry['after']}",
        ]
    return [*lines, "", f"   page: {recipe.out / folder.name.removesuffix('.part') / 'report.html'}"]
