"""Which of transformers' attentions a model must run with."""

from __future__ import annotations

from typing import Any

NOTE = (
    "attention: eager. This model caps its attention's logits (attn_logit_softcapping), which fused kernels cannot; it is slower, "
    "and long rows take more memory."
)


def caps_logits(config: Any) -> bool:
    """Does attention bend its logits to softcap * tanh(logits / softcap), as Gemma 2's does?"""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text, "attn_logit_softcapping", None))


def needed_attention(config: Any) -> dict[str, str]:
    """What to hand to ``from_pretrained`` or ``from_config``; empty = transformers' own choice.

    The cap stands between the product and the softmax, where "sdpa" lets nobody in. transformers 5.17 chose "sdpa" all the
    same and left the cap out without a word, so the log-probs were another model's; later releases refuse it.
    """
    return {"attn_implementation": "eager"} if caps_logits(config) else {}
