"""Files of login tokens: lines "name role token", which nobody else may read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.feedback.store import Store


def take_tokens(store: Store, path: Path) -> None:
    """The people of a file may log in with its tokens; who is not in the store is added."""
    from palate.feedback import people

    lines = _private_lines(path)
    known = {person.name for person in people.people(store)}
    for number, line in enumerate(lines, 1):
        parts = line.split()
        if not parts or line.startswith("#"):
            continue
        if len(parts) != 3:
            raise ConfigError(f'{path}:{number}: {len(parts)} words; expected "name role token".')
        name, role, token = parts
        if name not in known:
            people.add_person(store, name, role)
        people.issue_link(store, name, token=token)


def annotators_of(path: Path, count: int) -> dict[str, str]:
    """The tokens of the first ``count`` annotators of a file, by name."""
    lines = [line.split() for line in _private_lines(path)]
    found = {parts[0]: parts[2] for parts in lines if len(parts) == 3 and parts[1] == "annotator"}
    if len(found) < count:
        raise ConfigError(f'{path}: {len(found)} lines "name annotator token"; expected at least {count}.')
    return dict(list(found.items())[:count])


def _private_lines(path: Path) -> list[str]:
    """The lines of a file that nobody else can read."""
    try:
        if os.stat(path).st_mode & 0o077:
            raise ConfigError(f"{path}: others on this machine can read it. First: chmod 600 {path}")
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
