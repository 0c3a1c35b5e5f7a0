"""What a method is and which settings it has, read from the method's own file: nothing is written twice."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
from types import ModuleType
from typing import Any, NamedTuple

_SECTION = re.compile(r"^(Args|Arguments|Attributes|Settings|Fields|Parameters):\s*$")
# What a description says of a field, besides its meaning.
_CHOSEN = re.compile(r"\b(chosen by [^;.]+) unless set\b")  # the default in the code is only a place holder
_STATE = "part of the run's state"  # kept with the settings, set by nobody
_ENTRY = re.compile(r"^(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)(?:\s*\([^)]*\))?:\s+(\S.*)$")


class Setting(NamedTuple):
    """One field of a settings dataclass."""

    name: str
    type: str
    default: Any  # dataclasses.MISSING for a setting that must be given
    text: str  # what the author says of it; "" when nothing is said

    @property
    def default_text(self) -> str:
        if self.default is dataclasses.MISSING:
            return "(must be given)"
        if chosen := _CHOSEN.search(self.text):
            return f"({chosen[1]})"
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return "null" if self.default is None else repr(self.default) if self.default == "" else str(self.default)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a setting that must be given has no "default"."""
        return {key: value for key, value in self._asdict().items() if value is not dataclasses.MISSING}


class Explanation(NamedTuple):
    """A method as its file describes it."""

    name: str
    title: str  # first paragraph of the docstring: what it is -- its papers
    text: str  # the whole docstring: paper, equations, what was left out
    needs: tuple[str, ...]
    trains: tuple[str, ...]
    reads: str
    settings: list[Setting]

    def __str__(self) -> str:
        lines = [
            self.text,
            "",
            f"Needs {', '.join(self.needs)}; trains {', '.join(self.trains)}; reads {self.reads}.",
            "",
        ]
        lines += [f"  {s.name}: {s.type} = {s.default_text}  {s.text}".rstrip() for s in self.settings]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"settings": [setting.to_dict() for setting in self.settings]}


def explain(module: ModuleType) -> Explanation:
    """Read a method's module (see ``lookup.find_method``)."""
    method = module.METHOD
    text = _without_markup(inspect.cleandoc(module.__doc__ or "(no description)"))
    return Explanation(
        name=module.__name__.removeprefix("palate.methods."),
        title=" ".join(text.partition("\n\n")[0].split()),
        text=text,
        needs=tuple(method.needs),
        trains=tuple(method.trains),
        reads=method.reads,
        settings=settings_of(method, module),
    )


def settings_of(cls: Any, module: ModuleType | None = None) -> list[Setting]:
    """The fields of a settings dataclass with defaults and descriptions.

    A description is looked for in this order: the class docstring's ``Attributes:`` (or ``Args:``) section; a comment
    beside the field; the ``Args:`` section of a public function of ``module`` that takes an
    argument of the same name (``beta`` of ``dpo_loss`` explains ``DPO.beta``). A field that is "part of the run's
    state" is no setting.
    """
    described = {**_function_docs(module), **_comments(cls), **docstring_entries(cls.__doc__)}
    found = []
    for field in dataclasses.fields(cls):
        if not field.init or _STATE in described.get(field.name, ""):
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        type_name = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        found.append(Setting(field.name, type_name, default, _without_markup(described.get(field.name, ""))))
    return found


def _without_markup(text: str) -> str:
    """A docstring's ``code`` as people read it."""
    return text.replace("``", "`")


def docstring_entries(doc: str | None) -> dict[str, str]:
    """``name -> text`` of the sections of a docstring that describe arguments; "a, b: text" describes both."""
    entries: dict[str, list[str]] = {}
    current: list[str] | None = None
    indent = -1  # of the entries of the section that is being read; -1 outside such a section
    for line in inspect.cleandoc(doc or "").splitlines():
        depth = len(line) - len(line.lstrip())
        if depth == 0 and line.strip():
            indent, current = (0 if _SECTION.match(line) else -1), None
            continue
        if indent < 0 or not line.strip():
            continue
        if indent == 0:
            indent = depth
        match = _ENTRY.match(line.strip()) if depth == indent else None
        if match:
            current = [match[2]]
            for name in match[1].split(","):
                entries[name.strip().lstrip("*")] = current
        elif current is not None and depth > indent:
            current.append(line.strip())
    return {name: " ".join(lines) for name, lines in entries.items()}


def _function_docs(module: ModuleType | None) -> dict[str, str]:
    found: dict[str, str] = {}
    if module is not None:
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_") and function.__module__ == module.__name__:
                found |= docstring_entries(function.__doc__)
    return found


def _comments(cls: type) -> dict[str, str]:
    """Comments beside a field, of the class and of the dataclasses it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _comments_of_one(base)
    return found


def _comments_of_one(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made in an interactive session: there is no source to read
        return {}
    comments: dict[int, tuple[int, str]] = {}  # line -> (column, text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = (token.start[1], token.string.lstrip("#").strip())
    lines = source.splitlines()
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        field = re.match(r"\s+(\w+)\s*:\s*[^=\s]", line)
        if field and number in comments and field[1] in inspect.get_annotations(cls):
            texts = [comments[number][1], *_continued(lines, comments, number)]
            found.setdefault(field[1], " ".join(texts))
    return found


def _continued(lines: list[str], comments: dict[int, tuple[int, str]], number: int) -> list[str]:
    """The lines below a trailing comment that go on in its column."""
    column, texts = comments[number][0], []
    while (number := number + 1) in comments and comments[number][0] == column and lines[number - 1].lstrip()[0] == "#":
        texts.append(comments[number][1])
    return texts
