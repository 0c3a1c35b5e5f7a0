"""One self-contained HTML page: no script, no font and no picture from anywhere else; light or dark as the reader likes.

``Page`` is what the page says; ``render`` how it looks; ``report_run`` makes one of a run's folder.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.evaluation.statistics import Interval
from palate.health.alarm import text as alarm_text
from palate.report.charts import line_chart
from palate.report.metrics import curve, loss_tells, metric_charts, read_metrics
from palate.training.times import FILE as TIMES
from palate.training.times import PARTS, spent, tokens_per_second


@dataclass(frozen=True)
class Headline:
    """One large figure: what it is, its value, and a line below (an interval, what to compare it with)."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text. Columns named in ``numbers`` stand to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class Sample:
    """One prompt answered twice, with a score of each or None. Higher is better."""

    prompt: str
    before: str
    after: str
    before_score: float | None = None
    after_score: float | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: charts (figures of ``report.charts``), further ones folded away, a table, settings folded away."""

    title: str
    text: str = ""
    charts: Sequence[str] = ()
    more_charts: Sequence[str] = ()
    table: Table | None = None
    settings: str = ""


@dataclass(frozen=True)
class Page:
    """What the page says, from top to bottom."""

    title: str
    lead: str
    headlines: Sequence[Headline] = ()
    table: Table | None = None
    samples: Sequence[Sample] = ()
    before: str = "Before"
    after: str = "After"
    samples_text: str = ""
    sections: Sequence[Section] = ()
    alarms: Sequence[str] = field(default=())
    footer: str = ""


def write_page(page: Page, where: str | Path) -> Path:
    """Write the page whole or not at all: to a temporary file, then renamed. An older page of the run is replaced.

    Raises:
        RunError: the file cannot be written.
    """
    where = Path(where)
    temporary = where.with_name(where.name + ".tmp")
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(render(page), encoding="utf-8")
        os.replace(temporary, where)
    except OSError as error:
        raise RunError(f"{where}: the report cannot be written ({error.strerror}).") from error
    return where


def render(page: Page) -> str:
    """The page as HTML."""
    style = resources.files("palate.report").joinpath("page.css").read_text(encoding="utf-8")
    parts = [
        '<p class="brand">palate</p>',
        f"<h1>{_text(page.title)}</h1>",
        f'<p class="lead">{_text(page.lead)}</p>',
        _headlines(page.headlines),
        _alarms(page.alarms),
        _table(page.table),
        _samples(page),
        *(_section(section) for section in page.sections),
        f"<footer>{_text(page.footer)}</footer>" if page.footer else "",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(page.title)} · palate</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def report_run(folder: str | Path, *, samples: int = 6) -> Path:
    """Write ``report.html`` into a run's folder from its metrics, samples, alarms and settings; returns its path.

    Raises:
        RunError: the folder holds no metrics.
    """
    folder = Path(folder)
    lines = read_metrics(folder / "metrics.jsonl")
    if not lines:
        raise RunError(f"{folder / 'metrics.jsonl'}: no metrics to report. Expected the folder of a training run.")
    config = folder / "config.yaml"
    settings = config.read_text(encoding="utf-8") if config.exists() else ""
    charts, more = metric_charts(lines)
    last = max(line.get("step", 0) for line in lines)
    drawn = read_metrics(folder / "samples.jsonl")
    pairs = before_and_after(drawn, samples)
    sections = [] if pairs or not drawn else [Section("Samples", table=first_and_last(drawn, samples))]
    page = Page(
        title=folder.resolve().name,
        lead=_lead(last, lines),
        headlines=_last_figures(lines),
        samples=pairs,
        before="First sample",
        after="Last sample",
        sections=[
            *_held_out(folder),
            *sections,
            Section("Curves", charts=charts, more_charts=more, settings=settings),
            *_times(folder),
        ],
        alarms=[alarm_text(alarm) for alarm in read_metrics(folder / "alarms.jsonl")],
    )
    return write_page(page, folder / "report.html")


def before_and_after(lines: Sequence[dict[str, Any]], n: int) -> list[Sample]:
    """The first and the last response to each of up to ``n`` prompts of a samples.jsonl; none if there was one only."""
    first: dict[str, dict[str, Any]] = {}
    last: dict[str, dict[str, Any]] = {}
    for line in lines:
        key = _asked(line)
        first.setdefault(key, line)
        if line["step"] != last.get(key, {}).get("step"):
            last[key] = line
    twice = [key for key in first if last[key]["step"] != first[key]["step"]]
    return [
        Sample(key, _answered(first[key]), _answered(last[key]), first[key].get("score"), last[key].get("score"))
        for key in twice[:n]
    ]


def first_and_last(lines: Sequence[dict[str, Any]], n: int) -> Table:
    """Samples of a run that never met a prompt twice: up to ``n`` of the first step and of the last."""
    rows = []
    for step in dict.fromkeys((lines[0]["step"], lines[-1]["step"])):
        for line in [line for line in lines if line["step"] == step][:n]:
            score = signed(line["score"]) if "score" in line else ""
            rows.append((str(step), _asked(line), _answered(line), score))
    return Table(["step", "prompt", "response", "score"], rows, numbers=["step", "score"])


def _held_out(folder: Path) -> list[Section]:
    """How a reward run was judged on held-out pairs (``evaluation.json``); none for other runs."""
    where = folder / "evaluation.json"
    if not where.exists():
        return []
    found = json.loads(where.read_text(encoding="utf-8"))
    rows = [("accuracy", Interval(**found["accuracy"]).percent(), f"of {found['pairs']} pairs; 95 % interval")]
    if found["length"]:
        longer = Interval(**found["length"]["longer_wins"]).percent()
        rows.append(("the longer one wins", longer, "what counting tokens reaches on them"))
    rows.append(("negative log-likelihood", f"{found['nll']:.3f}", "nats a pair; knowing nothing is 0.693"))
    rows.append(("calibration error", f"{found['ece']:.3f}", "0 = means what it says"))
    return [Section("Held-out pairs", table=Table(["", "value", "what"], rows, numbers=["value"]))]


_WHAT_PARTS_ARE = {
    "time/rollout": "drawing responses",
    "time/collate": "putting records together",
    "time/prepare": "what needs no gradient: rewards, values, log-probs of the reference and of the policy before the update",
    "time/update": "forward, backward and the optimizer's steps",
    "time/evaluation": "held-out records",
}


def _times(folder: Path) -> list[Section]:
    """Where the time of the run went (``times.jsonl``); none for a run that has no such file."""
    lines = read_metrics(folder / TIMES)
    seconds = spent(lines)
    if not seconds:
        return []
    whole = sum(seconds.values())
    rows = [
        (PARTS[name], f"{took:,.1f}", f"{100 * took / whole:.0f} %", _WHAT_PARTS_ARE[name])
        for name, took in seconds.items()
    ]
    speeds = curve(lines, "tokens/second")
    return [
        Section(
            "Where the time went",
            f"{tokens_per_second(lines):,.0f} tokens a second in the batches, prompts included.",
            charts=[line_chart("Speed", "tokens a second", [speeds])] if speeds else [],
            table=Table(["part", "seconds", "share", "what"], rows, numbers=["seconds", "share"]),
        )
    ]


def _lead(last: int, lines: Sequence[dict[str, Any]]) -> str:
    judged = len({line["step"] for line in lines if line.get("split") == "validation" and "step" in line})
    steps = f"{last:,} step" + ("s" if last != 1 else "")
    return f"{steps}, measured on held-out records {judged} times." if judged > 1 else f"{steps}."


_LAST = {
    "loss": ("Loss", "nats"),
    "reward/accuracy": ("Accuracy on pairs", ""),
    "score": ("Score", "reward units"),
    "kl/reference": ("KL to the reference", "nats a sequence"),
    "length/response": ("Length", "tokens a response"),
}


def _last_figures(lines: Sequence[dict[str, Any]]) -> list[Headline]:
    """Last held-out value of each metric that matters; the training one where nothing was held out."""
    found = []
    for metric, (label, unit) in _LAST.items():
        if metric == "loss" and not loss_tells(lines):
            continue
        for split, note in (("validation", "held out"), ("train", "train")):
            values = [line[metric] for line in lines if line.get("split", "train") == split and metric in line]
            if values:
                found.append(Headline(label, f"{values[-1]:.3g}", ", ".join(part for part in (unit, note) if part)))
                break
    return found


def _asked(line: Mapping[str, Any]) -> str:
    """The prompt that a sample began with: of a conversation with an environment, ``prompt`` is all but its last turn."""
    return _prompt_text(line.get("asked", line.get("prompt", "")))


def _answered(line: Mapping[str, Any]) -> str:
    """What was said after it."""
    if "asked" not in line:
        return str(line["response"])
    if isinstance(line["prompt"], str):
        return f"{line['prompt'][len(line['asked']) :]}{line['response']}"
    asked = 1 if isinstance(line["asked"], str) else len(line["asked"])
    return _prompt_text([*line["prompt"][asked:], {"role": "assistant", "content": line["response"]}])


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def signed(value: float) -> str:
    """Two digits and a real minus sign: ``+1.20``, ``−0.35``."""
    return _figure(f"{value:+z.2f}")


def _figure(text: str) -> str:
    """The text of a number, with real minus signs."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\N{MINUS SIGN}", text)


def _text(value: str) -> str:
    return html.escape(value, quote=False)


def _headlines(headlines: Sequence[Headline]) -> str:
    if not headlines:
        return ""
    tiles = (
        f"<div><dt>{_text(h.label)}</dt><dd>{_text(_figure(h.value))}<small>{_text(h.note)}</small></dd></div>"
        for h in headlines
    )
    return f'<dl class="headlines">{"".join(tiles)}</dl>'


def _alarms(alarms: Sequence[str]) -> str:
    if not alarms:
        return ""
    items = ("<br>".join(_text(line.strip()) for line in alarm.splitlines()) for alarm in alarms)
    return f'<h2>Alarms</h2><ul class="alarms">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _table(table: Table | None) -> str:
    if table is None:
        return ""
    kinds = ["number" if column in table.numbers else "" for column in table.columns]
    head = "".join(f'<th class="{k}">{_text(c)}</th>' for c, k in zip(table.columns, kinds, strict=True))
    rows = "".join(
        "<tr>" + "".join(_cell(c, k) for c, k in zip(row, kinds, strict=True)) + "</tr>" for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str, kind: str) -> str:
    return f'<td class="{kind}">{_text(_figure(text) if kind else text)}</td>'


def _samples(page: Page) -> str:
    if not page.samples:
        return ""
    note = f'<p class="text">{_text(page.samples_text)}</p>' if page.samples_text else ""
    return f"<h2>Before and after</h2>{note}" + "".join(_sample(s, page.before, page.after) for s in page.samples)


def _sample(sample: Sample, before: str, after: str) -> str:
    better = ""
    if sample.before_score is not None and sample.after_score is not None and sample.before_score != sample.after_score:
        better = "up" if sample.after_score > sample.before_score else "down"
    return (
        f'<div class="sample"><p>{_text(sample.prompt)}</p><div class="pair">'
        f"{_answer(before, sample.before, sample.before_score, '')}{_answer(after, sample.after, sample.after_score, better)}"
        "</div></div>"
    )


def _answer(who: str, text: str, score: float | None, mark: str) -> str:
    figure = "" if score is None else f'<b class="{mark}">{signed(score)}</b>'
    answer = f"<p>{_text(text)}</p>" if text.strip() else '<p class="none">(nothing)</p>'
    return f'<div><div class="who"><span>{_text(who)}</span>{figure}</div>{answer}</div>'


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
    if section.text:
        parts.append(f'<p class="text">{_text(section.text)}</p>')
    parts.append(_table(section.table))
    if section.charts:
        parts.append(f'<div class="charts">{"".join(section.charts)}</div>')
    if section.more_charts:
        more = f"<summary>All other metrics ({len(section.more_charts)})</summary>"
        parts.append(f'<details>{more}<div class="charts">{"".join(section.more_charts)}</div></details>')
    if section.settings:
        parts.append(f"<details><summary>Settings</summary><pre>{_text(section.settings)}</pre></details>")
    return "\n".join(part for part in parts if part)
