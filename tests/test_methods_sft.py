"""SFT against plain Python on the model's own logits."""

from dataclasses import replace

import pytest
import torch

import slow
from batches import left_padded, means_and_gradient, models_for, tokens
from palate.methods.sft import SFT, sft_loss


def per_token(model, rows):
    """Each response token's log-prob as a Python float, from the model's own logits of the row alone."""
    found = []
    for row in range(len(rows)):
        real = rows.attention_mask[row]
        ids, response = rows.ids[row][real], rows.response_mask[row][real]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0].double().tolist()
        found.append([slow.log_softmax(logits[t - 1])[ids[t]] for t in range(len(ids)) if response[t]])
    return found


@pytest.mark.parametrize("change", [lambda t: t, left_padded])
def test_the_loss_is_the_token_mean_of_the_whole_batch_not_of_rows(change):
    models, rows = models_for(SFT()), tokens()
    by_row = per_token(models.policy, rows)
    flat = [-x for row in by_row for x in row]
    means, _ = means_and_gradient(SFT(), models, change(rows), max_tokens=30)
    assert means["loss"] == pytest.approx(slow.mean(flat), abs=1e-5)
    assert means["logprob/token"] == pytest.approx(-slow.mean(flat), abs=1e-5)
    assert slow.mean([-slow.mean(row) for row in by_row]) != pytest.approx(slow.mean(flat), abs=1e-3)


def test_the_gradient_is_softmax_minus_onehot_over_n():
    """d loss / d logits = (softmax - onehot) m / N, here at the head: dL/dW = sum_t (p_t - e_t) h_t^T / N."""
    models, rows = models_for(SFT()), tokens()
    model = models.policy
    _, gradient = means_and_gradient(SFT(), models, rows, max_tokens=30)
    wanted, count = torch.zeros_like(model.lm_head.weight, dtype=torch.float64), int(rows.response_mask.sum())
    with torch.no_grad():
        for row in range(len(rows)):
            ids = rows.ids[row][rows.attention_mask[row]]
            hidden = model.model(input_ids=ids[None]).last_hidden_state[0].double()
            for t in range(1, len(ids)):
                if rows.response_mask[row, t]:
                    p = (hidden[t - 1] @ model.lm_head.weight.double().T).softmax(-1)
                    p[ids[t]] -= 1
                    wanted += p[:, None] * hidden[t - 1] / count
    found = gradient["policy.lm_head.weight"].double()
    assert torch.allclose(found, wanted, atol=1e-6)


def test_a_batch_without_targets_is_zero_and_not_nan():
    models, rows = models_for(SFT()), tokens()
    nothing = replace(rows, response_mask=torch.zeros_like(rows.response_mask))
    mean = SFT().loss(models, nothing)["loss"]
    assert mean.item() == 0 and mean.count == 0
    mean.total.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in models.policy.parameters())


def test_sft_loss_is_the_negative_logprob():
    assert sft_loss(torch.tensor([-1.5, 0.0])).tolist() == [1.5, 0.0]
