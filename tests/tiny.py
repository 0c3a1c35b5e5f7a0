"""Models and tokenizers of a few thousand weights, built offline; and rows of tokens for them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from palate.models.load import LoraSettings, new_policy
from palate.types import Tokens

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    *["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"],
]
LORA = LoraSettings(rank=4, alpha=8.0)
SMALL = {
    "llama": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen2": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gemma2": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "qwen3": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {"n_head": 2, "n_positions": 64},
}


def tokenizer_of(words=WORDS, **special):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{k: v for k, v in special.items() if v is not None})


def tiny(architecture="llama", tokenizer=None, seed=0, **more):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
    config = {"architecture": architecture} | size | SMALL[architecture] | more
    return new_policy(config, tokenizer or tokenizer_of(), seed)


def longrope(architecture="llama", turning=8, seed=0):
    """A model that turns rows of more than ``turning`` tokens by other angles."""
    rope = {"rope_type": "longrope", "original_max_position_embeddings": turning, "rope_theta": 100.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    sizes |= {"original_max_position_embeddings": turning, "initializer_range": 0.2, "pad_token_id": 0}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes, rope_parameters=rope)).eval()


def rows(*lengths, vocab=20, seed=0, prompt=2):
    """Random rows without special tokens, right-padded; everything after the prompt is response."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocab, (len(lengths), max(lengths)), generator=generator)
    place, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    real = place < length
    return Tokens(ids * real, real, real & (place >= prompt), torch.arange(len(lengths)))


def trained(model, seed=0):
    """The model with its trainable weights moved, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model
