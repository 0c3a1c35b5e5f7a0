"""How varied the responses of a batch are, cheaply enough to be said of every batch."""

from __future__ import annotations

import torch

from palate.types import Mean, Tokens


def distinct_pairs(tokens: Tokens) -> Mean:
    """Different pairs of neighbouring tokens over all pairs, in the responses that the policy drew (distinct-2).

    Li et al. 2016, arXiv:1510.03055, of tokens where ``evaluation.diversity`` has words. 0 over 0 where no response has two
    tokens. Batches add as their numbers of pairs do, each being compared with itself alone.

    Returns:
        a share in (0, 1] that falls with the amount of text: compare batches of one size and responses of like length.
    """
    both = tokens.response_mask[:, 1:] & tokens.response_mask[:, :-1]
    whose = tokens.extras.get("drawn_by")
    if whose is not None and "policy" in whose:  # what the reference wrote says nothing about the policy
        own = torch.tensor([who == "policy" for who in whose], device=both.device)
        both = both & own[:, None]
    first, second = tokens.ids[:, :-1][both], tokens.ids[:, 1:][both]
    size = int(tokens.ids.max()) + 1 if len(first) else 1
    different = torch.unique(first * size + second).numel()
    return Mean(torch.tensor(float(different)), torch.tensor(float(len(first))))
