"""The demo from beginning to end in small: every stage runs, the page and the table are made, a second run keeps all."""

import json

import pytest

from palate.pipelines.runner import run_pipeline

SMALL = [
    "world.prompts=60",
    "world.held_out=8",
    "sft.model.hidden_size=16",
    "sft.model.intermediate_size=24",
    "sft.model.num_hidden_layers=1",
    "sft.training.max_steps=4",
    "reward.training.max_steps=3",
    "ppo.training.max_steps=2",
    "ppo.training.batch_size=4",
    "ppo.sampling.max_new_tokens=8",
    "answers.max_new_tokens=8",
    "held_out_answers.max_new_tokens=8",
    "compare.max_new_tokens=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, run_pipeline("quickstart", out=out, overrides=SMALL, quiet=True)


def test_every_stage_leaves_what_the_next_one_reads(run):
    out, result = run
    for path in ("sft/model", "reward/model", "ppo/model", "report/report.html", "compare/comparison.json"):
        assert (out / path).exists(), path
    assert list(result["stages"])[-1] == "report"
    assert not list(out.glob("*.part"))


def test_the_figures_of_the_comparison_are_whole(run):
    out, _ = run
    figures = json.loads((out / "compare" / "comparison.json").read_text())
    assert figures["prompts"] == 8
    assert figures["responses"] == 16
    low, high = figures["win_rate"][1:]
    assert 0 <= low <= figures["win_rate"][0] <= high <= 1
    assert figures["after"]["tokens"] <= 8
    assert len((out / "compare" / "samples.jsonl").read_text().splitlines()) == 8


def test_gold_is_watched_and_never_trained_on(run):
    """With weight 0 the score of PPO is the reward model's alone, and gold is in the metrics."""
    out, _ = run
    lines = [json.loads(line) for line in (out / "ppo" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert all(line["score"] == pytest.approx(line["score/reward"]) for line in train)
    assert all("score/gold" in line for line in train)


def test_the_page_shows_every_part(run):
    out, _ = run
    page = (out / "report" / "report.html").read_text()
    for word in (
        "Win rate",
        "Before and after",
        "Reinforcement learning",
        "Calibration",
        "KL to the reference",
        "its ceiling",
    ):
        assert word in page


def test_the_same_command_again_does_nothing(run):
    out, result = run
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_pipeline("quickstart", out=out, overrides=SMALL, quiet=True) == result
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_a_stage_that_was_not_finished_is_run_again(run):
    """Without its marker the report is written anew; the trained stages stay as they are."""
    out, _ = run
    (out / ".stages" / "report.json").unlink()
    (out / "report" / "report.html").unlink()
    run_pipeline("quickstart", out=out, overrides=SMALL, quiet=True)
    assert (out / "report" / "report.html").exists()
