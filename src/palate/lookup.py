"""Finding a method by its name: a module of ``palate.methods``, or any importable module such as my_package.my_method."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

from palate.errors import ConfigError
from palate.settings_tree import closest


def method_names() -> list[str]:
    """The built-in methods, in alphabetical order; found in the folder, so a new file needs no registration."""
    import palate.methods

    return sorted(m.name for m in pkgutil.iter_modules(palate.methods.__path__) if not m.name.startswith("_"))


def find_method(name: str) -> ModuleType:
    """The module of a method.

    Args:
        name: "reward", or a dotted module name. The current folder is searched too, as ``python -m`` would.
    Raises:
        ConfigError: no such module, or the module has no dataclass ``METHOD``.
    """
    full = name if "." in name else f"palate.methods.{name}"
    if "." in name and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(full)
    except ModuleNotFoundError as error:
        # A module that is missing *inside* the method's file is the author's error and keeps its traceback.
        if error.name is None or not (full == error.name or full.startswith(f"{error.name}.")):
            raise
        raise ConfigError(_unknown(name)) from None
    method = getattr(module, "METHOD", None)
    missing = [field for field in ("needs", "trains", "reads", "prepare", "loss") if not hasattr(method, field)]
    if method is None or missing:
        lacks = "METHOD" if method is None else f"METHOD.{missing[0]}"
        raise ConfigError(f"{full} is not a method: it has no {lacks}. Open palate/methods/sft.py for the shape.")
    return module


def method_class(name: str) -> Any:
    """The frozen dataclass whose fields are the method's settings."""
    return find_method(name).METHOD


def _unknown(name: str) -> str:
    if "." in name:
        return f'no module "{name}" can be imported. A method of your own is a module on the Python path with METHOD in it.'
    names = method_names()
    near = closest(name, names)
    hint = f' Did you mean "{near}"?' if near else ""
    return f'unknown method "{name}".{hint} Methods: {", ".join(names)}. List them with: palate methods'
