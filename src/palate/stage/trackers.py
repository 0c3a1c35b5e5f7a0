"""Sinks for metrics besides ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio. Each is an optional extra."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palate.errors import ConfigError
from palate.settings_tree import closest

Metrics = Mapping[str, Any]


class Tracker(NamedTuple):
    """Where metrics are sent, and how that ends."""

    log: Callable[[Metrics], None]
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raises:
    ConfigError: an unknown name, or its package is not installed; said before anything is loaded or made.
    """
    for name in names:
        if name not in _KNOWN:
            near = closest(name, _KNOWN)
            hint = f' Did you mean "{near}"?' if near else ""
            raise ConfigError(f'trackers: unknown tracker "{name}".{hint} Known: {", ".join(_KNOWN)}.')
        if importlib.util.find_spec(name) is None:
            raise _not_installed(name)


def open_trackers(names: Sequence[str], run_name: str, folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """Start the named trackers.

    Raises:
        ConfigError: unknown name, or its package is not installed.
    """
    check_trackers(names)
    return [_KNOWN[name](run_name, folder, settings) for name in names]


def numbers(metrics: Metrics) -> dict[str, float]:
    """What can be drawn, named by its split: "validation/reward/accuracy"."""
    split = metrics.get("split", "train")
    return {
        f"{split}/{name}": float(value)
        for name, value in metrics.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _not_installed(package) from error


def _not_installed(package: str) -> ConfigError:
    return ConfigError(
        f"trackers: {package} is not installed. Install it with: pip install {package}   "
        '(all trackers, in the checkout: pip install ".[trackers]")'
    )


def _tensorboard(run_name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    _need("tensorboard", "tensorboard")
    writer = _need("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def log(metrics: Metrics) -> None:
        for name, value in numbers(metrics).items():
            writer.add_scalar(name, value, metrics["step"])

    return Tracker(log, writer.close)


def _wandb(run_name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    wandb = _need("wandb", "wandb")
    # The same id every time, so that a resumed run goes on in the same page.
    run = wandb.init(
        project="palate", name=run_name, id=run_name, resume="allow", dir=str(folder), config=dict(settings)
    )
    return Tracker(lambda metrics: run.log(numbers(metrics), step=int(metrics["step"])), run.finish)


def _trackio(run_name: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    trackio = _need("trackio", "trackio")
    trackio.init(project="palate", name=run_name, config=dict(settings), resume="allow")
    return Tracker(lambda metrics: trackio.log(numbers(metrics), step=int(metrics["step"])), trackio.finish)


_KNOWN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
