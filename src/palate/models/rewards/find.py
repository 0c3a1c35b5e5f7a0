"""The Python function that a text names: "module:function" or "file.py:function"."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from palate.errors import ConfigError
from palate.models.quiet import did_you_mean

FUNCTION = re.compile(r"^(?P<module>[A-Za-z_][\w.]*|.*\.py):(?P<name>[A-Za-z_]\w*)$")


def find_function(path: str) -> Callable[..., Any]:
    """The function that "module:function" or "file.py:function" names; the current folder is searched too.

    Raises:
        ConfigError: no such module or function.
    """
    match = FUNCTION.match(path)
    if match is None:
        raise ConfigError(f'reward: "{path}" names no function. Write "module:function" or "file.py:function".')
    where, name = match["module"], match["name"]
    module = _module_of_file(where) if where.endswith(".py") else _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f'reward: {where} has no function "{name}".{did_you_mean(name, own)} Found: {", ".join(own)}.'
        )
    return function  # type: ignore[no-any-return]


def _module(name: str) -> ModuleType:
    try:
        with _current_folder_importable():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is missing inside the user's module is their error, and keeps its traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigError(
            f'reward: no module "{name}" can be imported from {os.getcwd()} or the Python path. A file can be named by its '
            'path: "folder/file.py:function".'
        ) from None


def _module_of_file(path: str) -> ModuleType:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f'reward: there is no file "{path}" (looked from {os.getcwd()}).')
    # Dataclasses look their module up by name while it is read; the whole path as the name hides no other module.
    name = f"palate.file:{file.resolve()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As ``python -m`` has it; an installed command does not."""
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
