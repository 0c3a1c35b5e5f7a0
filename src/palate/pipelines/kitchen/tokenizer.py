"""A small byte-level BPE tokenizer for the kitchen, trained on its own text in a second."""

from __future__ import annotations

import random
from typing import Any

from palate.pipelines.kitchen.grammar import all_prompts, mixed_response

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def kitchen_tokenizer(vocabulary: int = 1024) -> Any:
    """A ``PreTrainedTokenizerFast`` with pad, bos and eos of its own and a chat template.

    Byte-level, so any text can be written, and decoding gives the text back exactly. The same tokenizer every time: the
    text that it is trained on does not depend on a run's seed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    prompts = list(all_prompts())
    tokenizer.train_from_iterator(prompts + [mixed_response(p, rng) for p in prompts], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
