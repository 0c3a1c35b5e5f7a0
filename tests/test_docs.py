"""The documents say what the code does: pages, settings and defaults, metric names, links, commands."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "src" / "palate" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.py") if not path.stem.startswith("_"))
PAGES = sorted([*ROOT.glob("*.md"), *(p for d in ("docs", "examples", "benchmarks") for p in (ROOT / d).rglob("*.md"))])
HEADINGS = [
    "Quick facts",
    "Equations",
    "The code",
    "Settings",
    "Metrics to watch",
    "Details",
    "Left out",
    "When to choose it",
]
# State of the run that is kept in the method's fields; not a setting.
STATE = {"score_moments", "running_reward", "recent_costs", "desirable_reward", "undesirable_reward"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(text: str) -> list[tuple[int, str]]:
    outside = FENCE.sub("", text)
    return [(len(marks), title.strip()) for marks, title in re.findall(r"^(#+) (.*)$", outside, re.MULTILINE)]


def anchor(title: str) -> str:
    """How GitHub makes a link target of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def method_page(name: str) -> str:
    return (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


# -- methods ---------------------------------------------------------------------------------------------------------


def test_every_page_of_a_method_has_its_method() -> None:
    assert sorted(path.stem for path in (ROOT / "docs" / "methods").glob("*.md")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_a_page_with_all_headings(name: str) -> None:
    found = headings(method_page(name))
    assert found[0][0] == 1 and found[0][1].startswith(f"{name} — ")
    assert [title for level, title in found if level == 2] == HEADINGS


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_page_lists_its_settings_with_their_defaults(name: str) -> None:
    method = importlib.import_module(f"palate.methods.{name}").METHOD
    wanted = {f.name: f.default for f in dataclasses.fields(method) if f.name not in STATE}
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section(method_page(name), "Settings"), re.MULTILINE)
    assert {setting: yaml.safe_load(default) for setting, default in rows} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_page_names_its_roles_and_papers(name: str) -> None:
    module = importlib.import_module(f"palate.methods.{name}")
    facts = section(method_page(name), "Quick facts")
    row = dict(re.findall(r"^\| (\w+) \| (.*) \|$", facts, re.MULTILINE))
    frozen = [role for role in module.METHOD.needs if role not in module.METHOD.trains]
    assert all(role in row["Trained"] for role in module.METHOD.trains)
    assert all(role in row["Frozen"] for role in frozen) if frozen else row["Frozen"] == "nothing"
    assert module.METHOD.reads in row["Data"]
    title = module.__doc__.split("\n\n")[0]  # the papers that the method is
    assert all(number in facts for number in re.findall(r"\d{4}\.\d{5}", title))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_stands_in_both_tables_of_methods(name: str) -> None:
    for readme in ("README.md", "README.zh.md"):
        assert f"| [{name}](docs/methods/{name}.md) |" in (ROOT / readme).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_can_be_chosen(name: str) -> None:
    assert f"[{name}](methods/{name}.md)" in (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")


# -- metrics ---------------------------------------------------------------------------------------------------------


def metric_names(source: str) -> set[str]:
    """Names under which ``Mean`` values (and the loop's own numbers) are reported: keys of dictionaries and items set."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and _reported(key.value, value):
                    found.add(key.value)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            key = node.targets[0].slice
            if isinstance(key, ast.Constant) and isinstance(key.value, str) and _reported(key.value, node.value):
                found.add(key.value)
    return found


def _reported(name: str, value: ast.expr) -> bool:
    return "/" in name or ast.unparse(value).startswith("Mean")


def test_metric_names_are_found_in_code() -> None:
    assert metric_names('x = {"loss": Mean.of(y), "place": 3}; m["kl/old"] = Mean.of(z)') == {"loss", "kl/old"}


def test_every_metric_has_an_entry() -> None:
    entries = set()
    for level, title in headings((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")):
        entries |= set(re.findall(r"`([^`]+)`", title)) if level == 3 else set()
    files = [*METHODS.glob("*.py"), ROOT / "src" / "palate" / "training" / "loop.py"]
    reported = set().union(*(metric_names(path.read_text(encoding="utf-8")) for path in files))
    assert {"loss", "kl/reference", "tokens/all"} <= reported
    assert reported <= entries


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, wanted = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        found = file.exists() and file.is_relative_to(ROOT)
        if found and wanted:
            found = wanted in {anchor(title) for _, title in headings(file.read_text(encoding="utf-8"))}
        if not found:
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["index.md"]


def test_both_readmes_have_the_same_parts_commands_and_links() -> None:
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert FENCE.findall(english) == FENCE.findall(chinese)

    def links(text: str) -> list[str]:
        found = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
        return sorted(target for target in found if not target.startswith("README"))

    assert links(english) == links(chinese)


# -- commands --------------------------------------------------------------------------------------------------------


def commands_in(text: str) -> list[str]:
    """Lines of shell blocks that call palate, without their comments; one that ends with a backslash goes on."""
    blocks = [block.replace("\\\n", " ") for language, block in FENCE.findall(text) if language in ("bash", "")]
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.strip() for line in lines if line.strip().startswith("palate ")]


def parse(command: str) -> None:
    """Read a command line as the program would, without running it.

    Raises:
        click.ClickException: unknown command, unknown option, missing or malformed argument.
    """
    import typer

    from palate.cli import app

    words = shlex.split(command.removesuffix("&"), comments=True)[1:]
    program = typer.main.get_command(app)
    with program.make_context("palate", list(words)) as context:
        name, found, rest = program.resolve_command(context, words)  # type: ignore[attr-defined]
        while hasattr(found, "resolve_command"):  # palate label, palate label annotators
            context = found.make_context(name, list(rest), parent=context)
            name, found, rest = found.resolve_command(context, rest)
        found.make_context(name, rest, parent=context)
    if words[0] in ("train", "explain") and not words[1].startswith("-") and "." not in words[1]:
        assert words[1] in NAMES, f"no method {words[1]!r}"
    if words[0] == "train" and words[1] in NAMES:
        from palate.config import load_config

        overrides = [word for word in words[2:] if re.match(r"[a-z_.]+=", word)]
        load_config(words[1], flags={"model": "m", "data.train": "d", "out": "o", "reward": "r"}, overrides=overrides)


COMMANDS = [(relative(page), command) for page in PAGES for command in commands_in(page.read_text(encoding="utf-8"))]


def test_the_documents_have_commands() -> None:
    assert {"README.md", "docs/data.md", "docs/methods/ppo.md"} <= {page for page, _ in COMMANDS}


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_in_the_documents_is_one(page: str, command: str) -> None:
    parse(command)


@pytest.mark.parametrize(
    "command",
    [
        "palate trian sft",
        "palate train sft --modle x",
        "palate score --limit none -m x",
        "palate train sft epochs=2",
        "palate label export s.db --az x",
    ],
)
def test_a_wrong_command_would_be_seen(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|valid integer|unknown setting"):
        parse(command)


# -- files -----------------------------------------------------------------------------------------------------------


def check_yaml(block: str, file: Path) -> str:
    """What kind of a file the block shows; it is read as that."""
    from palate.config import load_settings
    from palate.feedback.simulated_people import Character
    from palate.feedback.task import task_of
    from palate.pipelines.recipe import read_recipe

    shown = yaml.safe_load(block)
    if "stages" in shown:
        file.write_text(block, encoding="utf-8")
        steps = read_recipe(file).steps
        assert [step.name for step in steps] == list(shown["stages"])
        return "pipeline"
    if "method" in shown:
        load_settings(settings=shown)
        return "settings"
    if "questions" in shown:
        task_of(shown)
        return "task"
    if all(name.startswith("simulated") for name in shown):
        assert all(Character(**character) for character in shown.values())
        return "people"
    reward = shown.get("reward", shown)
    load_settings("ppo", settings={"model": "m", "data": "d", "out": "o", "reward": reward})
    return "reward"


def test_the_files_that_documents_show_can_be_read(tmp_path: Path) -> None:
    kinds = set()
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "yaml":
                kinds.add(check_yaml(block, tmp_path / "shown.yaml"))
            elif language == "json":
                assert all(json.loads(line) for line in block.splitlines())
    assert kinds == {"pipeline", "settings", "task", "people", "reward"}


def test_the_python_that_documents_show_compiles_and_its_imports_are_there() -> None:
    for page in (page for page in PAGES if page.parent.name != "methods"):  # pages of methods quote lines in words
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palate"):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, name.name) for name in node.names), relative(page)


def test_names_used_from_python_are_there() -> None:
    import palate

    used = set()
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                used |= set(re.findall(r"\bpalate\.(\w+)\(", block))
    assert used and used <= set(palate.__all__)


def test_the_version_is_one() -> None:
    import tomllib

    import palate

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == palate.__version__
    assert f"\n## {palate.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
