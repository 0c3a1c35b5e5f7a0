"""The arithmetic of benchmarks/: needed operations, order and resumption of runs, the tables. Nothing is measured here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import catalogue
import needed
import plan
import probe
import report
import scaling
import tools

SMALL = needed.Shape(hidden=1, intermediate=1, layers=1, vocabulary=10)  # body: 4 + 3 = 7 weights, head: 10


# -- operations ------------------------------------------------------------------------------------------------------


def test_a_group_needs_its_prompt_once_and_the_head_at_responses_only() -> None:
    """One prompt of 3 tokens, two responses of 2: body 7 (3 + 4), head 10 x 4; two operations a weight, backward twice."""
    rows = 7 * (3 + 4) + 10 * 4
    expected = {"generation": 2 * rows, "scoring": 2 * rows, "update": 6 * rows}
    assert needed.group(SMALL, [3], response=2, size=2) == expected
    assert needed.generation(SMALL, [3], response=2, size=2) == 2 * rows


def test_ppo_needs_three_scoring_forwards_and_trains_two_models() -> None:
    """One prompt of 3 tokens, a response of 2: body 7 x 5 = 35 a model, head 20 of policy and reference alone."""
    expected = {"generation": 2 * 55, "scoring": 2 * 55 + 2 * 35 + 2 * 35, "update": 4 * 6 * (55 + 35)}
    assert needed.ppo(SMALL, [3], response=2, epochs=4) == expected


# -- the plan --------------------------------------------------------------------------------------------------------

ABLE = {"sft": ["palate", "trl"], "grpo": ["palate", "trl"]}


def planned(**changed: Any) -> list[plan.Cell]:
    given = {"jobs": ["sft", "grpo"], "axes": ["group"], "threads": [2, 1], "repeats": 2, "scaling_repeats": 1}
    return plan.cells(ABLE, **(given | changed))


def test_tools_take_turns_and_every_other_round_goes_backwards() -> None:
    first = [(c.threads, c.repeat, c.job, c.tool) for c in planned()[:8]]
    assert first == [
        (2, 0, "sft", "palate"),
        (2, 0, "sft", "trl"),
        (2, 0, "grpo", "palate"),
        (2, 0, "grpo", "trl"),
        (2, 1, "sft", "trl"),
        (2, 1, "sft", "palate"),
        (2, 1, "grpo", "trl"),
        (2, 1, "grpo", "palate"),
    ]


def test_a_plan_has_every_cell_once_and_scaling_last() -> None:
    cells = planned()
    assert len(set(cells)) == len(cells) == 2 * 2 * 2 * 2 + 2 * len(scaling.AXES["group"].values)
    assert [bool(c.axis) for c in cells] == sorted(bool(c.axis) for c in cells)
    assert {c.value for c in planned(ends=True) if c.axis} == {1, 16}


def run_of(cell: plan.Cell, **more: Any) -> dict[str, Any]:
    run = {"threads": cell.threads, "job": cell.job, "key": cell.tool, "repeat": cell.repeat, **more}
    return run | ({"axis": cell.axis, "value": cell.value} if cell.axis else {})


def test_resuming_leaves_finished_cells_alone_and_tries_failed_ones_again() -> None:
    cells = planned(axes=[])
    runs = [run_of(cells[0]), run_of(cells[1], error="exit 1")]
    to_do = plan.still_to_do(cells, runs)
    assert to_do == cells[1:]
    assert plan.without(runs, set(to_do)) == runs[:1]  # the failure makes room for the new run


def test_a_point_that_did_not_fit_is_not_tried_again_in_any_repeat() -> None:
    cells = planned(jobs=[], scaling_repeats=2)
    runs = [run_of(cells[0], error="does not fit in memory")]
    to_do = plan.still_to_do(cells, runs)
    assert [c for c in cells if c.point == cells[0].point] == [cells[0], cells[0]._replace(repeat=1)]
    assert to_do == [c for c in cells if c.point != cells[0].point]
    assert plan.without(runs, set(to_do)) == runs


def test_the_time_left_follows_what_the_finished_cells_took() -> None:
    """Guessed 240 s, took 480 s; with 120 s as guessed thrown in: (120 + 480) / (120 + 240) = 5/3 of the guesses."""
    done, next_one, *_ = planned()
    guessed = {done: 240.0, next_one: 30.0}
    assert plan.seconds_left(guessed, [next_one], {}) == 30
    assert plan.seconds_left(guessed, [next_one], {done: 480.0}) == pytest.approx(50)


def test_a_guess_grows_with_steps_cost_and_along_an_axis_and_shrinks_with_threads() -> None:
    cell = plan.Cell(2, "sft", "trl", 0)
    assert plan.guess(cell, 1.0, 8, 2) == plan.START_S + 8 * catalogue.JOBS["sft"].peer_s
    assert plan.guess(cell._replace(threads=1), 1.0, 8, 2) == plan.START_S + 16 * catalogue.JOBS["sft"].peer_s
    point = [plan.guess(plan.Cell(2, "sft", "trl", 0, "size", n), 1.0, 3, 2) for n in scaling.AXES["size"].values]
    assert point == sorted(point) and point[0] < point[-1]


@pytest.mark.parametrize(("seconds", "said"), [(12, "12 s"), (59.6, "60 s"), (400, "7 min"), (11100, "3 h 05 min")])
def test_a_time_is_said_in_the_unit_that_suits_it(seconds: float, said: str) -> None:
    assert plan.clock(seconds) == said


# -- the tables ------------------------------------------------------------------------------------------------------


def step(seconds: float, tokens: int, **phases: float) -> dict[str, Any]:
    return {"s": seconds, "cpu_s": seconds, "tokens": tokens, "phases": phases, "metrics": {}}


def measured(job: str, tool: str, steps: list[dict[str, Any]], mb: float, **more: Any) -> dict[str, Any]:
    run = {"job": job, "tool": tool, "key": tool, "threads": 2, "repeat": 0, "gflops": 100.0, "steps": steps}
    return run | {"import_mb": 400.0, "peak_mb": 400.0 + mb, "ready_s": 1.0, "wall_s": 5.0} | more


def results_of(*runs: dict[str, Any], steps: int = 4) -> dict[str, Any]:
    lengths = {"sft": [[10, 20]] * 400, "pairs": [[10, 20, 30]] * 200, "prompts": [[10]] * 400}
    return {
        "machine": {"processor": "a processor", "cores": 2},
        "settings": {
            "steps": {job: steps for job in catalogue.JOBS},
            "vocabulary": 8192,
            "size": 10,
            "workload": {"vocabulary": 8192, "lengths": lengths},
            "started": "today",
        },
        "runs": list(runs),
        "skipped": [],
    }


def test_warm_up_is_left_out_and_a_rate_is_a_sum_over_a_sum() -> None:
    """After two steps of warm-up: 300 tokens in 4 s; the mean of the two rates, 100 and 66.7, would be another number."""
    steps = [step(50, 100), step(50, 100), step(1, 100), step(3, 200)]
    row = report.figures(measured("sft", "palate", steps, 1), results_of()["settings"], peak=100.0)
    assert row["tokens_s"] == 75 and row["s_step"] == 2 and row["samples_s"] == 16 * 2 / 4


def test_the_share_of_the_peak_is_needed_operations_by_time_and_peak() -> None:
    """Four equal steps, two counted: half of the needed operations in 2 s at a peak of 100 GFLOP/s."""
    settings = results_of()["settings"]
    row = report.figures(measured("sft", "palate", [step(1, 100)] * 4, 1), settings, peak=100.0)
    body, head = 6 * (4 * 288**2 + 3 * 288 * 768), 288 * 8192
    operations = 16 * 4 * 6 * (20 * body + 10 * head)
    assert row["share"] == pytest.approx(operations / 2 / 2 / 100e9)


def test_the_phases_of_a_sampling_step_are_shares_of_it_and_the_update_has_its_own_share_of_the_peak() -> None:
    steps = [step(9, 10, generation=9)] + [step(4, 10, generation=1, scoring=1, update=2)] * 3
    settings = results_of()["settings"]
    row = report.figures(measured("ppo", "palate", steps, 1), settings, peak=100.0)
    assert (row["generation"], row["scoring"], row["update"]) == (0.25, 0.25, 0.5)
    parts = report.needed_operations("ppo", settings)
    assert row["update_share"] == pytest.approx(parts["update"] * 3 / 4 / (3 * 2) / 100e9)
    assert row["share"] == pytest.approx(sum(parts.values()) * 3 / 4 / (3 * 4) / 100e9)


def test_ratios_are_of_medians_to_the_peer_of_the_job() -> None:
    runs = [measured("sft", "palate", [step(1, n)] * 4, mb) for n, mb in ((400, 10), (500, 20), (900, 90))]
    runs += [
        measured("sft", "TRL", [step(1, 100)] * 4, 100),
        measured("sft", "TRL, malloc tuned", [step(1, 200)] * 4, 200),
    ]
    runs += [measured("generation", "palate", [step(1, 30)] * 4, 5)]
    runs += [measured("generation", "transformers generate", [step(1, 10)] * 4, 10)]
    rows = {(row["job"], row["tool"]): row for row in report.summary(results_of(*runs))}
    sft = rows["sft", "palate"]
    assert (sft["speed_ratio"], sft["speed_ratio_tuned"], sft["memory_ratio"]) == (5, 2.5, 0.2)
    assert rows["generation", "palate"]["speed_ratio"] == 3 and "speed_ratio_tuned" not in rows["generation", "palate"]


def test_a_run_that_failed_is_a_line_with_its_reason() -> None:
    broken = {
        "job": "sft",
        "tool": "TRL",
        "threads": 2,
        "repeat": 0,
        "gflops": 90.0,
        "error": "exit 1; see sft-trl.log",
    }
    results = results_of(measured("sft", "palate", [step(1, 100)] * 4, 10), broken)
    page = report.text(results)
    line = next(line for line in page.splitlines() if line.startswith("| SFT | TRL |"))
    assert "failed: exit 1; see sft-trl.log" in line and line.count("|") == 13
    assert "not measured (≥ 5)" in page


def test_a_wanted_figure_is_met_as_measured_not_as_rounded() -> None:
    assert report.verdict({"speed_ratio": 4.996}, "speed_ratio", 5, True) == "5.00 (≥ 5) **not met**"
    assert report.verdict({"speed_ratio": 5.0}, "speed_ratio", 5, True) == "5.00 (≥ 5) met"
    assert report.verdict({"memory_ratio": 0.21}, "memory_ratio", 0.2, False) == "0.21 (≤ 0.2) **not met**"
    assert report.verdict({"share": 0.57}, "share", 0.55, True) == "57 % (≥ 55 %) met"


def test_a_wide_vocabulary_has_its_own_wanted_memory() -> None:
    assert ("memory_ratio", 0.2, False) in report.wanted_of("sft", 8192)
    assert ("memory_ratio", 0.15, False) in report.wanted_of("sft", 32768)
    assert ("memory_ratio", 0.2, False) in report.wanted_of("dpo", 32768)


def test_a_point_of_scaling_that_failed_is_reported_and_the_rest_are_medians() -> None:
    point = {"axis": "length", "value": 64}
    runs = [measured("sft", "palate", [step(9, 1), step(1, n), step(1, n)], 50, **point) for n in (100, 200, 900)]
    runs += [{**measured("sft", "TRL", [], 0, **point), "error": "does not fit in memory"}]
    ours, theirs = scaling.summary(runs)
    assert (ours["tokens_s"], ours["memory_mb"]) == (200, 50) and theirs["error"] == "does not fit in memory"
    assert scaling.table([ours, theirs]).splitlines()[2] == (
        "| response length, tokens (sft) | 64 | 2 | 200 | does not fit in memory |  | 50 | does not fit in memory |  |"
    )


# -- the parts that touch the system ---------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock for the probe that stands until it is set."""
    clock = [0.0]
    monkeypatch.setattr(probe, "now", lambda: clock[0])
    yield clock


def test_phases_inside_others_count_once_and_the_rest_fills_the_step(ticking: list[float], tmp_path: Path) -> None:
    noted = probe.Probe(str(tmp_path / "figures.json"))
    noted.begin()
    with noted.phase("scoring"):
        ticking[0] = 1.0
        with noted.phase("generation"):
            ticking[0] = 4.0
        ticking[0] = 6.0
    ticking[0] = 10.0
    noted.rest("update")
    noted.step()
    found = noted.facts["steps"][0]
    assert found["s"] == 10 and found["phases"] == {"generation": 3, "scoring": 3, "update": 4}


def test_every_tool_has_its_scripts_and_every_job_its_peer() -> None:
    known = tools.tools()
    scripts = [script for tool in known.values() for _, script in tool.scripts.values()]
    assert [script.name for script in scripts if not script.exists()] == []
    for name, job in catalogue.JOBS.items():
        able = {tool.name for tool in known.values() if name in tool.scripts}
        assert {"palate", job.peer, job.tuned} <= able


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PALATE_BENCH_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *words],
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )


def test_the_command_that_measures_imports_no_heavy_library(tmp_path: Path) -> None:
    script = "import run, sys; print([n for n in ('torch', 'numpy', 'matplotlib', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=BENCHMARKS, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_starts_nothing_and_says_what_is_left_out(tmp_path: Path) -> None:
    done = command("--plan", "--jobs", "sft", "--threads", "1", "--repeats", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sft, palate, 1 thread: 2 runs to do, about") == 1, "one line for all repeats"
    assert "left out: TRL (SFT): no environment 'trl'" in done.stdout
    assert "2 of 2 cells to do" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_plan_knows_what_is_done_and_refuses_other_settings(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    settings = {"steps": {"sft": 8}, "vocabulary": 8192, "size": 10, "device": "cpu"}
    runs = [{"job": "sft", "tool": "palate", "key": "palate", "threads": 1, "repeat": 0}]
    (folder / "results.json").write_text(json.dumps({"settings": settings, "runs": runs}))
    words = ("--plan", "--resume", "--jobs", "sft", "--threads", "1", "--repeats", "2")
    done = command(*words, folder=tmp_path)
    assert "sft, palate, 1 thread: 1 of 2 runs to do" in done.stdout and "1 of 2 cells to do" in done.stdout
    finished = command(*words[:-1], "1", folder=tmp_path)
    assert "sft, palate, 1 thread: done" in finished.stdout and "0 of 1 cells to do" in finished.stdout
    refused = command(*words, "--steps", "3", folder=tmp_path)
    assert refused.returncode != 0 and "sft was measured with 8 steps, not 3. Give another --out." in refused.stderr
