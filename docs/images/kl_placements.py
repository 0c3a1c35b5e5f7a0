"""Draw kl-placements.svg: where the KL term stands, and where training ends. Exact expected gradients, no sampling.

    python docs/images/kl_placements.py

A policy that can say 15 things (up to three tokens of a and b, ended or cut at three), a reward for each, beta = 0.5. Each placement
is followed by its own expected gradient at the policy that samples, as a policy-gradient method would on average.
"""

from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

BETA, STEPS, RATE = 0.5, 2000, 1.0
RESPONSES = [(*words, 0) for n in range(3) for words in product((1, 2), repeat=n)] + list(product((1, 2), repeat=3))
STATES = sorted({r[:i] for r in RESPONSES for i in range(len(r))})
ROWS = torch.tensor([[STATES.index(r[:i]) if i < len(r) else -1 for i in range(3)] for r in RESPONSES])
TOKENS = torch.tensor([[r[i] if i < len(r) else 0 for i in range(3)] for r in RESPONSES])
MASK = ROWS >= 0

PLACEMENTS = {
    "k1 in the reward": ("#1b7f5c", "-"),
    "k2 of the sequence in the loss": ("#6aa84f", (0, (5, 2))),
    "k2 per token in the loss": ("#b8860b", "-"),
    "k3 per token in the loss (GRPO)": ("#3465a4", "-"),
    "k1 in the loss": ("#b22222", "-"),
}


def token_logprobs(table):
    return torch.where(MASK, table.log_softmax(-1)[ROWS.clamp(min=0), TOKENS], 0)


def objective(placement, table, reference, reward):
    """A function whose gradient is the placement's expected gradient where the policy samples."""
    logp = token_logprobs(table)
    whole = logp.sum(-1)
    weight = whole.detach().exp()  # of each response, as a sample
    d = logp - reference
    if placement == "k1 in the reward":
        return (weight * whole * (reward - BETA * d.sum(-1)).detach()).sum()
    earned = (weight * whole * reward).sum()
    charge = {
        "k2 of the sequence in the loss": d.sum(-1).square() / 2,
        "k2 per token in the loss": (d.square() / 2).sum(-1),
        "k3 per token in the loss (GRPO)": torch.where(MASK, (-d).exp() - 1 + d, 0).sum(-1),
        "k1 in the loss": d.sum(-1),
    }[placement]
    return earned - BETA * (weight * charge).sum()


def follow(placement, start, reward):
    """The probabilities of the responses after every step, [STEPS + 1, 15]."""
    reference, table, path = token_logprobs(start), start.clone().requires_grad_(), []
    for _ in range(STEPS + 1):
        path.append(token_logprobs(table).sum(-1).detach().exp())
        (gradient,) = torch.autograd.grad(objective(placement, table, reference, reward), table)
        table = (table.detach() + RATE * gradient).requires_grad_()
    return torch.stack(path)


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    start = 0.7 * torch.randn(len(STATES), 3, generator=generator, dtype=torch.float64)
    reward = 0.8 * torch.randn(len(RESPONSES), generator=generator, dtype=torch.float64)
    optimum = (token_logprobs(start).sum(-1) + reward / BETA).softmax(-1)
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "palate", "svg.fonttype": "path"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.25))
    order = optimum.argsort(descending=True)
    names = ["".join(".ab"[t] for t in RESPONSES[i]) for i in order]
    right.bar(range(len(order)), optimum[order], color="#d0d4d8", label="pi*, where it should end")
    for placement, (colour, line) in PLACEMENTS.items():
        path = follow(placement, start, reward)
        distance = (path - optimum).abs().sum(-1) / 2
        left.plot(distance.clamp(min=1e-6), color=colour, linestyle=line, label=placement)
        right.plot(path[-1][order], ".", color=colour, markersize=7)
        print(f"{placement:34} {distance[-1]:.4f}")
    left.set(
        xscale="symlog", yscale="log", xlabel="updates", title="distance from pi* (total variation)", ylim=(1e-5, 1)
    )
    left.set_xlim(0, STEPS)
    right.set(title="probability of each response at the end", ylim=(0, 1.02))
    right.set_xticks(range(len(order)), names, rotation=90)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("kl-placements.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
