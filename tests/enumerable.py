"""A language model whose every sequence can be written down: 2 prompts, 15 responses each, one free number a prefix.

Tokens: 0 = end of text, 1 = a, 2 = b. The prompts are [1] and [2]; a response ends with 0, or is cut at 3 tokens:
1 + 2 + 4 responses that end and 8 that were cut. ``Tabular`` has a row of logits for every prefix, so that it can be
any distribution over them; it has the attributes of a transformers model that ``models.forward`` asks for.
"""

from itertools import product
from types import SimpleNamespace

import torch
from torch import nn

from palate.training.order import seeded
from palate.types import Comparisons, Scored, Tokens

END, VOCABULARY, LONGEST, PREFIX = 0, 3, 3, 8
PROMPTS = (1, 2)
RESPONSES = [(*words, END) for n in range(LONGEST) for words in product((1, 2), repeat=n)]
RESPONSES += list(product((1, 2), repeat=LONGEST))
COUNT = len(RESPONSES)  # 15


class _Trunk(nn.Module):
    """ids -> the state of every prefix, read from a table."""

    def __init__(self, width, scale, generator):
        super().__init__()
        self.config = SimpleNamespace()
        size = sum(VOCABULARY**n for n in range(1, PREFIX + 1))
        self.table = nn.Parameter(scale * torch.randn(size, width, generator=generator))

    def forward(self, input_ids, use_cache=False):
        code, first, states = torch.zeros_like(input_ids[:, 0]), 0, []
        for t in range(input_ids.shape[1]):
            code = code * VOCABULARY + input_ids[:, t]
            states.append(first + code)
            first += VOCABULARY ** (t + 1)
        return SimpleNamespace(last_hidden_state=nn.functional.embedding(torch.stack(states, 1), self.table))


class Tabular(nn.Module):
    """A policy (its logits are the table's rows) or, with ``scalar``, a reward or value model (scores are entries)."""

    def __init__(self, seed=0, scale=0.7, scalar=False):
        super().__init__()
        width = 1 if scalar else VOCABULARY
        self.base_model = _Trunk(width, scale, torch.Generator().manual_seed(seed))
        self.config = SimpleNamespace()
        head = nn.Linear(width, width, bias=False).requires_grad_(False)
        head.weight.copy_(torch.eye(width))
        self.add_module("score" if scalar else "lm_head", head)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.lm_head(self.base_model(input_ids).last_hidden_state))


def rows_of(pairs, mask_end=True):
    """Tokens of (prompt number, response number) pairs; a group is a prompt. ``mask_end``: the end is response."""
    ids = torch.zeros(len(pairs), 1 + LONGEST, dtype=torch.int64)
    length = torch.tensor([1 + len(RESPONSES[r]) for _, r in pairs])
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : length[row]] = torch.tensor([PROMPTS[prompt], *RESPONSES[response]])
    place = torch.arange(1 + LONGEST)
    real = place < length[:, None]
    answered = real & (place >= 1)
    if not mask_end:
        answered &= ids != END
    finished = torch.tensor([RESPONSES[r][-1] == END for _, r in pairs])
    return Tokens(ids, real, answered, torch.tensor([p for p, _ in pairs]), {"finished": finished})


EVERYTHING = [(p, r) for p in range(2) for r in range(COUNT)]
_number = {(p, *RESPONSES[r]): r for p, r in EVERYTHING}


def response_numbers(tokens):
    """Which of the 15 each row's response is."""
    width = tokens.attention_mask.sum(-1).tolist()
    return torch.tensor([_number[(row[0] - 1, *row[1:n])] for row, n in zip(tokens.ids.tolist(), width, strict=True)])


@torch.no_grad()
def distribution(model):
    """The probability of every response to each prompt, [2, 15]; float64, from the table itself."""
    rows = rows_of(EVERYTHING)
    logp = model(rows.ids).logits.double().log_softmax(-1)[:, :-1].gather(-1, rows.ids[:, 1:, None])[..., 0]
    return (logp * rows.response_mask[:, 1:]).sum(-1).exp().reshape(2, COUNT)


def total_variation(p, q):
    """Half the sum of differences, the worse of the two prompts."""
    return float((p - q).abs().sum(-1).max() / 2)


class TableReward:
    """r(x, y) from a table [2, 15]."""

    def __init__(self, table):
        self.table = table

    def __call__(self, tokens):
        return Scored(self.table[tokens.ids[:, 0] - 1, response_numbers(tokens)].float(), {})


class TabularRollout:
    """What ``Rollout`` does, for a tabular policy: K responses to each prompt, drawn token by token."""

    def __init__(self, policy, samples_per_prompt):
        self.policy, self.samples = policy, samples_per_prompt

    @torch.no_grad()
    def __call__(self, items, *seed, progress=None):
        generator = seeded(*seed)
        prompt = torch.tensor([PROMPTS[i] for i in items]).repeat_interleave(self.samples)
        ids = torch.cat([prompt[:, None], torch.zeros(len(prompt), LONGEST, dtype=torch.int64)], 1)
        alive = torch.ones(len(prompt), dtype=torch.bool)
        real, said = alive[:, None].repeat(1, 1 + LONGEST), torch.zeros(ids.shape)
        for t in range(1, 1 + LONGEST):
            probabilities = self.policy(ids[:, :t]).logits[:, -1].softmax(-1)
            ids[:, t] = torch.where(alive, torch.multinomial(probabilities, 1, generator=generator)[:, 0], 0)
            real[:, t] = alive
            said[:, t] = torch.where(alive, probabilities.gather(-1, ids[:, t, None])[:, 0].log(), 0)
            alive = alive & (ids[:, t] != END)
        response = real.clone()
        response[:, 0] = False
        group = torch.arange(len(items)).repeat_interleave(self.samples)
        return Tokens(ids, real, response, group, {"finished": ~alive, "sampler_logprobs": said})

    def texts(self, tokens, rows):
        return [{"prompt": "", "response": str(tokens.ids[row].tolist())} for row in rows]


def all_pairs(table):
    """Every pair of responses of each prompt, with the probability that Bradley-Terry gives it."""
    pairs = [(p * COUNT + i, p * COUNT + j) for p in range(2) for i in range(COUNT) for j in range(i)]
    chosen, rejected = (torch.tensor(side) for side in zip(*pairs, strict=True))
    lead = table.flatten()[chosen] - table.flatten()[rejected]
    return Comparisons(rows_of(EVERYTHING), chosen, rejected, probability=lead.sigmoid().float())
