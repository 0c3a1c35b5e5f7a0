"""The page: complete, self-contained, faithful to the run's files, safe against what a model may write."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from palate.errors import RunError
from palate.evaluation.reward_model import Bin, evaluate_reward_model
from palate.evaluation.statistics import Interval
from palate.report.charts import Curve, distribution_chart, line_chart, reliability_chart, running_mean
from palate.report.frontier_chart import Dot, Family, frontier_chart
from palate.report.metrics import curve, metric_charts, read_metrics
from palate.report.page import (
    Headline,
    Page,
    Sample,
    Section,
    Table,
    before_and_after,
    first_and_last,
    render,
    report_run,
    signed,
    write_page,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Nesting(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    return "".join(parser.text)


def a_page(**changes):
    return Page(
        title="A waiter learns",
        lead="What happened.",
        headlines=[Headline("Win rate", "81 %", "77 to 85")],
        table=Table(["figure", "SFT"], [["gold", "0.71"]], numbers=["SFT"]),
        samples=[Sample("A question?", "Before.", "After.", 0.5, -1.25)],
        sections=[
            Section("PPO", "Text.", [line_chart("Score", "units", [Curve("score", [0, 1], [0, 1])])], settings="a: 1")
        ],
        **changes,
    )


def run_folder(tmp_path, steps=50):
    lines = [
        {"step": s, "split": "train", "loss": 3.0 / (1 + s), "score": s * 0.1, "time/step": 1.0} for s in range(steps)
    ]
    lines += [{"step": s, "split": "validation", "loss": 3.5 / (1 + s), "odd/metric": 1.0 * s} for s in (0, 25, 49)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [{"step": s, "prompt": "Q?", "response": f"answer {s}", "score": s / 10} for s in (0, 20, 49)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (tmp_path / "config.yaml").write_text("method: ppo\n")
    return tmp_path


def test_the_page_holds_everything_it_was_given_and_its_tags_nest():
    text = read(render(a_page()))
    for word in (
        "A waiter learns",
        "81 %",
        "77 to 85",
        "0.71",
        "A question?",
        "Before.",
        "After.",
        "+0.50",
        "−1.25",
        "a: 1",
    ):
        assert word in text


def test_nothing_is_loaded_from_anywhere():
    page = render(a_page())
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b", page)
    assert not re.search(r"url\((?!#)|@import|src=", page)
    hrefs = re.findall(r'href="([^"]*)"', page)
    assert all(href.startswith("#") for href in hrefs)


def test_what_a_model_writes_is_text_and_never_markup():
    page = render(
        a_page(alarms=["<b>x</b>"]).__class__(
            "<i>", "&", samples=[Sample("<script>alert(1)</script>", "</div>", "a & b")]
        )
    )
    assert "<script>" not in page
    assert "<script>alert(1)</script>" in read(page)


def test_charts_wear_the_colours_of_the_page():
    """Every colour is a CSS variable that the style sheet defines, for light and for dark; no stand-in is left."""
    chart = line_chart(
        "Loss", "nats", [Curve("train", range(80), np.arange(80.0)), Curve("held out", [0, 79], [1, 2], True)]
    )
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", chart)
    assert "font-family" not in chart and "DejaVu" not in chart
    style = render(Page("t", "l"))
    used = set(re.findall(r"var\((--[\w-]+)\)", chart))
    assert {"--series-1", "--series-2", "--ink", "--quiet", "--rule"} <= used
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    for name in used:
        assert f"{name}:" in light
        assert f"{name}:" in dark


def test_an_axis_says_its_whole_numbers():
    chart = line_chart("Entropy", "nats", [Curve("train", [1, 2, 3], [8.7471, 8.7474, 8.7472])])
    assert ">8.747" in chart and "+8.747" not in chart


def test_charts_of_one_page_do_not_share_clip_paths():
    charts = [line_chart(t, "", [Curve("x", [0, 1], [0, 1])]) for t in ("One", "Two")]
    ids = [set(re.findall(r'<clipPath id="([^"]+)"', c)) for c in charts]
    assert ids[0] and ids[1]
    assert not ids[0] & ids[1]


def test_the_same_chart_is_the_same_text():
    draw = [line_chart("One", "", [Curve("x", [0, 1], [0, 1])]) for _ in range(2)]
    assert draw[0] == draw[1]


def test_running_mean_by_hand():
    assert running_mean([1.0, 2.0, 6.0, 3.0], 1).tolist() == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert running_mean([1.0, 2.0], 0).tolist() == [1.0, 2.0]


def test_special_charts_draw():
    assert "Calibration" in reliability_chart([Bin(0.5, 0.6, 10, 0.55, 0.5), Bin(0.6, 0.7, 5, 0.66, 0.8)])
    chart = distribution_chart("Gold", "", {"SFT": [0.0, 1.0, 1.0], "PPO": [2.0, 2.0, 2.0]})
    assert "SFT" in chart and "PPO" in chart
    assert "<svg" in distribution_chart("Gold", "", {"all alike": [2.0, 2.0]})


def frontier(*families, **more):
    return frontier_chart("Gold against KL", "", families, across="KL", up="gold", **more)


def test_the_frontier_names_every_dot_and_rings_the_best():
    """A ring is a circle without filling, in the colour of the text: one for each dot that is best."""
    dots = [
        Dot(Interval(2.0, 1.5, 2.5), Interval(1.0, 0.5, 1.5), "beta 0.1", True),
        Dot(4.0, 0.5, "beta 0.5", trail=[(0, 0)]),
    ]
    chart = frontier(Family("dpo", dots, joined=True), Family("", [Dot(0.0, 0.0, "reference")], quiet=True), root=True)
    for word in ("beta 0.1", "beta 0.5", "reference", "Gold against KL", "chart wide"):
        assert word in chart
    ring = 'style="fill-opacity: 0; stroke: var(--ink)'
    assert chart.count(ring) == 1 and ring not in frontier(Family("dpo", [Dot(4.0, 0.5, "beta 0.5")]))
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", chart)


def test_names_of_neighbours_do_not_cover_each_other():
    """Two dots at one place: their names stand at different heights or sides."""
    chart = frontier(Family("", [Dot(1.0, 1.0, "one name"), Dot(1.0, 1.0, "other name"), Dot(3.0, 2.0, "far")]))
    places = re.findall(
        r"<!-- ([a-z ]+) -->\s*<text[^>]*transform=\"([^\"]*)\"|<text[^>]*(?:x=\"([^\"]*)\" y=\"([^\"]*)\")[^>]*>([^<]*)<",
        chart,
    )
    where = {p[0] or p[4]: p[1] or (p[2], p[3]) for p in places}
    assert where["one name"] != where["other name"]


def test_many_families_have_one_colour_and_no_legend():
    few = frontier(*(Family(f"f{i}", [Dot(float(i), 1.0)]) for i in range(4)))
    many = frontier(*(Family(f"f{i}", [Dot(float(i), 1.0)]) for i in range(5)))
    assert ">f3</text>" in few and "var(--series-4)" in few
    assert ">f3</text>" not in many and "var(--series-2)" not in many


def test_known_metrics_are_drawn_others_folded_and_clocks_left_out(tmp_path):
    known, rest = metric_charts(read_metrics(run_folder(tmp_path) / "metrics.jsonl"))
    assert [re.search("<figcaption>([^<]*)", c)[1] for c in known] == ["Loss", "Score"]
    assert [re.search("<figcaption>([^<]*)", c)[1] for c in rest] == ["odd/metric"]
    assert "held out" in known[0]


def test_what_says_nothing_in_a_run_is_folded():
    """A policy gradient's loss is about 0 whatever is learnt, and a metric that never moved is a flat line."""
    lines = [{"step": i, "loss": 1e-8 * i, "score": 0.1 * i, "kl/old": 0.0, "clip_fraction": 0.0} for i in range(3)]
    titles = [[re.search("<figcaption>([^<]*)", c)[1] for c in part] for part in metric_charts(lines)]
    assert titles == [["Score"], ["loss", "kl/old", "clip_fraction"]]


def test_a_half_written_last_line_is_left_out(tmp_path):
    where = run_folder(tmp_path, steps=3) / "metrics.jsonl"
    whole = read_metrics(where)
    where.write_text(where.read_text() + '{"step": 4, "lo')
    assert read_metrics(where) == whole
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_metric_measured_once_is_no_curve():
    lines = [{"step": 0, "split": "train", "loss": 1.0}, {"step": 1, "split": "train", "loss": float("nan")}]
    assert curve(lines, "loss") is None
    assert curve([*lines, {"step": 2, "loss": 3.0}], "loss").steps == [0, 2]


def test_before_and_after_takes_first_and_last_of_each_prompt():
    lines = [{"step": s, "prompt": p, "response": f"{p}{s}"} for s in (0, 5, 9) for p in ("a", "b")]
    lines.append({"step": 9, "prompt": [{"role": "user", "content": "new"}], "response": "once"})
    found = before_and_after(lines, 5)
    assert [(s.prompt, s.before, s.after) for s in found] == [("a", "a0", "a9"), ("b", "b0", "b9")]
    assert len(before_and_after(lines, 1)) == 1


def test_a_run_folder_becomes_a_page(tmp_path):
    where = report_run(run_folder(tmp_path))
    text = read(where.read_text())
    assert where.name == "report.html"
    for word in (tmp_path.name, "49 steps", "answer 0", "answer 49", "method: ppo", "held out"):
        assert word in text
    assert not list(tmp_path.glob("*.tmp"))


def test_numbers_of_a_page_have_real_minus_signs_and_no_negative_zero():
    table = Table(["setting", "kl"], [["beta=-1e-05", "-0.23 [-0.30, 1e-05]"]], numbers=["kl"])
    said = render(Page("p", "l", headlines=[Headline("Score", "-9.19")], table=table, sections=[]))
    assert "<dd>−9.19<" in said and "−0.23 [−0.30, 1e-05]" in said
    assert "beta=-1e-05" in said  # not a number of the table: as it is typed
    assert signed(-0.001) == "+0.00" and str(Interval(-0.0001, -0.1, 0.1)) == "0.000 [-0.100, 0.100]"


def test_a_reward_run_shows_how_it_was_judged(tmp_path):
    folder = run_folder(tmp_path)
    found = evaluate_reward_model([1.0, 2.0, 0.0], [0.0, 0.0, 1.0], chosen_length=[3, 1, 2], rejected_length=[1, 2, 3])
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict()))
    text = read(report_run(folder).read_text())
    for word in ("Held-out pairs", found.accuracy.percent(), "the longer one wins", f"{found.nll:.3f}", "of 3 pairs"):
        assert word in text
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict() | {"length": None}))
    assert "the longer one wins" not in read(report_run(folder).read_text())


def test_samples_of_different_prompts_are_listed_first_and_last():
    lines = [
        {"step": s, "prompt": f"question {s}{i}", "response": f"said {s}{i}", "score": -0.5}
        for s in (0, 4, 9)
        for i in "ab"
    ]
    assert before_and_after(lines, 5) == []
    assert [row[2] for row in first_and_last(lines, 1).rows] == ["said 0a", "said 9a"]
    assert first_and_last(lines, 2).rows[0] == ("0", "question 0a", "said 0a", "−0.50")


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(RunError, match="no metrics to report"):
        report_run(tmp_path)


def test_a_page_that_cannot_be_written_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="report cannot be written"):
        write_page(Page("t", "l"), tmp_path / "file" / "report.html")
