"""The commands: what they print where, what they exit with, and that ``palate --help`` answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palate.cli import app
from palate.lookup import method_names
from palate.models.load import save_model
from tiny import tiny, tokenizer_of

PAIRS = [{"prompt": f"{w} b ", "chosen": "a c", "rejected": "d e"} for w in "abcdefghijklmnop"]
DEMOS = [{"prompt": f"{w} b ", "response": "c d e"} for w in "abcdefghijklmnop"]
QUICK = ["training.max_steps=2", "training.batch_size=4", "training.eval_every=0", "training.save_every=0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, records in (("pairs", PAIRS), ("demos", DEMOS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path


def palate(*arguments: object, input: str | None = None, code: int = 0) -> Any:
    """Run a command in this process; ``stdout`` and ``stderr`` apart."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception}"
    if code:
        assert "Traceback" not in result.stderr
    return result


def test_help_names_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "palate", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "sample", "score", "chat", "run", "soup", "explain", "convert", "check", "methods"):
        assert command in done.stdout


def test_help_imports_nothing_heavy() -> None:
    """Nor does any command's --help."""
    code = (
        "import sys; from palate.cli import app\n"
        "for a in ([], ['train'], ['score']):\n"
        "    try: app([*a, '--help'])\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'yaml', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_version() -> None:
    from palate import __version__

    assert palate("--version").stdout.strip() == f"palate {__version__}"


def test_no_command_is_a_usage_error() -> None:
    assert "Usage" in palate(code=2).output


@pytest.mark.parametrize("arguments", [["trian"], ["train", "--modle", "x"], ["sample"], ["methods", "extra"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    assert palate(*arguments, code=2).stdout == ""


def test_train_with_flags_alone(base: Path, here: Path) -> None:
    done = palate("train", "reward", "--model", base, "--data", "pairs.jsonl", "--out", "runs/reward", *QUICK)
    assert done.stdout == ""
    assert "reward 2/2" in done.stderr and "runs/reward/model" in done.stderr
    assert Path("runs/reward/model/config.json").exists()
    card = Path("runs/reward/card.md").read_text()
    assert "pairs.jsonl" in card


def test_train_with_a_file_a_flag_and_overrides(base: Path, here: Path) -> None:
    """Override > flag > file; METHOD may come from the file."""
    Path("run.yaml").write_text(
        f"method: sft\nmodel: {base}\ndata: nowhere.jsonl\nout: runs/file\ntraining:\n  max_steps: 9\n  batch_size: 9\n"
    )
    done = palate(
        "train", "training.max_steps=1", "--config", "run.yaml", "--data", "demos.jsonl", "-o", "runs/flag", "--json"
    )
    result = json.loads(done.stdout)
    assert result["out"] == "runs/flag" and result["metrics"]["train"]["step"] == 1
    assert done.stderr == ""
    settings = Path("runs/flag/config.yaml").read_text()
    assert "max_steps: 1\n" in settings and "batch_size: 9\n" in settings and "train: demos.jsonl\n" in settings


def test_the_same_command_on_a_finished_run_says_so(base: Path, here: Path) -> None:
    command = ["train", "sft", "-m", base, "-d", "demos.jsonl", "-o", "run", *QUICK]
    palate(*command)
    assert "this run is finished" in palate(*command).stderr
    other = palate(*command, "training.epochs=3", code=1)
    assert "training.epochs: 1.0 there, 3.0 here" in other.stderr and "another --out" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["reward", "training.learning_rat=1"], 2, ["override training.learning_rat=1", "training.learning_rate"]),
        (["rewrad"], 2, ['Did you mean "reward"']),
        (["reward", "--data", "none.jsonl"], 1, ["none.jsonl"]),
        (["reward", "--data", "demos.jsonl"], 1, ["demos.jsonl:1", "looks like demonstrations", "sft"]),
        (["reward", "--model", "no/such/folder"], 1, ["no/such/folder"]),
        (["ppo"], 2, ["ppo needs a reward", "--reward"]),
        (["reward", "--config", "none.yaml"], 2, ["none.yaml", "no such settings file"]),
        (["reward", "--lora", "lora.rank=0"], 2, ["lora.rank", "0", "at least 1"]),
        (["reward", "data.max_length=100000"], 2, ["data.max_length", "100000"]),
    ],
)
def test_what_the_user_can_repair_is_one_message_on_stderr(
    arguments: list[str], code: int, words: list[str], base: Path, here: Path
) -> None:
    given = {"--model": base, "--data": "pairs.jsonl", "--out": "run"}
    flags = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    done = palate("train", *arguments, *flags, code=code)
    assert done.stdout == "" and "palate: " in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not Path("run").exists()


def test_broken_json_names_file_and_line(base: Path, here: Path) -> None:
    Path("broken.jsonl").write_text('{"prompt": "a ", "response": "b"}\n{"prompt": \n')
    done = palate("train", "sft", "-m", base, "-d", "broken.jsonl", "-o", "run", code=1)
    assert "broken.jsonl:2" in done.stderr


def test_ctrl_c_says_how_to_resume(base: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import palate.stage

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(palate.stage, "run_stage", interrupted)
    arguments = ["train", "sft", "-m", str(base), "-d", "demos.jsonl", "-o", "my run"]
    monkeypatch.setattr(sys, "argv", ["palate", *arguments])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert "same command resumes" in result.stderr and "-o 'my run'" in result.stderr


def test_sample_and_score_are_a_pipe(base: Path, here: Path) -> None:
    palate("train", "reward", "-m", base, "-d", "pairs.jsonl", "-o", "run", "--quiet", *QUICK)
    asked = "".join(json.dumps({"prompt": p, "id": i}) + "\n" for i, p in enumerate(["a b ", "c d "]))
    sampled = palate("sample", "-m", base, "--data", "-", "-n", 2, "--max-new-tokens", 4, input=asked)
    rows = [json.loads(line) for line in sampled.stdout.splitlines()]
    assert [(row["prompt"], row["id"]) for row in rows] == [("a b ", 0), ("a b ", 0), ("c d ", 1), ("c d ", 1)]
    kept = [row for row in rows if row["response"].strip()]
    scored = palate("score", "-m", "run/model", input="".join(json.dumps(row) + "\n" for row in kept))
    answers = [json.loads(line) for line in scored.stdout.splitlines()]
    assert [a["response"] for a in answers] == [row["response"] for row in kept]
    assert all(isinstance(a["score"], float) and "id" in a for a in answers)


def test_score_of_comparisons_says_the_accuracy(base: Path, here: Path) -> None:
    palate("train", "reward", "-m", base, "-d", "pairs.jsonl", "-o", "run", "-q", *QUICK)
    done = palate("score", "-m", "run/model", "-d", "pairs.jsonl", "-o", "scored.jsonl")
    lines = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    right = sum((a["chosen_score"] > a["rejected_score"]) for a in lines) / len(lines)
    assert f"accuracy {right:.4f} over 16 pairs" in done.stderr
    again = palate("score", "-m", "run/model", "-d", "pairs.jsonl", "-o", "scored.jsonl", code=1)
    assert "not overwritten" in again.stderr


def test_score_says_what_it_cannot_score(base: Path, here: Path) -> None:
    done = palate("score", "-m", base, input='{"prompt": "a", "answer": "b"}\n', code=1)
    assert "stdin:1" in done.stderr and "'answer'" in done.stderr and "response" in done.stderr


def test_prompts_come_from_one_place(base: Path) -> None:
    assert "--prompt" in palate("sample", "-m", base, code=2).stderr
    palate("sample", "-m", base, "-p", "a ", "-d", "-", code=2)
    row = json.loads(palate("sample", "-m", base, "-p", "a b ", "--temperature", 0, "--max-new-tokens", 3).stdout)
    assert row["prompt"] == "a b "


def test_chat_answers_each_line(base: Path) -> None:
    done = palate("chat", "-m", base, "--max-new-tokens", 3, input="a b\n\n/new\nc d\n/quit\nnot said\n")
    assert len(done.stdout.splitlines()) == 2


def test_convert_reads_stdin_and_writes_stdout(here: Path) -> None:
    alpaca = json.dumps({"instruction": "Say hello.", "input": "", "output": "Hello."}) + "\n"
    done = palate("convert", "-", "-", "--from", "alpaca", "--kind", "demonstrations", input=alpaca)
    assert json.loads(done.stdout) == {"prompt": "Say hello.", "response": "Hello."}
    Path("a.jsonl").write_text(alpaca)
    palate("convert", "a.jsonl", "b.jsonl")
    assert json.loads(Path("b.jsonl").read_text()) == {"prompt": "Say hello.", "response": "Hello."}
    assert "not overwritten" in palate("convert", "a.jsonl", "b.jsonl", code=1).stderr
    assert "Did you mean" in palate("convert", "a.jsonl", "c.jsonl", "--from", "alpaka", code=2).stderr


def test_check_shows_what_is_trained(base: Path, here: Path) -> None:
    """The row of "a b " and "c d e": two prompt tokens are masked, three words and the end of text are trained."""
    done = palate("check", "-m", base, "-d", "demos.jsonl", "-n", 1, "--json", code=1)
    found = json.loads(done.stdout)
    row = found["rows"][0]
    assert row["trained"][-4:] == [True] * 4 and not any(row["trained"][:-4])
    assert [token.strip() for token in row["tokens"][-4:]] == ["c", "d", "e", "</s>"]
    assert found["findings"]  # twenty words cannot hold the sentence that the check tries: exit code 1
    shown = palate("check", "-m", base, "-d", "demos.jsonl", "-n", 1, code=1).stdout
    assert "of 6 tokens are trained" in shown
    assert shown.count("[[") == shown.count("]]") == 2 and "c|" in shown.partition("[[")[2]  # no colours here: marks
    assert "No chat template: string prompts are continued as plain text" in shown


def test_check_names_the_kind_that_the_records_are(base: Path, here: Path) -> None:
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert (
        "pairs.jsonl looks like comparisons. Give --kind comparisons."
        in palate("check", "-m", base, "-d", "pairs.jsonl", code=1).stderr
    )


@pytest.mark.parametrize("name", method_names())
def test_explain_shows_paper_roles_and_settings(name: str) -> None:
    from palate.lookup import method_class
    from palate.method_docs import settings_of

    shown = palate("explain", name).stdout
    assert "arXiv" in shown and "needs" in shown
    found = json.loads(palate("explain", name, "--json").stdout)
    assert found["name"] == name and found["reads"] == method_class(name).reads
    assert [s["name"] for s in found["settings"]] == [s.name for s in settings_of(method_class(name))]


def test_explain_all_lists_the_settings_of_every_run() -> None:
    shared = json.loads(palate("explain", "sft", "--all", "--json").stdout)["shared"]
    assert {"training", "data", "sampling", "lora", "environment", ""} == set(shared)
    assert "learning_rate" in [s["name"] for s in shared["training"]]
    assert "training.learning_rate" in palate("explain", "sft", "--all").stdout


def test_explain_speaks_as_a_settings_file_does() -> None:
    shown = palate("explain", "ppo", "--all").stdout
    assert "method.whiten_advantages = true" in shown and "method.normalise_scores = false" in shown
    assert "training.learning_rate = (chosen by method and model size)" in shown
    assert "score_moments" not in shown and "``" not in shown  # state of the run, and markup


def test_explain_takes_a_module_of_ones_own(here: Path) -> None:
    source = Path(sys.modules["palate"].__file__ or "").parent / "methods" / "sft.py"
    Path("my_method_package").mkdir()
    Path("my_method_package/__init__.py").write_text("")
    Path("my_method_package/mine.py").write_text(source.read_text())
    assert json.loads(palate("explain", "my_method_package.mine", "--json").stdout)["name"] == "my_method_package.mine"


def test_methods_lists_them_all() -> None:
    rows = json.loads(palate("methods", "--json").stdout)
    assert [row["name"] for row in rows] == method_names()
    table = palate("methods").stdout
    assert all(name in table for name in method_names())
