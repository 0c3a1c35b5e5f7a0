"""Settings: what wins, what is refused and how it is said, the round trip through config.yaml, and method docs."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from palate.config import RunConfig, known_keys, load_config, shared_settings
from palate.defaults import LORA_FACTOR, default_learning_rate
from palate.errors import ConfigError
from palate.lookup import find_method, method_class, method_names
from palate.method_docs import docstring_entries, explain, settings_of
from palate.settings_tree import closest, flatten, merge, parse_value, read_overrides, read_yaml

METHOD_FILE = '''
"""Toy -- nobody 2024, arXiv:0000.00000.

    L = beta * x                                                        (eq. 1)

Roles: reward (trained). Data: comparisons.
"""
from dataclasses import dataclass


def toy_loss(x, temperature=1.0):
    """Eq. 1.

    Args:
        x: a number.
        temperature: softness; > 0.
    """
    return x


@dataclass(frozen=True)
class Toy:
    """Settings.

    Attributes:
        beta: how dearly leaving is paid for; > 0. The paper
            uses 0.1.
        low, high: clip range; in [0, 1].
    """

    beta: float = 0.1
    low: float = 0.2
    high: float | None = None
    steps: int = 4  # inner steps; 1 to 8
                    # more is slower
    temperature: float = 1.0
    careful: bool = True

    needs = ("reward",)
    trains = ("reward",)
    reads = "comparisons"

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"method.beta: found {self.beta!r}, expected a number above 0.")

    def prepare(self, models, batch):
        return batch

    def loss(self, models, batch):
        return {}


METHOD = Toy
'''

FILE = """\
method:
  name: my_package.toy
  beta: 0.2
model: file-model
data: a.jsonl
out: runs/x
seed: 3
lora: true
training:
  learning_rate: 1e-5
  epochs: 2
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A method in a package of one's own."""
    package = tmp_path / "lib" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(METHOD_FILE)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield "my_package.toy"
    for name in ("my_package", "my_package.toy"):
        sys.modules.pop(name, None)


@pytest.fixture
def file(tmp_path: Path, toy: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def refusal(*overrides: str, file: Path | None = None, method: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(method, file=file, overrides=overrides)
    return str(error.value)


def test_override_beats_flag_beats_file_beats_default(file: Path) -> None:
    flags = {"model": "flag-model", "training.epochs": 5, "dtype": None}
    config = load_config(file=file, flags=flags, overrides=["model=override-model"])
    assert config.model == "override-model"  # in the file, by flag and by override
    assert config.training.epochs == 5  # in the file and by flag
    assert config.training.learning_rate == 1e-5  # in the file only
    assert config.dtype == "float32"  # nowhere: a flag that was not given is None


def test_every_value_knows_where_it_was_written(file: Path) -> None:
    config = load_config(file=file, flags={"model": "m"}, overrides=["method.beta=1"])
    assert config.place_of("model") == "--model"
    assert config.place_of("method.beta") == "override method.beta=1"
    assert config.place_of("training.epochs") == f"{file}:11"
    assert config.place_of("dtype") == "" and config.is_default("dtype")


def test_short_forms(file: Path) -> None:
    config = load_config(file=file)
    assert config.data.train == "a.jsonl" and config.training.seed == 3 and config.lora is not None
    both = load_config(file=file, overrides=["data=b.jsonl", "data.limit=4", "lora=false", "dtype=bf16", "seed=9"])
    assert (both.data.train, both.data.limit, both.lora, both.dtype) == ("b.jsonl", 4, None, "bfloat16")
    assert both.training.seed == 9
    assert load_config(file=file, overrides=["lora.rank=4"]).lora.rank == 4


def test_resolved_settings_are_a_settings_file(file: Path, tmp_path: Path) -> None:
    config = load_config(file=file, overrides=["lora.rank=4", "reward.good.weight=2", "trackers=[tensorboard]"])
    again_file = tmp_path / "config.yaml"
    again_file.write_text(config.to_yaml())
    again = load_config(file=again_file)
    assert again.to_dict() == config.to_dict()
    assert again.reward == {"good": {"weight": 2}} and again.method.settings == config.method.settings


@pytest.mark.parametrize("name", method_names())
def test_every_method_survives_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name, flags={"model": "m", "out": "o"})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(file=path)
    assert again.to_dict() == config.to_dict()
    assert again.method.settings == method_class(name)()


def test_1e_5_is_a_number_in_a_file_and_in_an_override(file: Path) -> None:
    for text in ("1e-5", "1E5", "-2e+3", "1.5e3", ".5e1"):
        assert parse_value(text) == float(text) and isinstance(parse_value(text), float)
    assert parse_value("e5") == "e5" and parse_value("1e") == "1e"


def test_override_values_are_yaml_and_other_text_is_text() -> None:
    assert [parse_value(t) for t in ("null", "true", "[a, 1]", "7", "")] == [None, True, ["a", 1], 7, None]
    assert parse_value("module:function") == "module:function"
    assert parse_value("%d of @me") == "%d of @me"
    with pytest.raises(ConfigError, match="list or mapping"):
        parse_value("[a")


def test_unknown_key_names_file_line_and_the_key_that_was_meant(file: Path) -> None:
    file.write_text(FILE.replace("learning_rate:", "learning_rat:"))
    assert refusal(file=file) == (
        f'{file}:10: unknown setting "training.learning_rat". Did you mean "training.learning_rate"?'
    )


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("method.bta=1", "method.beta"),
        ("learning_rate=1", "training.learning_rate"),
        ("training.epoch=1", "training.epochs"),
        ("sampling.max_new_token=3", "sampling.max_new_tokens"),
        ("modell=x", "model"),
        ("data.valdation=x", "data.validation"),
        ("training.max_length=4", "data.max_length"),
    ],
)
def test_did_you_mean(override: str, meant: str, file: Path) -> None:
    assert f'Did you mean "{meant}"?' in refusal(override, file=file)


def test_a_key_like_no_other_gets_the_list(file: Path) -> None:
    message = refusal("training.xyz=1", file=file)
    assert "Did you mean" not in message and "batch_size" in message
    assert "Known: method, model" in refusal("xyz=1", file=file)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epochs=-1", ["training.epochs", "-1", "above 0"]),
        ("training.batch_size=many", ["training.batch_size", "found 'many', expected a whole number."]),
        ("data.validation_fraction=1.5", ["data.validation_fraction", "1.5", "[0, 1)"]),
        ("data.limit=0", ["data.limit", "0", "above 0"]),
        ("dtype=float16", ["dtype", "'float16'", "float32", "bfloat16"]),
        ("samples_per_prompt=0", ["samples_per_prompt", "found 0, expected a number of at least 1."]),
        ("method.beta=0", ["method.beta", "0.0", "above 0"]),
        ("method.careful=perhaps", ["method.careful", "found 'perhaps', expected true or false."]),
        ("training.activation_checkpointing=maybe", ["found 'maybe', expected true or false."]),
        ("training.activation_checkpointing=null", ["found null, expected true or false."]),
        ("training.batch_size=2.5", ["found 2.5, expected a whole number."]),
        ("training.batch_size=true", ["found true, expected a whole number."]),  # not 1
        ("training.learning_rate=yes", ["found true, expected a number."]),
        ("training.learning_rate=1e-5x", ["found '1e-5x', expected a number."]),
        ("training.max_steps=all", ["found 'all', expected a whole number or null."]),
        ("training.value_learning_rate=false", ["found false, expected a number or null."]),
        ("data.rename=3", ["found 3, expected a mapping."]),
        ("data.truncate=middle", ["found 'middle', expected 'left_prompt', 'right' or 'drop'."]),
        ("tokenizer=3", ["found 3, expected a text or null."]),
        ("trackers=[3]", ["found 3, expected a text."]),
        ("lora=maybe", ["found 'maybe', expected true, false or settings below it."]),
        ("lora.rank=big", ["lora.rank: found 'big', expected a whole number."]),
        ("sampling.top_p=0", ["top_p", "0.0", "at most 1"]),
        ("training=5", ["training", "5"]),
        ("model=[a]", ["model", "['a']"]),
    ],
)
def test_wrong_values_name_place_key_found_and_expected(override: str, words: list[str], file: Path) -> None:
    message = refusal(override, file=file)
    assert message.startswith(f"override {override}: "), message
    assert all(word in message for word in words), message
    assert "pydantic" not in message


def test_all_that_is_wrong_is_said_at_once(file: Path) -> None:
    message = refusal("method.beta=x", "dtype=int8", file=file)
    assert "method.beta" in message and "dtype" in message and len(message.splitlines()) == 2


def test_required_settings_are_named_with_their_flags(toy: str) -> None:
    message = refusal(method=toy)
    assert "--model" in message and "--out" in message


def test_no_method_and_unknown_methods(toy: str) -> None:
    assert "palate train METHOD" in refusal()
    assert 'Did you mean "reward"' in refusal(method="rewrad")
    assert "can be imported" in refusal(method="my_package.no_such")


def test_a_module_missing_inside_a_method_keeps_its_traceback(toy: str, tmp_path: Path) -> None:
    (tmp_path / "lib" / "my_package" / "broken.py").write_text("import surely_not_installed\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        find_method("my_package.broken")


def test_a_module_that_is_no_method_says_what_it_lacks(toy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no METHOD"):
        find_method("my_package.__init__")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1, 2", "run.yaml:"),
        ("- 1\n- 2\n", "mapping"),
        ("method: reward\nmodel: a\nmodel: b\n", 'run.yaml:3: "model" is given a second time'),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such settings file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml").values == {}


def test_overrides_need_an_equals_sign() -> None:
    for text in ("training.epochs", "=3", "training.=3"):
        with pytest.raises(ConfigError, match=r"section\.key=value"):
            read_overrides([text])


keys = st.sampled_from(["a", "b", "c.x", "c.y", "c.z.w"])


@given(st.lists(st.tuples(keys, st.integers())))
def test_the_last_layer_to_set_a_key_wins(settings: list[tuple[str, int]]) -> None:
    merged = merge([read_overrides([f"{key}={value}"]) for key, value in settings])
    assert flatten(merged.values) == dict(settings)
    assert {key: merged.place_of(key) for key, _ in settings} == {k: f"override {k}={v}" for k, v in settings}


def test_a_replaced_section_forgets_its_keys() -> None:
    merged = merge([read_overrides(["model.size=3"]), read_overrides(["model=folder"])])
    assert merged.values == {"model": "folder"} and merged.places == {"model": "override model=folder"}


def test_closest_prefers_the_same_section() -> None:
    known = ["training.seed", "data.limit", "training.epochs", "data.seeds"]
    assert closest("training.seeds", known) == "training.seed"
    assert closest("limit", known) == "data.limit"
    assert closest("training.zzz", known) is None


def test_setting_docs_come_from_docstring_comment_and_function(toy: str) -> None:
    found = explain(find_method(toy))
    assert found.title.startswith("Toy -- nobody 2024") and "(eq. 1)" in found.text
    assert (found.needs, found.trains, found.reads) == (("reward",), ("reward",), "comparisons")
    meanings = {s.name: s.text for s in found.settings}
    assert meanings["beta"] == "how dearly leaving is paid for; > 0. The paper uses 0.1."
    assert meanings["low"] == meanings["high"] == "clip range; in [0, 1]."
    assert meanings["steps"] == "inner steps; 1 to 8 more is slower"
    assert meanings["temperature"] == "softness; > 0."
    assert meanings["careful"] == ""
    assert {s.name: s.default for s in found.settings}["high"] is None


def test_docstring_entries_end_with_their_section() -> None:
    doc = """Do.

    Args:
        a: one.
          more of it: with a colon.

        b (int): two.
    Returns:
        c: not an argument.
    """
    assert docstring_entries(doc) == {"a": "one. more of it: with a colon.", "b": "two."}


@pytest.mark.parametrize("name", method_names())
def test_every_setting_of_every_method_is_described(name: str) -> None:
    found = explain(find_method(name))
    assert [s.name for s in found.settings if not s.text] == []


def test_every_shared_setting_is_described_and_known() -> None:
    known = known_keys(method_class("sft"))
    for section, settings in shared_settings().items():
        for setting in settings:
            assert setting.text, f"{section}.{setting.name} has no description"
            assert (f"{section}.{setting.name}" if section else setting.name) in known


def test_settings_without_source_still_have_names() -> None:
    made = dataclasses.make_dataclass("Made", [("x", int, 1)])
    assert [(s.name, s.default, s.text) for s in settings_of(made)] == [("x", 1, "")]


def test_learning_rates_fall_with_size_and_rise_with_lora() -> None:
    for trains, reads in (
        (("policy",), "demonstrations"),
        (("reward",), "comparisons"),
        (("policy", "value"), "prompts"),
        (("policy",), "comparisons"),
        (("policy",), "judgements"),
    ):
        rates = [default_learning_rate(trains, reads, int(n)) for n in (1e5, 5e7, 5e8, 5e9, 1e11)]
        values = [rate.value for rate in rates]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] > 0
        assert default_learning_rate(trains, reads, 10, lora=True).value == pytest.approx(LORA_FACTOR * values[0])
        assert all("default" in rate.source for rate in rates)
    # InstructGPT's reward model (6B) and Ziegler et al.'s policy (GPT-2) are the anchors of their tables.
    assert default_learning_rate(("reward",), "comparisons", 6_000_000_000).value == 9e-6
    assert default_learning_rate(("policy", "value"), "prompts", 124_000_000).value == 1e-5


def test_config_yaml_holds_plain_values_only(file: Path) -> None:
    text = load_config(file=file).to_yaml()
    assert isinstance(yaml.safe_load(text), dict) and "!!" not in text


def test_config_is_frozen(file: Path) -> None:
    config = load_config(file=file)
    with pytest.raises(Exception, match="frozen"):
        config.model = "other"  # type: ignore[misc]
    assert isinstance(config, RunConfig)
    assert config.fill("training.epochs", 7, "here").training.epochs == 7
    assert textwrap.dedent(config.to_yaml()).startswith("method:\n  name: my_package.toy")
