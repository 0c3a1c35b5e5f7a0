"""What a frozen reference says of every response, computed once before the first step and kept for later runs.

A method says by ``asks_reference`` what it asks of the reference: "rows" = the log-probs of the batch's own rows; "rows and
more" = other things too (KTO: responses after another prompt). Of both the rows' log-probs are computed in large batches
without gradient, looked up in later epochs, and found again by resumed and later runs with the same reference and tokens.
After "rows" the reference itself is let go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from palate.data.collate import Item, collate
from palate.errors import RunError
from palate.models.forward import response_logprobs
from palate.stage.reference_store import (
    Known,
    ReferenceKey,
    Unreadable,
    computes_in_float32,
    read_store,
    reference_key,
    row_key,
    weights_of_store,
    write_store,
)
from palate.types import moved

Say = Callable[[str], None]
RUN_FILE = "reference.safetensors"  # the run's own copy: a resumed run gets its numbers back bit for bit
CHUNK_TOKENS = 16_384  # tokens scored between two looks at the clock; the forward room cuts them to what fits
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_WRITES = 10.0, 60.0
RECHECKED = 4  # known responses that are scored again, to see that they are still right


def items_with_reference(
    reference: nn.Module, sides: Sequence[Sequence[Item]], run: Path, cache: Path, device: torch.device, say: Say
) -> list[list[Item]]:
    """The items of each side with the reference's log-prob in every row; what is not known yet is computed and kept.

    Args:
        reference: frozen, as it is before training.
        sides: items to train on, to evaluate on.
        run: the run's folder; its own copy is looked at first.
        cache: the folder shared between runs. One that cannot be written is said, and does without.
        device: where the reference is.
        say: told what was found and how far the rest is.
    Raises:
        RunError: the reference is not the one that this run was started with.
    """
    key, own = reference_key(reference, device), run / RUN_FILE
    before = weights_of_store(own)
    if before not in (None, key.weights):
        raise RunError(
            f"{run}: the reference has other weights than when this run was started. Resumed with it, the run would be "
            "neither the old one nor a new one. Put the old model back, or give another --out for a new run."
        )
    stores = [own, cache / f"{key.all[:32]}.safetensors"]
    items = [item for side in sides for item in side]
    known = _known(stores, key, say)
    if not _agree(reference, items, known, device):
        say(f"reference log-probs in {cache} are not what the reference says now: all are computed anew.")
        known = {}
    wanted = {row_key(row) for item in items for row in item.rows}
    missing = len(wanted - known.keys())
    say(f"reference log-probs: {len(wanted) - missing:,} of {len(wanted):,} responses known, {missing:,} to compute.")
    started = written = said = time.monotonic()
    done = 0
    for rows, logprobs in _computed(reference, items, known, device):
        done += sum(row not in known for row in rows)
        known |= {row: value for row, value in zip(rows, logprobs, strict=True) if row not in known}
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            left = (now - started) / max(done, 1) * (missing - done)
            say(f"reference log-probs: {done:,} of {missing:,} responses, {left:.0f} s left")
            said = now
        if now - written >= SECONDS_BETWEEN_WRITES:
            _keep(stores, key, known, wanted, say)
            written = now
    if missing:
        say(f"reference log-probs: {missing:,} responses in {time.monotonic() - started:.1f} s")
    _keep(stores, key, known, wanted, say)
    return [[_filled(item, known) for item in side] for side in sides]


def _known(stores: Sequence[Path], key: ReferenceKey, say: Say) -> Known:
    """What the files know, the first one's word before the second's."""
    known: Known = {}
    for path in reversed(stores):
        try:
            known |= read_store(path, key)
        except Unreadable as error:
            say(f"{path}: {error}; its log-probs are computed anew.")
    return known


def _agree(reference: nn.Module, items: Sequence[Item], known: Known, device: torch.device) -> bool:
    """Are a few known log-probs what the reference says now? Rounding may differ with the batch, and more in bf16."""
    there = [item for item in items if all(row_key(row) in known for row in item.rows)][:RECHECKED]
    if not there:
        return True
    rows, found = _scored(reference, there, device)
    share, least = (1e-4, 1e-3) if device.type == "cpu" and computes_in_float32(reference) else (0.03, 0.5)
    return all(abs(value - known[row]) <= least + share * abs(value) for row, value in zip(rows, found, strict=True))


def _computed(
    reference: nn.Module, items: Sequence[Item], known: Known, device: torch.device
) -> Iterator[tuple[list[bytes], list[float]]]:
    """(keys, log-probs) of chunks of items of like length, of those chunks in which something is not known.

    A chunk is scored whole: what it is made of, and with it the rounding, depends on the records alone, and not on where
    an earlier start was cut short.
    """
    for chunk in _chunks(items):
        if any(row_key(row) not in known for item in chunk for row in item.rows):
            yield _scored(reference, chunk, device)


def _chunks(items: Sequence[Item]) -> Iterator[list[Item]]:
    part: list[Item] = []
    held = 0
    for item in sorted(items, key=lambda item: max(len(row.ids) for row in item.rows)):
        if part and held + item.length > CHUNK_TOKENS:
            yield part
            part, held = [], 0
        part.append(item)
        held += item.length
    if part:
        yield part


@torch.no_grad()
def _scored(reference: nn.Module, items: Sequence[Item], device: torch.device) -> tuple[list[bytes], list[float]]:
    tokens = moved(collate(items, "demonstrations"), device)
    return [row_key(row) for item in items for row in item.rows], response_logprobs(reference, tokens).tolist()


def _keep(stores: Sequence[Path], key: ReferenceKey, known: Known, wanted: set[bytes], say: Say) -> None:
    """Write what the files do not hold yet: the run's own rows into its copy, everything into the cache."""
    own, shared = stores
    ours = {row: value for row, value in known.items() if row in wanted}
    for path, rows in ((own, ours), (shared, known)):
        try:
            there = read_store(path, key)
        except Unreadable:
            there = {}
        if rows.keys() <= there.keys() and all(there[row] == value for row, value in rows.items()):
            continue
        try:
            write_store(path, key, there | rows)
        except OSError as error:
            if path == own:
                raise RunError(
                    f"{path} cannot be written ({error}). Free some space and give the same command again."
                ) from error
            say(f"{path} cannot be written ({error}): later runs compute the reference's log-probs again.")


def _filled(item: Item, known: Known) -> Item:
    rows = tuple(replace(row, reference_logprob=known[row_key(row)]) for row in item.rows)
    return replace(item, rows=rows)
