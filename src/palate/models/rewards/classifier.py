"""A classifier with its own tokenizer as reward: the positive label of a sentiment model, the safe label of a guard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from palate.errors import ConfigError, ModelError
from palate.models.attention import needed_attention
from palate.models.checks import check_weights, context_length
from palate.models.quiet import did_you_mean, first_line, quiet
from palate.models.samples import finite, read_samples
from palate.types import Scored, Tokens

if TYPE_CHECKING:
    from palate.data.chat import Chat


class ClassifierReward:
    """One label of any ``AutoModelForSequenceClassification``, encoder or decoder, with its own tokenizer.

    Args:
        where: folder or hub name.
        label: a label's name (upper or lower case) or index; None for a classifier with one label.
        chat: the policy's, to decode with.
        output: "logit" (the paper's and TRL's choice for sentiment), "probability" or "logprob" of the label: softmax over
            the labels, or sigmoid where labels are independent (one label, or a multi-label classifier).
        reads: "both" prompt and response, as one text, or the "response" alone.
        batch_tokens: padded tokens of one forward; larger costs memory only.
    Attributes:
        truncated: texts that were longer than the classifier's context so far; their beginning was cut.
    Raises:
        ModelError: no such label (those there are, are listed), or the folder is no classifier.
    """

    def __init__(
        self,
        where: str,
        label: str | int | None = None,
        *,
        chat: Chat,
        output: Literal["logit", "probability", "logprob"] = "logit",
        reads: Literal["both", "response"] = "both",
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        batch_tokens: int = 4096,
        name: str | None = None,
    ) -> None:
        from palate.models.load import load_tokenizer

        _one_of("output", output, ("logit", "probability", "logprob"))
        _one_of("reads", reads, ("both", "response"))
        self.chat, self.output, self.reads, self.batch_tokens = chat, output, reads, batch_tokens
        self.tokenizer = load_tokenizer(where)
        self.tokenizer.truncation_side = "left"  # the response stands at the end
        self.model = _classifier(where, dtype, device)
        self.label = _label(self.model.config, label, where)
        self.max_length = context_length(self.model, self.tokenizer)
        self.truncated = 0
        self.name = name or str(self.model.config.id2label[self.label]).lower()

    @torch.no_grad()
    def __call__(self, tokens: Tokens) -> Scored:
        """Scores [N]: logits, probabilities or nats.

        Raises:
            ModelError: a score is NaN or Inf; the sample is shown.
        """
        samples = read_samples(tokens, self.chat)
        rows = self._encode([s.text if self.reads == "both" else s.response for s in samples])
        scores = torch.zeros(len(rows))
        for batch in _batches([len(row) for row in rows], self.batch_tokens, same_length=not self._may_pad):
            scores[batch] = self._run([rows[i] for i in batch]).float().cpu()
        return Scored(finite(scores, samples, self.name).to(tokens.ids.device), {})

    @property
    def _may_pad(self) -> bool:
        """An encoder takes a mask and reads its first token. A decoder looks for its last token by the pad id, and finds
        the wrong one where pad is the end of text; rows of one length then go together."""
        return self.tokenizer.pad_token_id is not None and not hasattr(self.model, "score")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        with quiet():
            full = self.tokenizer(texts)["input_ids"]
            cut = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        self.truncated += sum(len(a) != len(b) for a, b in zip(full, cut, strict=True))
        empty = self.tokenizer.eos_token_id or 0  # a decoder's tokenizer gives nothing for an empty text
        return [list(row) or [empty] for row in cut]

    def _run(self, rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        if hasattr(self.model, "score"):  # a decoder: rows of one length, read at the last token whatever its id
            states = self.model.base_model(input_ids=ids).last_hidden_state[:, -1]
            return self._chosen(self.model.score(states.to(self.model.score.weight.dtype)).float())
        return self._chosen(self.model(input_ids=ids, attention_mask=mask).logits.float())

    def _chosen(self, logits: Tensor) -> Tensor:
        """[n, labels] -> [n]."""
        if self.output == "logit":
            return logits[:, self.label]
        independent = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        logprobs = nn.functional.logsigmoid(logits) if independent else logits.log_softmax(-1)
        chosen = logprobs[:, self.label]
        return chosen if self.output == "logprob" else chosen.exp()


def _classifier(where: str, dtype: str | torch.dtype, device: str | torch.device) -> Any:
    """A frozen sequence classifier with all its weights."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from palate.models.devices import device_of, dtypes_of

    try:
        with quiet():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                where,
                dtype=dtypes_of(dtype)[0],
                use_safetensors=True,
                output_loading_info=True,
                **needed_attention(AutoConfig.from_pretrained(where)),
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{where}: no classifier can be loaded from there. {first_line(error)}") from error
    if info["missing_keys"]:
        raise ModelError(
            f"{where}: not a classifier: it has no weights for {', '.join(sorted(info['missing_keys'])[:3])}. A reward "
            "needs a folder saved after training as AutoModelForSequenceClassification."
        )
    check_weights(model, where)
    return model.requires_grad_(False).eval().to(device_of(device))


def _label(config: Any, label: str | int | None, where: str) -> int:
    labels = {int(i): str(name) for i, name in config.id2label.items()}
    listed = ", ".join(f"{i} = {name}" for i, name in labels.items())
    if label is None and len(labels) == 1:
        return 0
    if label is None:
        raise ModelError(
            f'{where}: which label is the reward? Found: {listed}. Write label: "{labels[len(labels) - 1]}".'
        )
    if isinstance(label, int) and not isinstance(label, bool) and label in labels:
        return label
    same = [i for i, name in labels.items() if name.lower() == str(label).lower()]
    if len(same) == 1:
        return same[0]
    hint = did_you_mean(str(label).lower(), [name.lower() for name in labels.values()])
    raise ModelError(f"{where}: no label {label!r}.{hint} Found: {listed}. Choose one by name or number.")


def _batches(lengths: Sequence[int], budget: int, *, same_length: bool) -> list[list[int]]:
    """Row numbers by length, longest first, each batch of at most ``budget`` padded tokens."""
    batches: list[list[int]] = []
    width = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = not batches or width * (len(batches[-1]) + 1) > budget or (same_length and lengths[i] != width)
        if full:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(
            f'reward: {key} "{value}" is not known.{did_you_mean(value, known)} Choose: {", ".join(known)}.'
        )
