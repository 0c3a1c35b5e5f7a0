"""The house plan, enforced: which room may import which, and the conventions that a grep of the syntax tree can hold.

A *room* is the first name below ``palate`` (``data``, ``methods``, ``cli``). A module imports its own floor or lower.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "palate"

FLOOR = {
    "types": 0,
    "errors": 0,
    "functional": 1,
    "data": 2,
    "models": 2,
    "generation": 2,
    "methods": 3,
    "training": 4,
    "feedback": 4,
    "evaluation": 4,
    "health": 4,
    "environment": 4,
    "report": 4,
    # What turns settings into runs: everything between the training room and the command line.
    **dict.fromkeys(
        ("settings_tree", "settings_problems", "config", "defaults", "resolve", "lookup", "method_docs", "run_folder"),
        5,
    ),
    **dict.fromkeys(("stage", "texts", "console", "pipelines", "api"), 5),
    "cli": 6,
    "__main__": 6,
    "server": 6,
}
# Within a floor rooms may import one another, except what points backwards here.
FORBIDDEN_ON_THE_SAME_FLOOR = {("data", "models"), ("data", "generation"), ("models", "generation")}
PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
HEAVY = ("torch", "transformers", "datasets", "peft", "matplotlib", "pandas")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``src/palate/data/chat.py`` -> ``palate.data.chat``; a package's ``__init__`` is the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "palate" and len(parts) > 1 else None


def imports(tree: ast.AST, module: str, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that the tree imports, also inside functions, with its line; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
                base = ".".join([*above, base] if base else above)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module's imports break, one line each."""
    found = []
    room = room_of(module)
    for imported, line in imports(ast.parse(source), module, is_package):
        other = room_of(imported)
        where = f"{module}:{line} imports {imported}"
        top = imported.split(".")[0]
        if top in PICKLES:
            found.append(f"{where}: only safetensors and JSON are read and written")
        if room in ("functional", "methods"):
            if top in ("transformers", "tokenizers", "datasets", "peft", "yaml", "pydantic", "os", "pathlib"):
                found.append(f"{where}: {room}/ never sees a tokenizer, a path or a settings file")
            if top == "torch" and imported.startswith(("torch.distributed", "torch.cuda")):
                found.append(f"{where}: {room}/ never sees a device or a rank")
        if other is None or room is None or other == room:
            continue
        if other not in FLOOR:
            continue  # an attribute of the package itself, such as palate.__version__
        if FLOOR[other] > FLOOR[room]:
            found.append(f"{where}: floor {FLOOR[room]} may not import floor {FLOOR[other]}")
        if (room, other) in FORBIDDEN_ON_THE_SAME_FLOOR:
            found.append(f"{where}: {room}/ comes before {other}/")
        if room == "functional" and other not in ("types", "errors"):
            found.append(f"{where}: functional/ imports torch and types only")
        asking = ("palate.models.forward", "palate.models.preferences")  # how a role is asked
        if room == "methods" and FLOOR[other] == 2 and not imported.startswith(asking):
            found.append(f"{where}: of floor 2, methods/ may use the functions of models.forward and .preferences only")
    return found


# The package's front page may name anything, lazily: test_importing_palate_is_light holds it to that.
@pytest.mark.parametrize("path", [p for p in modules() if name_of(p) != "palate"], ids=name_of)
def test_a_module_imports_its_own_floor_or_lower(path: Path) -> None:
    module = name_of(path)
    assert room_of(module) in FLOOR, f"{module}: give this room a floor in {Path(__file__).name}"
    assert breaches(path.read_text(encoding="utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("palate.functional.masked", "from palate.data import records"),
        ("palate.functional.masked", "import transformers"),
        ("palate.methods.ppo", "from palate.models.load import load_policy"),
        ("palate.methods.ppo", "from ..models import load"),
        ("palate.methods.ppo", "def f():\n    from palate.config import Settings"),
        ("palate.methods.ppo", "from pathlib import Path"),
        ("palate.data.chat", "from palate.models import forward"),
        ("palate.training.loop", "from palate import cli"),
        ("palate.report.page", "import pickle"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert breaches(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "palate.methods.ppo",
            "from palate.models.forward import token_logprobs\nfrom palate.methods.sft import sft_loss",
        ),
        ("palate.methods.ppo", "import palate.models.forward as forward"),
        ("palate.functional.masked", "import torch\nfrom palate.types import Mean"),
        ("palate.training.loop", "from palate.data import collate\nfrom palate.types import Method"),
        ("palate.models.rewards", "from palate.data.chat import Chat"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert breaches(source, module) == []


def unpickling(tree: ast.AST) -> list[int]:
    """Lines that call ``torch.load``/``torch.save`` or allow NumPy to unpickle."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        allows = any(
            k.arg == "allow_pickle" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            for k in node.keywords
        )
        if called in ("torch.load", "torch.save") or allows:
            lines.append(node.lineno)
    return lines


def pad_comparisons(tree: ast.AST) -> list[int]:
    """Lines that ask whether something equals the pad id (``is None`` is another question)."""

    def names_pad(node: ast.expr) -> bool:
        return any(
            isinstance(part, ast.Name | ast.Attribute)
            and (part.id if isinstance(part, ast.Name) else part.attr) in ("pad_token_id", "pad_id", "pad_token")
            for part in ast.walk(node)
        )

    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            equalities = [
                right
                for op, right in zip(node.ops, node.comparators, strict=True)
                if isinstance(op, ast.Eq | ast.NotEq)
            ]
            if equalities and any(names_pad(side) for side in [node.left, *equalities]):
                lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("eq", "ne"):
            lines += [node.lineno] * any(names_pad(argument) for argument in [node.func.value, *node.args])
    return lines


def column_shifts(tree: ast.AST) -> list[int]:
    """Lines with ``[:, 1:]`` or ``[:, :-1]``: the one shift of the house stands in models/forward.py."""
    lines = []
    for node in ast.walk(tree):
        after_rows = (
            node.slice.elts[1:] if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) else []
        )
        if any(ast.unparse(part) in ("1:", ":-1") for part in after_rows):
            lines.append(node.lineno)
    return lines


def test_nothing_is_pickled() -> None:
    assert {
        name_of(p): lines for p in modules() if (lines := unpickling(ast.parse(p.read_text(encoding="utf-8"))))
    } == {}


def test_tokens_are_compared_with_a_pad_id_in_data_and_generation_only() -> None:
    found = {name_of(p): pad_comparisons(ast.parse(p.read_text(encoding="utf-8"))) for p in modules()}
    assert {m: lines for m, lines in found.items() if lines and room_of(m) not in ("data", "generation")} == {}


def test_methods_never_shift_columns() -> None:
    found = {name_of(p): column_shifts(ast.parse(p.read_text(encoding="utf-8"))) for p in modules()}
    assert {m: lines for m, lines in found.items() if lines and room_of(m) == "methods"} == {}


def test_training_never_branches_on_a_methods_name() -> None:
    methods = {p.stem for p in (PACKAGE / "methods").glob("*.py") if not p.stem.startswith("_")}
    found = []
    for path in (PACKAGE / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            constants: list[ast.AST] = []
            if isinstance(node, ast.Compare):
                constants = [part for side in [node.left, *node.comparators] for part in ast.walk(side)]
            elif isinstance(node, ast.match_case):
                constants = list(ast.walk(node.pattern))
            if any(isinstance(part, ast.Constant) and part.value in methods for part in constants):
                found.append(f"{name_of(path)}:{getattr(node, 'lineno', '?')}")
    assert found == []


@pytest.mark.parametrize(
    ("check", "source"),
    [
        (unpickling, "state = torch.load(path)"),
        (unpickling, "x = numpy.load(path, allow_pickle=True)"),
        (pad_comparisons, "mask = ids != tokenizer.pad_token_id"),
        (pad_comparisons, "mask = ids.ne(pad_id)"),
        (column_shifts, "x = logprobs[:, 1:]"),
        (column_shifts, "x = logits[:, :-1, :]"),
    ],
)
def test_a_broken_convention_is_seen(check, source: str) -> None:
    assert check(ast.parse(source)) == [1]


@pytest.mark.parametrize("code", ["import palate", "import palate.cli"])
def test_importing_palate_is_light(code: str) -> None:
    """``palate --help`` answers at once: nothing heavy is imported before a command needs it."""
    program = f"import sys; {code}; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
