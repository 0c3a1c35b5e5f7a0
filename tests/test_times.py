"""Where the time goes: on the terminal, in ``times.jsonl`` through kills, in the report."""

import json
import re

import pytest

from palate.report.page import report_run
from palate.stage import progress
from palate.stage.progress import pace, watched
from palate.training.times import FILE, shares, spent, summary, timed, tokens_per_second


def batch(step, rollout=6.0, prepare=1.0, update=3.0, tokens=1000):
    times = {"time/rollout": rollout, "time/prepare": prepare, "time/update": update}
    return {
        "step": step,
        "split": "train",
        "score": 1.23456,
        "kl/reference": 0.0123456,
        "length/response": 123.456,
        "tokens/all": tokens,
        "tokens/second": tokens / sum(times.values()),
    } | times


def kept(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_tokens_per_second_is_all_tokens_by_all_time_and_not_a_mean_of_rates():
    """1000 tokens in 10 s and 1000 in 2 s: 2000 in 12 s, though the mean of the rates is 300."""
    assert tokens_per_second([batch(1), batch(2, 1.0, 0.0, 1.0)]) == pytest.approx(2000 / 12)
    assert tokens_per_second([]) == 0


def test_shares_are_of_all_that_is_known_and_leave_out_next_to_nothing():
    assert shares([batch(1)]) == "generation 60 %, scoring 10 %, update 30 %"
    lines = [batch(1, prepare=0.001), {"step": 1, "split": "validation", "time/evaluation": 9.0}]
    assert shares(lines) == "generation 33 %, update 17 %, evaluation 50 %"
    assert list(spent(lines)) == ["time/rollout", "time/prepare", "time/update", "time/evaluation"]
    assert summary(lines).startswith("1 batch in 18 s, 111 tokens/s: ")


def test_times_are_of_batches_that_count_though_the_run_was_killed_and_done_again(tmp_path):
    """Killed after batch 4 in the middle of a line, resumed from the checkpoint at 2: each batch stands once, the last try."""
    assert [m["step"] for m in timed([batch(s) for s in (1, 2, 3, 4)], tmp_path)] == [1, 2, 3, 4]
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 5, "spl')
    list(timed([batch(s, update=7.0) for s in (3, 4, 5)], tmp_path))
    assert [(line["step"], line["time/update"]) for line in kept(tmp_path)] == [(1, 3), (2, 3), (3, 7), (4, 7), (5, 7)]
    assert not list(tmp_path.glob(".*"))
    list(timed([{"step": 0, "split": "validation", "loss": 1.0}, batch(1)], tmp_path))  # killed before any checkpoint
    assert [line["step"] for line in kept(tmp_path)] == [0, 1]


def test_a_line_of_times_is_written_before_the_loop_goes_on(tmp_path):
    stream = timed(iter([batch(1), {"step": 1, "split": "validation", "loss": 2.0}]), tmp_path)
    next(stream)
    assert [line["step"] for line in kept(tmp_path)] == [1]
    next(stream)
    assert "loss" not in kept(tmp_path)[1] and kept(tmp_path)[1]["time/evaluation"] >= 0


def test_a_log_says_tokens_per_second_and_the_split_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    list(watched([batch(1), batch(2)], 2, "ppo", quiet=False))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[1] == said[3] == "  100 tokens/s: generation 60 %, scoring 10 %, update 30 %"
    assert all(len(line) <= 80 for line in said)


def test_a_terminal_of_eighty_columns_shows_all_of_it(capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    list(watched([batch(1), batch(2)], 2, "a-run-of-ppo", quiet=False))
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "2/2" in said and "…" not in said
    assert "score 1.235  kl/reference 0.01235  length/response 123.5" in said
    assert "100 tokens/s: generation 60 %, scoring 10 %, update 30 %" in said
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80


def test_a_method_that_samples_nothing_shows_its_rate_alone():
    line = {"step": 1, "split": "train", "tokens/all": 50, "tokens/second": 25.0, "time/collate": 1, "time/update": 1}
    assert pace([line]) == "25 tokens/s" and pace([]) == ""


def test_the_report_says_where_the_time_went(tmp_path):
    lines = [{"step": s, "split": "train", "loss": 1.0 / s} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Where the time went" not in report_run(tmp_path).read_text()  # a run of an earlier version
    list(timed([batch(1), batch(2), batch(3)], tmp_path))
    page = re.sub(r"<[^>]*>", " ", report_run(tmp_path).read_text())
    assert "Where the time went" in page and "100 tokens a second" in page
    assert re.search(r"generation\s+18\.0\s+60 %", page) and re.search(r"update\s+9\.0\s+30 %", page)
