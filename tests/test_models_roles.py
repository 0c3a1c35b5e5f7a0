"""The reference is the policy as training found it, and stays that."""

import pytest
import torch

from palate.errors import ModelError
from palate.models.forward import token_logprobs
from palate.models.load import load_policy, save_model
from palate.models.roles import AdapterOff, frozen_copy, reference_of
from tiny import LORA, WORDS, rows, tiny, tokenizer_of, trained


@pytest.fixture
def base(tmp_path):
    save_model(tiny("llama"), tokenizer_of(), tmp_path / "base")
    return tmp_path / "base"


def test_without_an_adapter_the_reference_is_a_frozen_copy(base):
    policy, batch = load_policy(base), rows(8, 5)
    reference = reference_of(policy)
    before = token_logprobs(reference, batch)
    assert torch.equal(before, token_logprobs(policy, batch))
    trained(policy)
    assert torch.equal(token_logprobs(reference, batch), before)
    assert not torch.allclose(token_logprobs(policy, batch), before, atol=1e-2)
    assert not any(p.requires_grad for p in reference.parameters()) and all(
        p.requires_grad for p in policy.parameters()
    )


def test_with_a_new_adapter_the_reference_is_the_adapter_off(base):
    policy, batch = load_policy(base, lora=LORA), rows(8, 5)
    reference = reference_of(policy)
    assert isinstance(reference, AdapterOff) and list(reference.parameters()) == []
    before = token_logprobs(load_policy(base), batch)
    trained(policy)
    assert torch.equal(token_logprobs(reference, batch), before)
    assert torch.equal(reference(batch.ids[:1]).logits, load_policy(base)(batch.ids[:1]).logits)
    assert not reference(batch.ids[:1]).logits.requires_grad
    after = token_logprobs(policy, batch)
    assert not torch.allclose(after, before, atol=1e-2)  # and the adapter is on again


def test_switching_the_adapter_off_in_between_leaves_the_gradient_alone(base):
    policy, batch = trained(load_policy(base, lora=LORA)), rows(8, 5)
    reference = AdapterOff(policy)

    def gradient(look):
        policy.zero_grad()
        loss = token_logprobs(policy, batch).sum()
        if look:
            token_logprobs(reference, batch)
        loss.backward()
        return [p.grad.clone() for p in policy.parameters() if p.requires_grad]

    plain, looked = gradient(False), gradient(True)
    assert plain and all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))


def test_freezing_or_moving_the_reference_leaves_the_policy_alone(base):
    policy = load_policy(base, lora=LORA)
    reference = AdapterOff(policy).requires_grad_(False).to(torch.float64).eval()
    assert any(p.requires_grad for p in policy.parameters())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert reference.state_dict() == {} and reference.config is policy.config


def test_an_sft_adapter_that_is_trained_on_is_its_own_reference_not_the_base(base, tmp_path):
    save_model(trained(load_policy(base, lora=LORA)), tokenizer_of(), tmp_path / "sft")
    policy, batch = load_policy(tmp_path / "sft"), rows(8, 5)
    reference = reference_of(policy)
    assert not isinstance(reference, AdapterOff)
    assert torch.equal(token_logprobs(reference, batch), token_logprobs(policy, batch))
    assert not torch.allclose(token_logprobs(reference, batch), token_logprobs(load_policy(base), batch), atol=1e-2)
    merged = load_policy(tmp_path / "sft", lora=LORA)  # the cheaper way: same reference, no copy
    assert isinstance(reference_of(merged), AdapterOff)
    assert torch.allclose(token_logprobs(reference_of(merged), batch), token_logprobs(reference, batch), atol=1e-4)


def test_another_folder_as_reference_must_share_the_vocabulary(base, tmp_path):
    policy, batch = load_policy(base), rows(8, 5)
    save_model(trained(load_policy(base)), tokenizer_of(), tmp_path / "other")
    reference = reference_of(policy, tmp_path / "other", tokenizer=tokenizer_of())
    assert torch.equal(token_logprobs(reference, batch), token_logprobs(load_policy(tmp_path / "other"), batch))
    assert not any(p.requires_grad for p in reference.parameters())
    words = [*WORDS[:-1], "zz"]
    save_model(tiny("llama", tokenizer_of(words)), tokenizer_of(words), tmp_path / "foreign")
    with pytest.raises(ModelError, match="another vocabulary"):
        reference_of(policy, tmp_path / "foreign", tokenizer=tokenizer_of())


def test_a_plain_model_has_no_adapter_to_switch_off(base):
    with pytest.raises(ModelError, match="no adapter to switch off"):
        AdapterOff(load_policy(base))


def test_a_frozen_copy_of_an_adapted_policy_is_whole(base):
    policy, batch = trained(load_policy(base, lora=LORA)), rows(8)
    copy = frozen_copy(policy)
    before = token_logprobs(policy, batch)
    trained(policy)
    assert torch.equal(token_logprobs(copy, batch), before)
