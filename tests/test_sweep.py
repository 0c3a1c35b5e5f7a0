"""Sweeps: which runs a command means, that they are ordinary runs, that nothing is done twice, what is drawn."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palate.cli import app
from palate.errors import ConfigError
from palate.models.load import save_model
from palate.pipelines.sweep.plan import METHOD, full_key, label_of, make_plan, split_values
from tiny import tiny, tokenizer_of

PAIRS = [{"prompt": f"{a} {b} ", "chosen": "a c", "rejected": "d e"} for a in "abcdefghijklmnop" for b in "ab"]
FLAGS = {"model": "base", "data.train": "pairs.jsonl"}
QUICK = ["training.max_steps=2", "training.batch_size=4", "training.learning_rate=1e-2", "sampling.max_new_tokens=4"]
REWARDS = "def likes_a(responses):\n    return [r.split().count('a') for r in responses]\n\n\n"
REWARDS += "def brief(responses):\n    return [-len(r.split()) for r in responses]\n"


def world(folder: Path) -> None:
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in PAIRS))
    (folder / "rewards.py").write_text(REWARDS)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    world(tmp_path)
    return tmp_path


COMMAND = ["dpo", "beta=0.05,0.5", "--reward", "rewards.py:likes_a", "--gold", "rewards.py:brief"]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which COMMAND is done."""
    folder = tmp_path_factory.mktemp("once")
    world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        swept(*COMMAND)
    return folder


@pytest.fixture
def done(once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of it to go on in, and what the command found."""
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = json.loads(Path("out/sweep.json").read_text())
    return found


def palate(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception}"
    return result


def swept(*arguments: object, code: int = 0) -> dict[str, Any]:
    flags = ["-m", "base", "-d", "pairs.jsonl", "-o", "out", "-n", 8, "--json"]
    found: dict[str, Any] = json.loads(palate("sweep", *arguments, *QUICK, *flags, code=code).stdout)
    return found


# -- which runs ------------------------------------------------------------------------------------------------------


def test_every_combination_is_a_run_whose_name_says_what_is_swept() -> None:
    plan = make_plan("dpo", ["beta=0.05,0.1", "training.learning_rate=1e-5,0.0001", "training.epochs=2"], flags=FLAGS)
    assert [s.name for s in plan.settings] == [
        "beta=0.05__learning_rate=1e-5",
        "beta=0.05__learning_rate=0.0001",
        "beta=0.1__learning_rate=1e-5",
        "beta=0.1__learning_rate=0.0001",
    ]
    assert plan.keys == ("method.beta", "training.learning_rate") and plan.out == Path("runs/sweep-dpo")
    third = plan.settings[2].config
    assert (third.method.settings.beta, third.training.learning_rate, third.training.epochs) == (0.1, 1e-5, 2)
    assert third.out == plan.out / plan.settings[2].name


@pytest.mark.parametrize("text", ["1e-5", "0.00001", "1.0e-5"])
def test_a_number_written_otherwise_is_the_same_run(text: str) -> None:
    plan = make_plan("dpo", [f"training.learning_rate={text},1"], flags=FLAGS)
    assert plan.settings[0].name == "learning_rate=1e-5"


def test_values_that_look_alike_in_a_name_have_folders_of_their_own() -> None:
    plan = make_plan("dpo", ["model=x/y,x-y"], flags={"data.train": "d"})
    names = [s.name for s in plan.settings]
    assert len(set(names)) == 2 and all(name.startswith("model=x-y-") for name in names)
    again = make_plan("dpo", ["model=x-y,x/y"], flags={"data.train": "d"})
    assert {s.name for s in again.settings} == set(names)  # by the value, not by its place


def test_several_methods_are_swept_like_a_setting() -> None:
    plan = make_plan("dpo,ipo", [], flags=FLAGS)
    assert [s.config.method.name for s in plan.settings] == ["dpo", "ipo"] and plan.keys == (METHOD,)
    assert [s.name for s in plan.settings] == ["dpo", "ipo"]


def test_short_names_mean_the_only_section_that_has_one() -> None:
    assert full_key("beta", ["dpo"]) == "method.beta"
    assert full_key("learning_rate", ["dpo"]) == "training.learning_rate"
    assert full_key("seed", ["dpo"]) == "seed"
    with pytest.raises(ConfigError, match=r"method.temperature or sampling.temperature. Write which"):
        full_key("temperature", ["ppo"])


def test_commas_in_brackets_do_not_part_values() -> None:
    assert split_values("[1, 2],{a: 3, b: 4},'x,y'") == ["[1, 2]", "{a: 3, b: 4}", "'x,y'"]


def test_labels_say_what_a_weight_weighs() -> None:
    assert label_of({METHOD: "dpo", "method.beta": 0.1}) == "dpo, beta 0.1"
    assert label_of({"reward.helpful.weight": 0.5}) == "helpful weight 0.5"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["beta=0.1,0.1"], "a value stands there twice"),
        (["beta=0.1,1e-1"], "a value stands there twice"),
        (["beta=0.1,"], "an empty value"),
        (["beta"], "nothing to sweep"),
        (["beta=1,2", "method.beta=3,4"], "swept already"),
        (["out=a,b"], "folder of its own"),
        (["bta=0.1,0.2"], 'Did you mean "method.beta"'),
        (["beta=0.1,-1"], "beta"),
        (["method=dpo,ipo"], "name the methods first"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_plan("dpo", texts, flags=FLAGS)


# -- running ---------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_runs_a_table_and_a_picture(done: dict[str, Any]) -> None:
    found = done
    assert found["axes"] == ["kl", "gold"] and [run["state"] for run in found["runs"]] == ["finished"] * 2
    for run in found["runs"]:
        assert (
            Path("out", run["name"], "model", "config.json").exists() and Path("out", run["name"], "card.md").exists()
        )
        low, high = run["measured"]["kl"][1:]
        assert low <= run["measured"]["kl"][0] <= high and run["measured"]["kl"][0] > 0
        assert {"score", "gold", "length/response", "held_out/loss"} <= set(run["measured"])
    assert any(run["on_the_front"] for run in found["runs"])
    rows = list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))
    assert [row["method.beta"] for row in rows] == ["0.05", "0.5"]
    assert float(rows[0]["gold"]) == found["runs"][0]["measured"]["gold"][0]
    page = Path("out/sweep.html").read_text()
    for word in ("beta 0.05", "beta 0.5", "reference", "gold against KL", "less is better"):
        assert word in page


def test_the_same_command_does_nothing_again(done: dict[str, Any]) -> None:
    kept = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p.is_file() and p.parent != Path("out")}
    again = swept(*COMMAND)
    assert {p: p.stat().st_mtime_ns for p in Path("out").rglob("*") if p in kept} == kept
    assert [run["measured"] for run in again["runs"]] == [run["measured"] for run in done["runs"]]


def test_further_values_are_the_only_new_runs_and_another_measure_trains_nothing(done: dict[str, Any]) -> None:
    models = {p: p.stat().st_mtime_ns for p in Path("out").rglob("*.safetensors")}
    found = swept("dpo", "beta=0.05,0.1,0.5", "--reward", "rewards.py:brief")
    assert {p: p.stat().st_mtime_ns for p in models} == models
    assert [run["name"] for run in found["runs"]] == ["beta=0.05", "beta=0.1", "beta=0.5"]
    score = {run["name"]: run["measured"]["score"] for run in found["runs"]}
    assert all(score[run["name"]] == run["measured"]["gold"] for run in done["runs"])  # that was its name before


def test_a_failed_run_is_said_and_the_others_go_on(here: Path) -> None:
    """One of the two models is not there."""
    command = ["sweep", "dpo", "model=base,no/such/folder", "-d", "pairs.jsonl", "-o", "out", "-n", 8, *QUICK]
    done = palate(*command, "--json", code=1)
    runs = {run["name"]: run for run in json.loads(done.stdout)["runs"]}
    assert runs["model=base"]["state"] == "finished" and runs["model=no-such-folder"]["state"] == "failed"
    assert (
        "no/such/folder" in runs["model=no-such-folder"]["error"]
        and "no/such/folder" in Path("out/sweep.html").read_text()
    )
    shown = palate(*command, code=1).stderr
    assert "failed: model=no-such-folder" in shown and "model=base" in shown


def test_without_a_reward_the_policy_itself_is_asked_and_that_is_said(here: Path) -> None:
    found = swept("dpo", "beta=0.05,0.5")
    assert found["axes"] == ["kl", "accuracy"]
    assert {"accuracy", "margin"} <= set(found["runs"][0]["measured"])
    assert "what the policy itself says of held-out pairs" in Path("out/sweep.html").read_text()


def test_swept_weights_are_measured_alike_and_drawn_against_each_other(here: Path) -> None:
    """A weight of 0 and of 5 measure the same two parts; their weighted sum is in nobody's units and is left out."""
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"]}) + "\n" for r in PAIRS))
    Path("both.yaml").write_text(
        "model: base\ndata: prompts.jsonl\nreward:\n  helpful: {function: 'rewards.py:likes_a'}\n"
        "  brief: {function: 'rewards.py:brief', weight: 1.0}\n"
    )
    command = ["sweep", "ppo", "reward.brief.weight=0,5", "-c", "both.yaml", "-o", "out", "-n", 8, "--json", *QUICK]
    found = json.loads(palate(*command).stdout)
    assert set(found["axes"]) == {"score/helpful", "score/brief"}
    assert all("score" not in run["measured"] for run in found["runs"])
    other = json.loads(palate(*command, "--axes", "kl,score/helpful").stdout)
    assert other["axes"] == ["kl", "score/helpful"]
    assert "--axes" in palate(*command, "--axes", "kl,scor/helpful", code=2).stderr


def test_checkpoints_are_measured_on_request(here: Path) -> None:
    keep = ["training.save_every=1", "training.keep_last=5"]
    found = swept("dpo", "beta=0.05,0.5", *keep, "--reward", "rewards.py:likes_a", "--checkpoints")
    for run in found["runs"]:
        assert [point["step"] for point in run["way"]] == [1, 2]
        assert run["way"][-1]["kl"] == run["measured"]["kl"]  # the last checkpoint is the model
        assert run["way"][0]["kl"] != run["measured"]["kl"]


def test_two_processes_give_what_one_gives(done: dict[str, Any]) -> None:
    flags = ["-m", "base", "-d", "pairs.jsonl", "-o", "two", "-n", 8, "--json", "--jobs", 2]
    two = json.loads(palate("sweep", "dpo", "beta=0.05,0.5", *QUICK, "--reward", "rewards.py:likes_a", *flags).stdout)
    for a, b in zip(done["runs"], two["runs"], strict=True):
        assert a["name"] == b["name"]
        assert b["measured"]["kl"] == pytest.approx(a["measured"]["kl"], rel=1e-3)


def test_reward_models_are_judged_on_pairs(here: Path) -> None:
    found = swept("reward", "training.weight_decay=0,0.1")
    assert found["axes"] == ["nll", "accuracy"] and "kl" not in found["runs"][0]["measured"]


def test_seeds_share_one_name_and_hold_out_prompts_of_their_own(here: Path) -> None:
    from palate.pipelines.sweep.page import _one_name_each
    from palate.report.frontier_chart import Dot

    assert [d.label for d in _one_name_each([Dot(0, 0, "a"), Dot(1, 1, "a"), Dot(2, 2, "b")])] == ["a", "", "b"]
    found = swept("dpo", "seed=0,1", "--reward", "rewards.py:likes_a")
    assert len(found["runs"]) == 2 and "seed makes them differ" in Path("out/sweep.html").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--axes", "kl"], "two different quantities"),
        (["-n", "1"], "two prompts at least"),
        (["data.validation_fraction=0"], "--prompts"),
    ],
)
def test_a_command_that_cannot_work_says_so_before_it_trains(here: Path, more: list[str], words: str) -> None:
    done = palate("sweep", "dpo", "beta=0.1,0.5", "-m", "base", "-d", "pairs.jsonl", "-o", "out", *QUICK, *more, code=2)
    assert words in done.stderr and not Path("out").exists()


def test_ppo_without_a_reward_is_refused_before_it_trains(here: Path) -> None:
    done = palate("sweep", "ppo", "kl_coef=0.1,0.2", "-m", "base", "-d", "pairs.jsonl", "-o", "out", code=2)
    assert "--reward" in done.stderr and not Path("out").exists()
