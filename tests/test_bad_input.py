"""A hostile user at the command line: every fault is one message that says where, what, and what to do; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import palate
from palate.errors import ConfigError, ModelError, RunError
from palate.lookup import method_names
from palate.models.load import load_scalar, load_tokenizer, save_model
from palate.run_folder import locked
from test_cli import DEMOS, PAIRS, QUICK
from test_cli import palate as command
from tiny import WORDS, tiny, tokenizer_of

LONG = "a b c d e f g h " * 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, a language model that holds 64 tokens, and ``reward``, a reward model of the same size."""
    folder = tmp_path_factory.mktemp("models")
    save_model(tiny("gpt2"), tokenizer_of(), folder / "base")
    save_model(load_scalar(folder / "base", seed=1), load_tokenizer(folder / "base"), folder / "reward")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("pairs.jsonl", *PAIRS)
    write("demos.jsonl", *DEMOS)
    write("prompts.jsonl", *({"prompt": each["prompt"]} for each in DEMOS))
    return tmp_path


def write(name: str, *records: Any) -> None:
    Path(name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def read(name: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def refused(*arguments: object, code: int = 1) -> str:
    """What the command says; it leaves no folder "run"."""
    done = command(*arguments, code=code)
    assert done.stdout == "" and not Path("run").exists()
    return str(done.stderr)


# -- records ----------------------------------------------------------------------------------------------------------


def test_another_kind_is_suggested_only_where_the_first_record_is_of_it(models: Path, here: Path) -> None:
    train = ("train", "reward", "-m", models / "base", "-o", "run", "-d")
    write("broken.jsonl", PAIRS[0], '{"prompt": "a ", "chosen": ')
    said = refused(*train, "broken.jsonl")
    assert "broken.jsonl:2: not valid JSON at column 27" in said and "looks like" not in said
    write("typed.jsonl", {**PAIRS[0], "chosen": 3})
    said = refused(*train, "typed.jsonl")
    assert 'typed.jsonl:1: "chosen" is a number' in said and "looks like" not in said
    said = refused("train", "sft", "-m", models / "base", "-o", "run", "-d", "prompts.jsonl")
    assert "looks like prompts" in said and "ppo" in said


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "a ", "response": "b", "desirable": False}, "desirable"),
        ({"prompt": "a ", "completion": "b", "label": False}, "label"),
        ({"instruction": "a ", "output": "b", "kto_tag": False}, "kto_tag"),
    ],
)
def test_a_judged_response_is_no_demonstration(record: dict[str, Any], field: str, models: Path, here: Path) -> None:
    write("judged.jsonl", record)
    said = refused("train", "sft", "-m", models / "base", "-o", "run", "-d", "judged.jsonl")
    assert "judged.jsonl:1" in said and f'"{field}"' in said and "looks like judgements" in said


def test_one_list_in_a_jsonl_file_is_told_from_a_wrong_object(here: Path) -> None:
    write("list.jsonl", [DEMOS[0]])
    assert "name it .json" in refused("convert", "list.jsonl", "-")


def test_a_file_of_two_shapes_says_so(here: Path) -> None:
    write("mixed.jsonl", {"instruction": "a", "output": "b"}, DEMOS[0])
    said = refused("convert", "mixed.jsonl", "out.jsonl")
    assert "mixed.jsonl:2" in said and "one file, one shape" in said and not Path("out.jsonl").exists()


def test_a_single_prompt_is_trained_on_and_not_held_out(models: Path, here: Path) -> None:
    write("one.jsonl", DEMOS[0])
    done = command("train", "sft", "-m", models / "base", "-d", "one.jsonl", "-o", "run", *QUICK)
    assert "none held out" in done.stderr and "1 demonstration read, 1 kept" in done.stderr


@pytest.mark.parametrize("flag", ["-d", "--validation"])
def test_where_nothing_is_left_the_file_and_the_reasons_are_named(flag: str, models: Path, here: Path) -> None:
    write(
        "same.jsonl", {"prompt": "a ", "chosen": "b", "rejected": "b"}, {"prompt": "a ", "chosen": "", "rejected": "b"}
    )
    other = () if flag == "-d" else ("-d", "pairs.jsonl")
    said = refused("train", "reward", "-m", models / "base", "-o", "run", flag, "same.jsonl", *other)
    assert "palate: same.jsonl (" in said
    assert "1 identical pair (same.jsonl:1)" in said and "1 empty response (same.jsonl:2)" in said


def test_what_was_dropped_stands_in_the_card_even_of_a_quiet_run(models: Path, here: Path) -> None:
    write("some.jsonl", *PAIRS, {"prompt": "p ", "chosen": "a", "rejected": "a"}, {**PAIRS[0], "prompt": LONG})
    options = ("-o", "run", "--quiet", "data.validation_fraction=0", *QUICK)
    command("train", "reward", "-m", models / "base", "-d", "some.jsonl", *options)
    card = Path("run/card.md").read_text()
    assert "18 comparisons read, 17 kept" in card and "1 identical pair (some.jsonl:17)" in card
    assert "1 prompt cut at the beginning" in card


def test_sampling_and_scoring_count_what_they_cut_and_leave_out(models: Path, here: Path) -> None:
    write("long.jsonl", {"prompt": LONG, "response": "a"}, {"prompt": "a ", "response": ""})
    sample = ("sample", "-m", models / "base", "-d", "long.jsonl", "--max-new-tokens", 4)
    assert "1 of 2 prompts were cut at their beginning to fit 60 tokens" in command(*sample).stderr
    scored = command("score", "-m", models / "reward", "-d", "long.jsonl")
    assert "cut at their beginning to fit 64 tokens" in scored.stderr  # what the model holds, and no more
    assert "1 of 2 responses are empty" in scored.stderr
    assert json.loads(scored.stdout.splitlines()[1])["score"] is None
    said = refused("score", "-m", models / "reward", "-d", "long.jsonl", "--max-length", 65, code=2)
    assert "max_length is 65" in said and "64 tokens" in said


def test_check_counts_by_the_context_of_the_model(models: Path, here: Path) -> None:
    write("long.jsonl", {"prompt": LONG, "response": "a"})
    assert palate.check(models / "base", "long.jsonl").counts["truncated_prompt"] == 1


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_language_model_is_no_reward(models: Path, here: Path) -> None:
    said = refused("score", "-m", models / "base", "-d", "pairs.jsonl")
    assert "not a reward" in said and "palate train reward" in said
    ppo = ("train", "ppo", "-m", models / "base", "-d", "prompts.jsonl", "-o", "run", "sampling.max_new_tokens=4")
    assert "not a reward" in refused(*ppo, "--reward", models / "base")


def test_a_run_folder_points_to_the_model_in_it(models: Path, here: Path) -> None:
    save_model(tiny(), tokenizer_of(), here / "sft" / "model")
    for arguments in (("sample", "-p", "a "), ("score", "-d", "pairs.jsonl"), ("check",)):
        assert f"Did you mean {here / 'sft' / 'model'}?" in refused(arguments[0], "-m", "sft", *arguments[1:])


def test_a_broken_template_names_its_model_and_the_way_round(models: Path, here: Path) -> None:
    for number, template in enumerate(("{% for m in messages %}{{ m.role ", "{{ raise_exception('never') }}")):
        tokenizer = tokenizer_of()
        tokenizer.chat_template = template
        save_model(tiny(), tokenizer, here / f"m{number}")
        said = refused("train", "sft", "-m", f"m{number}", "-d", "demos.jsonl", "-o", "run")
        assert f"The template is that of m{number}" in said and "data.chat_template=default" in said


def test_nan_weights_and_half_a_file_are_said_before_anything_is_made(models: Path, here: Path) -> None:
    train = ("train", "sft", "-d", "demos.jsonl", "-o", "run", "-m", "m")
    save_model(tiny(), tokenizer_of(), here / "m")
    weights = load_file("m/model.safetensors")
    save_file({**weights, min(weights): torch.full_like(weights[min(weights)], torch.nan)}, "m/model.safetensors")
    assert "NaN or Inf" in refused(*train)
    with open("m/model.safetensors", "r+b") as file:
        file.truncate(300)
    assert "broken or was not copied to its end" in refused(*train)
    Path("m/tokenizer.json").unlink()
    assert "no tokenizer in this folder" in refused(*train)


def test_no_pad_token_and_pad_equal_to_eos_train_the_same_weights(here: Path) -> None:
    """The end of text is trained and seen in all three: no mask is made from a token's value."""
    found = []
    for number, pad in enumerate(("<pad>", "</s>", None)):
        save_model(tiny(), tokenizer_of(pad_token=pad), here / f"m{number}")
        command("train", "sft", "-m", f"m{number}", "-d", "demos.jsonl", "-o", f"run{number}", "-q", *QUICK)
        found.append((here / f"run{number}" / "metrics.jsonl").read_bytes())
    assert found[0] == found[1] == found[2]


def test_a_tokenizer_of_an_unknown_class_says_how_to_save_it(here: Path) -> None:
    Path("gpt2").mkdir()
    Path("gpt2/vocab.json").write_text(json.dumps({word: i for i, word in enumerate(WORDS)}))
    Path("gpt2/merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ModelError, match=r"tokenizer_config.json.*save_pretrained"):
        load_tokenizer("gpt2")


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["training.patience=2", "training.best_metric=loss"])
def test_early_stopping_without_held_out_records_is_refused(setting: str, models: Path, here: Path) -> None:
    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", "-o", "run", "data.validation_fraction=0")
    assert "none are held out" in refused(*train, setting, code=2)


def test_a_tracker_that_is_not_installed_is_said_before_the_folder_is_made(
    models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palate.stage import trackers

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", "-o", "run", "trackers=[wandb]")
    assert "pip install wandb" in refused(*train, code=2)


def test_python_calls_name_the_slip(models: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "max_new_tokens"'):
        palate.sample(models / "base", ["a "], max_new_token=3)
    with pytest.raises(ConfigError, match="responses is one string"):
        palate.score(models / "reward", ["a "], "b")


# -- files that are written -------------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_is_said_before_the_work(here: Path) -> None:
    Path("there.jsonl").write_text("mine")
    for arguments in (("sample", "-p", "a "), ("score", "-d", "pairs.jsonl")):
        assert "not overwritten" in refused(arguments[0], "-m", "no/model", *arguments[1:], "-o", "there.jsonl")
        assert "Name it out.jsonl" in refused(arguments[0], "-m", "no/model", *arguments[1:], "-o", "out.csv", code=2)
    assert Path("there.jsonl").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_one_message(here: Path) -> None:
    Path("file").write_text("")
    assert "cannot be written" in refused("convert", "demos.jsonl", "file/out.jsonl")


def test_a_full_disk_at_the_end_of_a_run_is_one_message_and_the_run_resumes(
    models: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import palate.stage.run as stage

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/report.html")

    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", "-o", "run", "-q", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "report_run", full)
        assert "run/report.html: No space left" in command(*train, code=1).stderr
    assert not Path("run/card.md").exists()
    command(*train)
    assert Path("run/card.md").exists() and Path("run/report.html").exists()


# -- runs that stop, and others that come -----------------------------------------------------------------------------


def test_two_processes_do_not_train_in_one_folder(models: Path, here: Path) -> None:
    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", "-o", "run", *QUICK)
    stop_after(train, 1)
    with locked(here / "run"):
        said = command(*train, code=1).stderr
        assert f"another process (number {os.getpid()})" in said and "loading" not in said
        with pytest.raises(RunError), locked(here / "run"):
            pass
    command(*train)


def stop_after(train: tuple[object, ...], steps: int) -> None:
    """Start a run and interrupt it after so many lines of metrics."""
    import palate.stage.run as stage

    original = stage.train

    def interrupted(run: Any) -> Iterator[Any]:
        for number, metrics in enumerate(original(run), 1):
            yield metrics
            if number == steps:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train", interrupted)
        command(*train, code=130)


def test_changed_data_is_refused_on_resume_and_the_old_data_go_on(models: Path, here: Path) -> None:
    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", *QUICK)
    command(*train, "-o", "whole")
    train = (*train, "-o", "run")
    stop_after(train, 2)
    before = Path("demos.jsonl").read_text()
    for changed in (
        before.replace("c d e", "c d f", 1),
        before + json.dumps({"prompt": "b b ", "response": "c"}) + "\n",
        "".join(reversed(before.splitlines(keepends=True))),
    ):
        Path("demos.jsonl").write_text(changed)
        said = command(*train, code=1).stderr
        assert "the data changed since this run was started" in said and "another --out" in said
    Path("demos.jsonl").write_text("\n" + before)  # other lines, the same records
    command(*train)
    for name in ("metrics.jsonl", "samples.jsonl", "model/model.safetensors"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()


def test_a_run_without_a_checkpoint_says_that_nothing_is_lost_with_it(models: Path, here: Path) -> None:
    train = ("train", "sft", "-m", models / "base", "-d", "demos.jsonl", "-o", "run", *QUICK)
    stop_after(train, 1)
    assert "no checkpoint yet" in command(*train, "training.seed=3", code=1).stderr
    command(*train)
    assert "no checkpoint yet" not in command(*train, "training.seed=3", code=1).stderr


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_sigterm_says_how_to_resume_and_exits_143(models: Path, here: Path) -> None:
    quick = ["training.max_steps=100000", "training.batch_size=4", "training.save_every=1", "training.eval_every=0"]
    arguments = ["train", "sft", "-m", str(models / "base"), "-d", "demos.jsonl", "-o", "run", "-q", *quick]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "palate", *arguments], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while process.poll() is None and not list(Path("run/checkpoints").glob("step-*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "Terminated. The same command resumes" in said and "Traceback" not in said


def test_samples_of_a_run_are_scored_alike_by_the_command(models: Path, here: Path) -> None:
    ppo = ("train", "ppo", "-m", models / "base", "-d", "prompts.jsonl", "--reward", models / "reward", "-o", "run")
    command(*ppo, "-q", *QUICK, "sampling.max_new_tokens=4", "training.samples_every=1")
    # Four words for four tokens: a random model also writes special tokens, which are in no text.
    samples = [entry for entry in read("run/samples.jsonl") if len(entry["response"].split()) == 4]
    responses = [entry["response"] for entry in samples]
    finished = [entry["finished"] for entry in samples]
    scores = palate.score(models / "reward", [entry["prompt"] for entry in samples], responses, finished=finished)
    assert any("when" not in entry for entry in samples) and scores == pytest.approx([e["score"] for e in samples])


# -- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80])
def test_a_narrow_terminal_gets_paragraphs(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line for a setting with its meaning indented below; only equations may be wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command("explain", "ppo").stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("method.kl_coef = 0.05 (float)"))
    assert lines[at + 1].startswith("    price of leaving the reference")
    assert all(len(line) <= columns for line in lines if not line.startswith("    "))
    text = command("methods").stdout
    assert "┃" not in text and all(len(line) <= columns for line in text.splitlines())
    assert all(f"\n{name}  " in f"\n{text}" for name in method_names())


def test_a_wide_terminal_gets_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert "┃ setting" in command("explain", "ppo").stdout and "┃ method" in command("methods").stdout
