"""The setting ``engine``: what is refused before anything is loaded, and that a run samples with what it chose.

None of this needs vLLM; ``test_vllm.py`` runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import palate
from palate.cli import app
from palate.config import load_settings
from palate.errors import ConfigError
from palate.generation import engines
from palate.generation.engines import engine_of
from palate.generation.sampler import sample
from palate.models.load import save_model
from palate.resolve import require_all
from palate.run_folder import differences
from tiny import tiny, tokenizer_of

REWARD = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
TALK = "def talk(conversation, rng):\n    return 'b c'\n"


def settings_with(method: str, **more: Any) -> Any:
    given = {"model": "m", "out": "o", "data": "d.jsonl", "reward": "r:r", "sampling": {"max_new_tokens": 10}}
    return load_settings(method, settings=given | more)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object())


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)


def test_the_embedded_sampler_is_the_default() -> None:
    assert settings_with("grpo").engine == "embedded"
    assert engine_of("embedded") is sample


def test_an_engine_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine: found 'vlm'"):
        settings_with("grpo", engine="vlm")
    with pytest.raises(ConfigError, match='found \'vlm\', expected "embedded" or "vllm"'):
        palate.sample("nowhere", ["a"], engine="vlm")


def test_without_the_package_the_error_says_how_to_install_it(absent: None) -> None:
    """Before any model is looked for: there is none."""
    for start in (
        lambda: require_all(settings_with("grpo", engine="vllm")),
        lambda: palate.sample("nowhere", ["a"], engine="vllm"),
        lambda: engine_of("vllm"),
    ):
        with pytest.raises(ConfigError, match=r'not installed.*pip install "palate\[vllm\]".*engine=embedded'):
            start()


@pytest.mark.parametrize(("method", "others"), [("nash_md", "mixture"), ("xpo", "reference")])
def test_methods_that_draw_from_another_model_are_refused(method: str, others: str, installed: None) -> None:
    with pytest.raises(ConfigError, match=f"engine: {method} draws from a {others} too"):
        require_all(settings_with(method, engine="vllm"))
    require_all(settings_with(method))


def test_methods_without_a_policy_are_refused(installed: None) -> None:
    with pytest.raises(ConfigError, match="engine: reward trains no policy"):
        require_all(settings_with("reward", engine="vllm"))
    require_all(settings_with("dpo", engine="vllm"))  # its samples before and after are drawn with it


def test_drawing_ahead_is_refused(installed: None) -> None:
    with pytest.raises(ConfigError, match="rollouts_ahead = 1 needs the embedded sampler"):
        require_all(settings_with("grpo", engine="vllm", training={"rollouts_ahead": 1}))


def test_an_unfinished_run_is_not_resumed_with_another_engine() -> None:
    """It draws other samples."""
    one, other = settings_with("grpo").to_dict(), settings_with("grpo", engine="vllm").to_dict()
    assert differences(one, other) == ["engine: 'embedded' there, 'vllm' here"]


def test_k_different_responses_are_drawn_by_the_embedded_sampler_only() -> None:
    done = CliRunner().invoke(app, ["sample", "-m", "nowhere", "-p", "a", "--k", "2", "--engine", "vllm"])
    assert done.exit_code == 2
    assert "--k draws with the embedded sampler" in done.stderr


@pytest.mark.parametrize("turns", [False, True])
def test_a_run_draws_everything_of_its_policy_with_one_engine(
    turns: bool, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The witnesses before and after, the validation and every batch; and the numbers are those of the run without."""
    made: list[Any] = []

    class Recorded:
        def __init__(self, max_length: int | None) -> None:
            self.max_length, self.rows = max_length, []  # type: ignore[var-annotated]
            made.append(self)

        def __call__(self, model: Any, prompts: Any, settings: Any, **options: Any) -> Any:
            tokens = sample(model, prompts, settings, **options)
            self.rows.append(tokens.ids.shape)
            return tokens

    monkeypatch.setattr(
        "palate.stage.run.engine_of", lambda name, max_length: Recorded(max_length) if name == "vllm" else sample
    )
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "policy", stop_token_ids=[2])
    (tmp_path / "mine.py").write_text(REWARD + TALK)
    with open(tmp_path / "prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"a {word}"}) + "\n" for word in "bcdefghijklm")
    runs = {}
    for engine in ("embedded", "vllm"):
        runs[engine] = palate.train(
            "grpo",
            model=tmp_path / "policy",
            reward=f"{tmp_path / 'mine.py'}:length",
            data={"train": tmp_path / "prompts.jsonl", "validation_fraction": 0.3, "max_length": 40},
            sampling={"max_new_tokens": 6},
            samples_per_prompt=3,
            training={"max_steps": 2, "batch_size": 4, "eval_every": 0, "old_logprobs": "trainer"},
            environment={"function": f"{tmp_path / 'mine.py'}:talk", "max_turns": 2} if turns else None,
            engine=engine,
            out=tmp_path / engine,
            quiet=True,
        )
    (engine,) = made
    # Witness, validation, batch, batch, validation, witness; a conversation is at least one call more.
    assert len(engine.rows) > 6 if turns else len(engine.rows) == 6
    assert engine.max_length == 40 and max(columns for _, columns in engine.rows) <= 40
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (runs["vllm"] / name).read_bytes() == (runs["embedded"] / name).read_bytes()


def test_sample_goes_through_the_engine(tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def engine(name: str, max_length: int) -> Any:
        seen.update(name=name, max_length=max_length)
        return sample

    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "policy", stop_token_ids=[2])
    plain = palate.sample(tmp_path / "policy", ["a b", "c d e"], max_new_tokens=5)
    monkeypatch.setattr("palate.texts.sampling.engine_of", engine)
    assert palate.sample(tmp_path / "policy", ["a b", "c d e"], max_new_tokens=5, engine="vllm") == plain
    assert seen["name"] == "vllm" and 3 + 5 <= seen["max_length"] <= 5 + 5  # the longest prompt and its response
