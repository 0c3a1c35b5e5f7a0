"""Whether a response has a form: a regular expression matches it, or it is JSON of the shape that was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import regex

from palate.errors import ConfigError, ModelError
from palate.models.quiet import did_you_mean
from palate.models.samples import Sample

SECONDS = 2.0  # for one expression on one response: some expressions take time exponential in the text
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
    "any": object,
}


class RegexCheck:
    """1 where the expression matches.

    Args:
        pattern: in Python's syntax; ``.`` stops at line breaks unless it begins with (?s).
        match: "search" = somewhere in the response, "whole" = the response without the white space around it.
    """

    field = None

    def __init__(self, pattern: str = "", match: str = "search") -> None:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"reward: check: regex has the pattern {pattern!r}. Give one: pattern: '^Answer: \\d+'.")
        if match not in ("search", "whole"):
            raise ConfigError(f'reward: match "{match}" is not known. Choose: search, whole.')
        try:
            self.pattern = regex.compile(pattern)
        except regex.error as error:
            raise ConfigError(f"reward: {pattern!r} is no regular expression: {error}.") from None
        self.match = match

    def read(self, value: Any) -> Any:
        return value

    def judge(self, samples: Sequence[Sample], wanted: Sequence[Any]) -> list[float]:
        return [float(self._matches(sample)) for sample in samples]

    def _matches(self, sample: Sample) -> bool:
        try:
            if self.match == "whole":
                return self.pattern.fullmatch(sample.response.strip(), timeout=SECONDS) is not None
            return self.pattern.search(sample.response, timeout=SECONDS) is not None
        except TimeoutError:
            raise ModelError(
                f"reward: the expression {self.pattern.pattern!r} takes more than {SECONDS:g} s on this response. Write it "
                f"without nested repetitions, as in (a+)+.{sample.show()}"
            ) from None


class JsonCheck:
    """1 where the response is one JSON value of the shape that was asked for, and nothing else but white space.

    RFC 8259 is taken strictly: no NaN or Infinity, and no name twice in one object.

    Args:
        schema: None = any value; a list of names = an object that has them; a mapping from names to types = an object
            that has them with values of these types ("string", "number", "integer", "boolean", "array", "object",
            "null", "any"). Other names may stand beside them.
        fenced: what stands in the response's only ``` block is read instead.
    """

    field = None

    def __init__(self, schema: Sequence[str] | Mapping[str, str] | None = None, fenced: bool = False) -> None:
        if isinstance(schema, str) or not isinstance(schema, Sequence | Mapping | None):
            raise ConfigError(f"reward: schema is {schema!r}. Write a list of names, or a mapping from names to types.")
        if not isinstance(fenced, bool):
            raise ConfigError(f"reward: fenced is {fenced!r}; expected true or false.")
        self.fenced = fenced
        self.schema: dict[str, str] | None = None
        if schema is not None:
            types = dict(schema) if isinstance(schema, Mapping) else dict.fromkeys(schema, "any")
            for name, kind in types.items():
                if kind not in TYPES:
                    raise ConfigError(
                        f'reward: schema: "{name}" has type {kind!r}.{did_you_mean(str(kind), TYPES)} Known: '
                        f"{', '.join(TYPES)}."
                    )
            self.schema = {str(name): kind for name, kind in types.items()}

    def read(self, value: Any) -> Any:
        return value

    def judge(self, samples: Sequence[Sample], wanted: Sequence[Any]) -> list[float]:
        return [float(self._fits(sample.response)) for sample in samples]

    def _fits(self, text: str) -> bool:
        if self.fenced:
            blocks = fenced_blocks(text)
            if len(blocks) != 1:
                return False
            text = blocks[0]
        try:
            found = json.loads(text, object_pairs_hook=_object, parse_constant=_refused)
        except (ValueError, RecursionError):  # malformed, a number of thousands of digits, or nested without end
            return False
        if self.schema is None:
            return True
        return isinstance(found, dict) and all(
            name in found and _is(found[name], kind) for name, kind in self.schema.items()
        )


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer") and isinstance(value, bool):
        return False
    return isinstance(value, TYPES[kind])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def fenced_blocks(text: str) -> list[str]:
    """What stands between ``` and ```, each on a line of its own (a language may follow the first); only closed blocks."""
    blocks: list[str] = []
    inside: list[str] | None = None
    for line in text.splitlines():
        if not line.lstrip().startswith("```"):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside = []
        else:
            blocks.append("\n".join(inside))
            inside = None
    return blocks
