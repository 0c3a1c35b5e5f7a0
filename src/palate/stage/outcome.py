"""What a finished stage leaves: a normalised reward, held-out figures, samples before and after, the card."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate import __version__
from palate.config import RunConfig
from palate.data.chat import Chat
from palate.data.collate import Item, collate, encode_records, prompt_ids
from palate.data.kinds import Prompt
from palate.evaluation.reward_model import RewardModelReport, evaluate_reward_model
from palate.generation.engines import Engine
from palate.generation.sampler import sample
from palate.models.forward import response_scores, score_responses
from palate.models.heads import normalise
from palate.models.preferences import compares
from palate.run_folder import write_text
from palate.stage.rollout import rollout_of
from palate.training import log
from palate.training.order import seeded
from palate.types import Comparisons, Tokens, moved

SHOWN = 8  # prompts whose responses are kept from before and after
NORMALISED_ON = 512  # responses that say where a reward's 0 and 1 are
ROWS = 64  # a batch of scoring
UNRECORDED = "not recorded; say here who judged, and how, before you share this model"
_SEED = 0x5A


def reference_responses(
    config: RunConfig, chat: Chat, items: Sequence[Item], reference: nn.Module | None
) -> tuple[list[Tokens], str]:
    """Rows on which a reward's scores get mean 0 and standard deviation 1, and where they are from.

    Samples of ``reference`` on the records' prompts where one was named (Ziegler et al. 2019, arXiv:1909.08593, 2.1),
    else the records' own responses.
    """
    if reference is not None:
        records = [Prompt(item.record.prompt, source=item.record.source) for item in items[:NORMALISED_ON]]
        length = max(2, (config.data.max_length or 0) - config.sampling.max_new_tokens)
        prompts, _ = encode_records(records, "prompts", chat, max_length=length)
        tokens = _sampled(reference, prompts, config, chat)
        rows = torch.arange(len(tokens), device=tokens.ids.device)
        return [tokens.select(part) for part in rows.split(ROWS)], f"{len(tokens)} samples of {config.reference}"
    kind, parts, count = config.method.settings.reads, [], 0
    for item in items:
        if count >= NORMALISED_ON:
            break
        parts.append(item)
        count += len(item.rows)
    batches = [collate(parts[i : i + ROWS // 4], kind).tokens for i in range(0, len(parts), ROWS // 4)]
    return batches, f"{count} responses of the training records"


@torch.no_grad()
def normalise_reward(model: nn.Module, batches: Sequence[Tokens]) -> None:
    """Scores of these responses: mean 0, standard deviation 1, from now on."""
    device = next(model.parameters()).device
    normalise(model, torch.cat([response_scores(model, moved(batch, device)).cpu() for batch in batches]))


@torch.no_grad()
def held_out_report(model: nn.Module, items: Sequence[Item], kind: str, seed: int) -> RewardModelReport | None:
    """Accuracy with its interval, calibration and length bias on held-out pairs; None where nothing is held out."""
    chosen, rejected, lengths, prompts = [], [], [], []
    device = next(model.parameters()).device
    for start in range(0, len(items), ROWS // 4):
        part = items[start : start + ROWS // 4]
        batch = collate(part, kind)
        scores = response_scores(model, moved(batch.tokens, device)).cpu()
        words = batch.tokens.response_mask.sum(-1)
        for better, worse in better_and_worse(batch):
            chosen.append(float(scores[better]))
            rejected.append(float(scores[worse]))
            lengths.append((int(words[better]), int(words[worse])))
            prompts.append(start + int(batch.tokens.group[better]))
    if not chosen:
        return None
    good, bad = zip(*lengths, strict=True)
    return evaluate_reward_model(chosen, rejected, prompts=prompts, chosen_length=good, rejected_length=bad, seed=seed)


def better_and_worse(batch: Any) -> list[tuple[int, int]]:
    """(better, worse) row numbers: by a soft label the likelier one is better, and of 1/2 none is."""
    if isinstance(batch, Comparisons):
        sure = batch.probability if batch.probability is not None else torch.ones(len(batch.chosen))
        sides = zip(batch.chosen.tolist(), batch.rejected.tolist(), sure.tolist(), strict=True)
        return [(a, b) if p > 0.5 else (b, a) for a, b, p in sides if p != 0.5]
    rank, group = batch.rank.tolist(), batch.tokens.group.tolist()
    rows = range(len(rank))
    return [(i, j) for i in rows for j in rows if group[i] == group[j] and rank[i] < rank[j]]


class Witness:
    """The policy's responses to the same few prompts, before and after training."""

    def __init__(
        self, config: RunConfig, chat: Chat, items: Sequence[Item], reward: Any, engine: Engine = sample
    ) -> None:
        self.config, self.chat, self.engine = config, chat, engine
        self.reward = None if compares(reward) else reward  # one that compares has no score of a response alone
        records = [Prompt(item.record.prompt, _fields(item.record), item.record.source) for item in items[:SHOWN]]
        length = max(2, (config.data.max_length or 0) - config.sampling.max_new_tokens)
        self.items, _ = encode_records(records, "prompts", chat, max_length=length)

    @torch.no_grad()
    def responses(self, policy: nn.Module, step: int, when: str) -> list[dict[str, Any]]:
        """Entries for samples.jsonl; the same seed both times, so that only the weights differ."""
        rollout = rollout_of(self.config, policy, self.chat, engine=self.engine)
        tokens = rollout(self.items, self.config.training.seed, _SEED)
        scores = None if self.reward is None else score_responses(self.reward, tokens).scores.tolist()
        entries = []
        for row, entry in enumerate(rollout.texts(tokens, range(len(tokens)))):
            entry = {"step": step, "when": when} | entry
            entries.append(entry | ({} if scores is None else {"score": scores[row]}))
        return entries


def _fields(record: Any) -> Mapping[str, Any]:
    return getattr(record, "fields", None) or {}


def _sampled(model: nn.Module, items: Sequence[Item], config: RunConfig, chat: Chat) -> Tokens:
    return sample(
        model,
        prompt_ids(items),
        config.sampling,
        stop_token_ids=chat.stop_token_ids,
        generator=seeded(config.training.seed, _SEED),
        records=[item.record for item in items],
    )


def write_samples(folder: Path, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Put before and after below what the loop wrote, once, however often the end of the run is repeated."""
    kept = [entry for entry in log.read(folder, "samples.jsonl") if "when" not in entry]
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in (*kept, *before, *after)]
    write_text(folder / "samples.jsonl", "".join(lines))


def card(
    config: RunConfig,
    sections: Mapping[str, str],
    last: Mapping[str, Mapping[str, Any]],
    origins: Sequence[str] = (),
) -> str:
    """``card.md``: what was made, from what, by which command, with which versions, and how it came out.

    Args:
        origins: of records out of a store of feedback: which events, whose answers; empty = not recorded.
    """
    method = config.method
    lines = [
        f"# {config.run_name}",
        "",
        f"Trained with `{method.name}` by palate {__version__}; the settings are in `config.yaml`.",
        "",
        "## Data",
        "",
        f"- trained on: `{config.data.train}` ({method.settings.reads})",
        f"- held out: {f'`{config.data.validation}`' if config.data.validation else _share(config)}",
        *(f"- where the labels are from: {origin}" for origin in origins or (UNRECORDED,)),
        "",
        "## Models",
        "",
        f"- trained from: `{config.model}`",
        *(f"- {role}: `{getattr(config, role)}`" for role in ("reference", "reward", "value") if getattr(config, role)),
        "",
        "## Result",
        "",
    ]
    for split, metrics in last.items():
        shown = [f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float) and not k.startswith("time/")]
        lines.append(f"- {split}, step {metrics.get('step')}: {', '.join(shown)}")
    for title, text in sections.items():
        lines += ["", f"## {title}", "", text]
    lines += ["", "## Command", "", f"    {command()}", "", "## Versions", "", *(f"- {v}" for v in versions()), ""]
    return "\n".join(lines)


def _share(config: RunConfig) -> str:
    return f"{100 * config.data.validation_fraction:g} % of its prompts, by a hash of the prompt"


def command() -> str:
    """The command of this process, to be given again."""
    program = Path(sys.argv[0]).name if sys.argv else "python"
    if program in ("palate", "__main__.py"):
        return shlex.join(["palate", *sys.argv[1:]])
    return "palate train --config config.yaml    (this run was started from Python)"


def versions() -> list[str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors")
    return [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
