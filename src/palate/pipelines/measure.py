"""Measuring policies on held-out prompts, all in the same way: distance from the reference, scores, length, variety.

    stick = Yardstick.of(config, prompts, reward="runs/reward/model")
    stick.measure(load_policy("runs/dpo/model", trainable=False))      {"kl": [5.4, 5.1, 5.8], "score": [...], ...}

Responses are drawn at temperature 1 without filters: of another distribution the mean log-ratio is no KL.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.config import RunConfig
from palate.data.chat import Chat
from palate.data.collate import Item, collate, encode_records, prompt_ids
from palate.data.kinds import Prompt
from palate.errors import RunError
from palate.evaluation.diversity import distinct
from palate.evaluation.frontier import means
from palate.evaluation.statistics import Interval
from palate.generation.sampler import SamplingSettings, sample
from palate.models.forward import response_logprobs, score_responses
from palate.models.load import load_policy, load_tokenizer
from palate.models.rewards import load_reward
from palate.stage.chats import chat_of
from palate.stage.outcome import better_and_worse
from palate.training.checkpoint import list_checkpoints
from palate.types import Tokens, moved

Measured = dict[str, list[float]]  # quantity -> [estimate, low, high], or [estimate] where there is no interval
ROWS = 64  # sampled and scored at once


@dataclass(frozen=True)
class Yardstick:
    """What every policy is held against.

    Attributes:
        chat: of the policies.
        prompts: encoded, held out.
        reference: what the KL is measured to; None = it is not measured.
        reward: gives "score", and of a sum its parts, "score/NAME".
        gold: another reward, which nothing was trained on: gives "gold".
        max_new_tokens: longest response.
        samples_per_prompt: responses to each prompt.
        seed: of the sampling.
        device: of everything.
    """

    chat: Chat
    prompts: Sequence[Item]
    reference: nn.Module | None = None
    reward: Any = None
    gold: Any = None
    max_new_tokens: int = 64
    samples_per_prompt: int = 1
    seed: int = 0
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        config: RunConfig,
        prompts: Sequence[Prompt],
        *,
        reward: Any = None,
        gold: Any = None,
        samples_per_prompt: int = 1,
        seed: int = 0,
    ) -> Yardstick:
        """From a run's settings: its reference (or the model it starts from), chat template, lengths, device."""
        start = config.reference or (config.model if isinstance(config.model, str) else None)
        place: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
        template, system = config.data.chat_template, config.data.system
        where = start or config.tokenizer
        tokenizer = load_tokenizer(config.tokenizer or str(where))
        chat = chat_of(start, tokenizer, template, system)
        room = (config.data.max_length or 1024) - config.sampling.max_new_tokens
        items, _ = encode_records(prompts, "prompts", chat, max_length=max(2, room))
        return cls(
            chat,
            items,
            load_policy(start, trainable=False, **place) if start else None,
            None if reward is None else load_reward(reward, chat, **place),
            None if gold is None else load_reward(gold, chat, **place),
            config.sampling.max_new_tokens,
            samples_per_prompt,
            seed,
            config.device,
        )

    @torch.no_grad()
    def measure(self, policy: nn.Module) -> Measured:
        """Every quantity of one policy on its own responses; intervals over prompts."""
        tokens = self._answers(policy)
        columns: dict[str, list[float]] = {
            "length/response": tokens.response_mask.sum(-1).float().tolist(),
            "length/no_eos": (~torch.as_tensor(tokens.extras["finished"])).float().tolist(),
        }
        for rows in torch.arange(len(tokens)).split(ROWS):
            part = moved(tokens.select(rows), torch.device(self.device))
            for name, values in self._values(policy, part).items():
                columns.setdefault(name, []).extend(values.float().cpu().tolist())
        found = {name: list(interval) for name, interval in means(columns, tokens.group.tolist()).items()}
        texts = [self.chat.text(ids[mask].tolist()) for ids, mask in zip(tokens.ids, tokens.response_mask, strict=True)]
        return dict(sorted(found.items())) | {"diversity/distinct_2": [distinct(texts, 2)]}

    def _answers(self, policy: nn.Module) -> Tokens:
        tokens = sample(
            policy,
            prompt_ids(self.prompts),
            SamplingSettings(max_new_tokens=self.max_new_tokens),
            samples_per_prompt=self.samples_per_prompt,
            stop_token_ids=self.chat.stop_token_ids,
            generator=torch.Generator().manual_seed(self.seed),
            max_batch_rows=4 * ROWS,
            records=[item.record for item in self.prompts],
        )
        return moved(tokens, torch.device("cpu"))

    def _values(self, policy: nn.Module, tokens: Tokens) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.reference is not None:
            values["kl"] = response_logprobs(policy, tokens) - response_logprobs(self.reference, tokens)
        if self.reward is not None:
            scored = score_responses(self.reward, tokens)
            values["score"] = scored.scores
            values |= {f"score/{part}": scores for part, scores in scored.parts.items()}
        if self.gold is not None:
            values["gold"] = score_responses(self.gold, tokens).scores
        return values


@torch.no_grad()
def implicit(
    policy: nn.Module, reference: nn.Module, items: Sequence[Item], kind: str, device: str = "cpu"
) -> Measured:
    """What the policy itself says of held-out pairs: log pi(y|x)/ref(y|x) as the reward (DPO, eq. 5, without beta).

    Args:
        items: of comparisons, corrections or rankings; by a soft label the likelier response is the better one.
    Returns:
        "accuracy": share of pairs in which chosen has the higher log-ratio, ties 1/2; "margin": their difference, nats.
    """
    accuracy, margin, prompts = [], [], []
    for start in range(0, len(items), ROWS // 4):
        batch = moved(collate(items[start : start + ROWS // 4], kind), torch.device(device))
        ratio = (response_logprobs(policy, batch.tokens) - response_logprobs(reference, batch.tokens)).cpu()
        for better, worse in better_and_worse(batch):
            lead = float(ratio[better] - ratio[worse])
            accuracy.append(0.5 if lead == 0 else float(lead > 0))
            margin.append(lead)
            prompts.append(start + int(batch.tokens.group[better]))
    if not margin:
        return {}
    return {name: list(v) for name, v in means({"accuracy": accuracy, "margin": margin}, prompts).items()}


def run_policy(run: Path, config: RunConfig) -> nn.Module:
    """The policy that a finished run left in ``model/``."""
    return load_policy(run / "model", dtype=config.dtype, device=config.device, trainable=False)


def along(run: Path, policy: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """(step, policy) at each checkpoint that the run kept, oldest first; it is one model whose weights change.

    Raises:
        RunError: a checkpoint is of another model.
    """
    own = dict(policy.named_parameters())
    for path in list_checkpoints(run / "checkpoints"):
        saved = {
            name.removeprefix("policy."): tensor
            for name, tensor in load_file(path / "weights.safetensors").items()
            if name.startswith("policy.")
        }
        if not saved or not saved.keys() <= own.keys():
            raise RunError(f"{path}: holds no policy like that of {run / 'model'}.")
        with torch.no_grad():
            for name, tensor in saved.items():
                own[name].copy_(tensor)
        yield int(path.name.removeprefix("step-")), policy


def saved_step(run: Path) -> int:
    """The step whose weights ``model/`` has: the best one's of a run that kept a best, else the last; 0 without checkpoints."""
    newest = list_checkpoints(run / "checkpoints")[-1:]
    states = [json.loads((path / "state.json").read_text(encoding="utf-8")) for path in newest]
    return next((int((state["best"] or state)["step"]) for state in states), 0)


def last_held_out(run: Path) -> dict[str, float]:
    """The numbers of the run's last evaluation."""
    last: dict[str, float] = {}
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line.get("split") == "validation":
            last = {k: float(v) for k, v in line.items() if k != "step" and isinstance(v, int | float)}
    return last


def interval(values: Sequence[float]) -> Interval | None:
    """[estimate, low, high] as an interval; None for a number that has none."""
    return Interval(*values) if len(values) == 3 else None
