"""The demo from beginning to end in small: every stage runs, the page and the table are made, a second run keeps all."""

import json

import pytest
import yaml

from palate.errors import ConfigError
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
    "dpo.training.max_steps=2",
    "dpo.training.save_every=1",
    "answers.max_new_tokens=8",
    "held_out_answers.max_new_tokens=8",
    "compare.max_new_tokens=8",
    "compare_dpo.max_new_tokens=8",
    "frontier.max_new_tokens=8",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, run_pipeline("quickstart", out=out, overrides=SMALL, quiet=True)


def test_every_stage_leaves_what_the_next_one_reads(run):
    out, result = run
    for path in (
        *("sft/model", "reward/model", "ppo/model", "dpo/model"),
        *("report/report.html", "compare/comparison.json", "compare_dpo/comparison.json", "frontier/frontier.json"),
    ):
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


def test_dpo_and_the_reward_model_learn_from_the_same_rankings_and_start_from_sft(run):
    out, _ = run
    settings = {name: yaml.safe_load((out / name / "config.yaml").read_text()) for name in ("dpo", "reward", "ppo")}
    assert settings["dpo"]["data"]["train"] == settings["reward"]["data"]["train"]
    assert settings["dpo"]["model"] == settings["ppo"]["model"] == str(out / "sft" / "model")


def test_both_are_compared_with_the_same_answers_of_the_model_before(run):
    out, _ = run
    one, two = (json.loads((out / name / "comparison.json").read_text()) for name in ("compare", "compare_dpo"))
    assert one["before"] == two["before"] and one["prompts"] == two["prompts"]
    assert one["gold_values"]["before"] == two["gold_values"]["before"]


def test_the_frontier_begins_at_the_reference_and_ends_at_the_models(run):
    """Each run: its kept checkpoints but the last, which is the model, and the model; steps ascend."""
    out, _ = run
    found = json.loads((out / "frontier" / "frontier.json").read_text())
    assert found["start"]["kl"] == [0.0, 0.0, 0.0] and found["prompts"] == 8
    for name, points in found["runs"].items():
        kept = sorted(int(p.name[5:]) for p in (out / name.lower() / "checkpoints").glob("step-*"))
        assert [p["step"] for p in points] == kept and [p["final"] for p in points] == [False] * (len(kept) - 1) + [
            True
        ]
    assert set(found["runs"]) == {"PPO", "DPO"} and len(found["runs"]["DPO"]) == 2


def test_the_page_shows_every_part(run):
    out, _ = run
    page = (out / "report" / "report.html").read_text()
    for word in (
        "after (DPO)",
        "Directly from the preferences",
        "Gold preference against distance",
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


def test_a_report_without_the_second_policy_has_two_columns_only(run):
    """The stages beside the classic three are optional; half of them is a mistake."""
    out, _ = run
    (out / ".stages" / "report.json").unlink()
    plain = ["report.direct=''", "report.compare_direct=''", "report.frontier=''"]
    run_pipeline("quickstart", out=out, overrides=SMALL + plain, quiet=True)
    page = (out / "report" / "report.html").read_text()
    assert "after (PPO)" in page and "after (DPO)" not in page and "against distance" not in page
    for wrong, words in (
        ("report.direct=''", "Give both, or neither"),
        ("report.frontier=frontir", "no stage 'frontir'"),
    ):
        (out / ".stages" / "report.json").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=words):
            run_pipeline("quickstart", out=out, overrides=[*SMALL, wrong], quiet=True)
    run_pipeline("quickstart", out=out, overrides=SMALL, quiet=True)
