"""Several different responses to each prompt, from one model or several, with their origin: what people then judge.

K responses are dealt out over the models and temperatures in turn. A text that is there already is drawn again, at most
``ROUNDS`` times; what is then missing is counted. The work goes in chunks of ``CHUNK`` prompts, each with seeds of its
own and written whole, so that an interrupted run goes on where it stopped and gives the same responses.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palate.data.chat import Chat
from palate.data.collate import encode_records, prompt_ids
from palate.data.formats.convert import check_target, write_lines
from palate.data.kinds import Prompt, PromptText, Record
from palate.errors import ConfigError, DataError
from palate.feedback.items import Candidate, add_items
from palate.feedback.store import Store
from palate.feedback.tables import canonical_json
from palate.generation.sampler import SamplingSettings, sample
from palate.texts.common import Progress, context_of, policy_with_chat, say_cut
from palate.training.order import seeded

CHUNK = 32  # prompts sampled and written at once
ROUNDS = 3  # times that a response which is there already is drawn again
HASHED = (".safetensors", ".json", ".model", ".txt", ".jinja")  # files of a model's folder that say what it does


@dataclass(frozen=True)
class Plan:
    """What is sampled.

    Attributes:
        models: folders or hub names.
        temperatures: of every model, >= 0; 0 = greedy.
        k: different responses wanted for each prompt, 1 to 9.
        decoding: further fields of ``SamplingSettings``: max_new_tokens, top_p, top_k, ...
        seed: same seed, same responses.
        chat_template: None = each model's own.
        dtype, device: as for ``sample_records``.
    """

    models: Sequence[str]
    temperatures: Sequence[float] = (1.0,)
    k: int = 4
    decoding: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    chat_template: str | None = None
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.models or not self.temperatures:
            raise ConfigError("no model or no temperature to sample at. Give --model, and --temperature 0.7,1.0.")
        if not 1 <= self.k <= 9:
            raise ConfigError(f"k is {self.k}. Expected 1 to 9 responses for each prompt; more are not shown at once.")
        greedy = len(self.models) if set(self.temperatures) == {0.0} else None
        if greedy is not None and self.k > greedy:
            raise ConfigError(f"temperature 0 gives each model one response: {greedy} in all, and k is {self.k}.")


@dataclass
class Sampled:
    """What was done: rows of {"prompt", "responses", "sources"}, and counts.

    Attributes:
        prompts: in all; resumed: of them done before.
        responses: different ones of this run.
        repeated: drawn texts that were there already.
        short: prompts with fewer than k different responses.
        cut: responses without an end, cut at the longest length.
    """

    prompts: int = 0
    resumed: int = 0
    responses: int = 0
    repeated: int = 0
    short: int = 0
    cut: int = 0

    def __str__(self) -> str:
        said = f"{self.responses} responses to {self.prompts - self.resumed} prompts"
        said += f"; {self.resumed} prompts were done before" if self.resumed else ""
        said += f"; {self.repeated} texts drawn twice" if self.repeated else ""
        said += f"; {self.short} prompts have fewer than wanted" if self.short else ""
        return said + (f"; {self.cut} responses were cut at the longest length" if self.cut else "")


def sample_to_store(
    path: str | Path,
    plan: Plan,
    prompts: Sequence[PromptText | Record],
    *,
    make: Callable[[], Store],
    progress: Progress = None,
) -> Sampled:
    """Put prompts with responses into a store as items to judge; what an interrupted run put there is kept.

    Args:
        make: makes the store where it is not there.
    """
    records, done = _records(prompts), Sampled(prompts=len(prompts))
    with Store.open(path) if Path(path).exists() else make() as store:
        speakers = _Speakers(plan)
        name = speakers.name(records)
        finished = _chunks_in(store, name)
        for chunk, part in _chunks(records):
            if chunk in finished:
                done.resumed += len(part)
            else:
                about = {"plan": name, "chunk": chunk}
                rows = speakers.rows(chunk, part, done)
                add_items(store, [_candidate(row, record, about) for row, record in zip(rows, part, strict=True)])
            if progress is not None:
                progress(min((chunk + 1) * CHUNK, len(records)), len(records))
    return done


def sample_to_file(
    out: str, plan: Plan, prompts: Sequence[PromptText | Record], *, overwrite: bool = False, progress: Progress = None
) -> Sampled:
    """Write {"prompt", "responses", "sources"} lines, which ``palate label import`` takes.

    An interrupted run leaves OUT.partial, and the same command goes on with it.
    """
    records, done = _records(prompts), Sampled(prompts=len(prompts))
    check_target(out, overwrite=overwrite)
    speakers = _Speakers(plan)
    partial = None if out == "-" else Path(out).expanduser().with_name(Path(out).name + ".partial")
    rows = _resumed(partial, speakers.name(records), done)
    for chunk, part in _chunks(records):
        if (chunk + 1) * CHUNK <= len(rows) or (chunk * CHUNK < len(rows) and len(rows) == len(records)):
            continue
        made = speakers.rows(chunk, part, done)
        rows += made
        if partial is not None:
            _append(partial, made)
        if progress is not None:
            progress(min((chunk + 1) * CHUNK, len(records)), len(records))
    write_lines(out, rows, overwrite=overwrite)
    if partial is not None:
        partial.unlink(missing_ok=True)
    return done


def content_hash(where: str) -> str:
    """SHA-256 over the files of a model's folder, by name; of a hub name, the name alone ("name:...")."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        return f"name:{where}"
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in HASHED):
        found.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


class _Speakers:
    """The models of a plan, loaded once, and what they say."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.hashes = [content_hash(model) for model in plan.models]
        self.settings = [
            SamplingSettings(**{**plan.decoding, "temperature": temperature}) for temperature in plan.temperatures
        ]
        self._loaded: dict[str, tuple[Any, Chat]] = {}

    def name(self, records: Sequence[Prompt]) -> str:
        """What tells this plan on these prompts from any other."""
        plan = self.plan
        about = [self.hashes, list(plan.temperatures), plan.k, dict(plan.decoding), plan.seed, plan.chat_template]
        asked = [r.prompt if isinstance(r.prompt, str) else list(r.prompt) for r in records]
        return hashlib.sha256(canonical_json([about, asked]).encode()).hexdigest()[:20]

    def rows(self, chunk: int, records: Sequence[Prompt], done: Sampled) -> list[dict[str, Any]]:
        """K different responses to each prompt of a chunk."""
        combinations = [(m, t) for t in range(len(self.settings)) for m in range(len(self.plan.models))]
        found: list[dict[str, dict[str, Any]]] = [{} for _ in records]  # text -> source, by prompt
        for attempt in range(1 + ROUNDS):
            for place, (m, t) in enumerate(combinations):
                share = len(range(place, self.plan.k, len(combinations)))
                # a greedy response is the same each time
                wanted = share if attempt == 0 else 0 if self.plan.temperatures[t] == 0 else share or 1
                if self.plan.temperatures[t] == 0:
                    wanted = min(wanted, 1)
                short = [i for i in range(len(records)) if attempt == 0 or len(found[i]) < self.plan.k]
                if wanted and short:
                    self._draw(
                        m, t, wanted, [records[i] for i in short], [found[i] for i in short], (chunk, attempt), done
                    )
        for texts in found:
            done.responses += len(texts)
            done.short += len(texts) < self.plan.k
            done.cut += sum(not source["finished"] for source in texts.values())
        return [
            {
                "prompt": record.prompt if isinstance(record.prompt, str) else list(record.prompt),
                "responses": list(texts),
                "sources": list(texts.values()),
            }
            for record, texts in zip(records, found, strict=True)
        ]

    def _draw(
        self,
        m: int,
        t: int,
        count: int,
        records: Sequence[Prompt],
        found: Sequence[dict[str, dict[str, Any]]],
        where: tuple[int, int],
        done: Sampled,
    ) -> None:
        """Draw ``count`` responses to each prompt, and keep those that are not there yet."""
        policy, chat = self._speaker(m)
        settings, seed = self.settings[t], seeded(self.plan.seed, *where, m, t)
        room = context_of(policy) - settings.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"max_new_tokens {settings.max_new_tokens} leaves no room for a prompt in {self.plan.models[m]}."
            )
        items, report = encode_records(list(records), "prompts", chat, max_length=max(2, room))
        if where == (0, 0):
            say_cut(report, room)
        if len(items) != len(records):
            raise DataError(f"{self.plan.models[m]}: {len(records) - len(items)} prompts cannot be encoded: {report}.")
        tokens = sample(
            policy,
            prompt_ids(items),
            settings,
            samples_per_prompt=count,
            stop_token_ids=chat.stop_token_ids,
            generator=seed,
            records=[item.record for item in items],
        )
        for row in range(len(tokens.ids)):
            text = chat.text(tokens.ids[row][tokens.response_mask[row]].tolist())
            kept = found[row // count]
            if text in kept or not text.strip():
                done.repeated += 1
            elif len(kept) < self.plan.k:
                kept[text] = self._source(m, t, bool(tokens.extras["finished"][row]))

    def _source(self, m: int, t: int, finished: bool) -> dict[str, Any]:
        settings = {**self.plan.decoding, "temperature": self.plan.temperatures[t]}
        source = {"model": self.plan.models[m], "model_hash": self.hashes[m], "settings": settings}
        return source | {"seed": self.plan.seed, "finished": finished}

    def _speaker(self, m: int) -> tuple[Any, Chat]:
        name = self.plan.models[m]
        if name not in self._loaded:
            self._loaded[name] = policy_with_chat(
                name, self.plan.chat_template, None, self.plan.dtype, self.plan.device
            )
        return self._loaded[name]


def _records(prompts: Sequence[PromptText | Record]) -> list[Prompt]:
    """Each prompt once."""
    if not prompts:
        raise DataError("no prompt to respond to.")
    found: dict[str, Prompt] = {}
    for each in prompts:
        if isinstance(each, Prompt):
            record = each
        elif isinstance(each, str | tuple | list):
            record = Prompt(each)
        else:
            record = Prompt(each.prompt, source=each.source)
        found.setdefault(json.dumps(record.prompt, sort_keys=True), record)
    return list(found.values())


def _chunks(records: Sequence[Prompt]) -> Iterator[tuple[int, Sequence[Prompt]]]:
    for start in range(0, len(records), CHUNK):
        yield start // CHUNK, records[start : start + CHUNK]


def _chunks_in(store: Store, name: str) -> set[int]:
    """Chunks of this plan that are in a store; a chunk is written in one transaction."""
    with store.read() as tx:
        found = (json.loads(meta).get("sample", {}) for (meta,) in tx.all("SELECT meta FROM item"))
        return {each["chunk"] for each in found if each.get("plan") == name}


def _candidate(row: Mapping[str, Any], record: Prompt, about: Mapping[str, Any]) -> Candidate:
    meta = {"sample": dict(about)} | ({"source": record.source} if record.source else {})
    return Candidate(record.prompt, tuple(row["responses"]), sources=tuple(row["sources"]), meta=meta)


def _resumed(partial: Path | None, name: str, done: Sampled) -> list[dict[str, Any]]:
    """The whole chunks of an unfinished file of the same plan; of another plan it is begun anew."""
    if partial is None:
        return []
    rows: list[dict[str, Any]] = []
    if partial.exists():
        lines = partial.read_text(encoding="utf-8").split("\n")
        if lines[0] == json.dumps({"plan": name}):
            whole = [line for line in lines[1:-1] if line]  # what follows the last line break was cut off
            rows = [json.loads(line) for line in whole]
    if len(rows) < done.prompts:
        rows = rows[: len(rows) // CHUNK * CHUNK]
    done.resumed = len(rows)
    partial.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"plan": name}) + "\n" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8")
    return rows


def _append(partial: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with open(partial, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


__all__ = ["Plan", "Sampled", "content_hash", "sample_to_file", "sample_to_store"]
