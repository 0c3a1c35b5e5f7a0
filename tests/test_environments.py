"""Conversations with an environment: what is drawn and read, and that holes in the response mask change no definition."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import palate
import slow
from batches import (
    batch_for,
    left_padded,
    means_and_gradient,
    models_for,
    repadded,
    run_of,
    scalar_of,
    tokens,
    weights_of,
)
from palate.config import load_settings
from palate.data.chat import Chat
from palate.data.collate import encode_records
from palate.data.kinds import Prompt
from palate.environment import Environment, EnvironmentSettings, Turn, find_environment
from palate.errors import ConfigError, ModelError
from palate.functional.advantages import gae
from palate.functional.policy_gradient import token_rewards
from palate.generation.settings import SamplingSettings
from palate.lookup import find_method, method_names
from palate.methods.grpo import GRPO
from palate.methods.ppo import PPO
from palate.methods.rloo import RLOO
from palate.models import trunk
from palate.models.forward import response_scores, token_logprobs, token_logprobs_and_entropy, token_values
from palate.models.rewards import load_reward
from palate.models.save import save_model
from palate.resolve import Facts, require_all, resolved
from palate.training.environments import Conversations
from palate.training.loop import train
from palate.training.rollouts import Rollout
from palate.types import Models, groups
from resuming import stopped_and_resumed
from test_methods_contract import assert_same
from tiny import tiny, tokenizer_of

SAMPLED = [name for name in method_names() if find_method(name).METHOD.reads == "prompts"]


def holed(rows):
    """The same rows where the second and third of a response's last tokens are an environment's, where there are as many;
    what a sampler said there is junk."""
    mask = rows.response_mask.clone()
    from_end = mask.flip(-1).cumsum(-1).flip(-1)
    enough = mask.sum(-1, keepdim=True) > 3
    mask &= ~(enough & ((from_end == 2) | (from_end == 3)))
    sampler = torch.where(mask, rows.extras["sampler_logprobs"], float("nan"))
    return replace(rows, response_mask=mask, extras={**rows.extras, "sampler_logprobs": sampler})


def runs(mask):
    """Stretches of True."""
    return int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum())


def test_the_batch_of_these_tests_has_holes():
    assert sum(runs(row) == 2 for row in holed(tokens()).response_mask) == 6


# --- one row at a time, by definition -------------------------------------------------------------------------------


@pytest.fixture(params=["flat", "padded"])
def way(request, monkeypatch):
    if request.param == "padded":
        monkeypatch.setattr(trunk, "supported", lambda model: False)
    return request.param


def test_logprobs_and_entropies_with_holes_are_those_of_each_row_alone(way):
    """log softmax of the model's own logits of the whole row, the environment's tokens included, read before each of the
    policy's tokens."""
    rows, policy = holed(tokens()), tiny("llama")
    with torch.no_grad():
        logprobs, entropies = token_logprobs_and_entropy(policy, rows, temperature=0.7)
        for i in range(len(rows)):
            length = int(rows.attention_mask[i].sum())
            logits = policy(rows.ids[i : i + 1, :length]).logits[0] / 0.7
            for t in range(rows.ids.shape[1]):
                if not rows.response_mask[i, t]:
                    assert logprobs[i, t] == entropies[i, t] == 0
                    continue
                row = logits[t - 1].double().tolist()
                assert float(logprobs[i, t]) == pytest.approx(slow.log_softmax(row)[rows.ids[i, t]], abs=2e-5)
                assert float(entropies[i, t]) == pytest.approx(slow.entropy(row), abs=2e-5)


def test_values_with_holes_and_the_score_at_the_last_policy_token_are_those_of_each_row_alone(way):
    """Also where the row ends with a token of the environment's: the score is read at the last of the policy's."""
    rows = holed(tokens())
    mask = rows.response_mask.clone()
    mask[8, int(rows.attention_mask[8].sum()) - 1] = False
    rows, model = replace(rows, response_mask=mask), scalar_of(tiny("llama"))
    with torch.no_grad():
        values, scores = token_values(model, rows), response_scores(model, rows)
        for i in range(len(rows)):
            length, last = int(rows.attention_mask[i].sum()), int(mask[i].nonzero()[-1])
            states = model.base_model(rows.ids[i : i + 1, :length]).last_hidden_state[0]
            read = (states @ model.score.weight.T)[:, 0]
            wanted = [float(read[t - 1]) if mask[i, t] else 0.0 for t in range(rows.ids.shape[1])]
            assert values[i].tolist() == pytest.approx(wanted, abs=2e-5)
            assert float(scores[i]) == pytest.approx(float(read[last]), abs=2e-5)


def test_gradients_with_holes_are_those_of_each_row_alone(way):
    rows, policy = holed(tokens()), tiny("llama")
    weight = torch.rand(rows.ids.shape, generator=torch.Generator().manual_seed(3))
    parameters = list(policy.parameters())
    found = torch.autograd.grad((token_logprobs(policy, rows) * weight).sum(), parameters)
    total = torch.zeros(())
    for i in range(len(rows)):
        real, mask = rows.ids[i, : int(rows.attention_mask[i].sum())], rows.response_mask[i]
        logp = policy(real[None]).logits[0].log_softmax(-1)
        total = total + sum(weight[i, t] * logp[t - 1, rows.ids[i, t]] for t in mask.nonzero()[:, 0].tolist())
    for one, other in zip(found, torch.autograd.grad(total, parameters), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


masks = st.lists(st.booleans(), min_size=1, max_size=12)


@settings(max_examples=60)
@given(masks, st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.sampled_from([1.0, 0.9]), st.integers(0, 100))
def test_gae_with_any_holes_is_the_definition_on_the_policys_tokens_alone(mask, lam, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(mask), generator=generator, dtype=torch.float64)
    mask = torch.tensor(mask)
    hidden = [torch.where(mask, x, float("nan"))[None] for x in (rewards, values)]
    advantages, returns = gae(*hidden, mask[None], gamma=gamma, lam=lam)
    wanted = slow.gae(rewards[mask].tolist(), values[mask].tolist(), gamma, lam)
    assert advantages[0][mask].tolist() == pytest.approx(wanted[0])
    assert returns[0][mask].tolist() == pytest.approx(wanted[1])
    assert not advantages[0][~mask].any() and not returns[0][~mask].any()


@given(masks, st.integers(0, 100))
def test_the_score_is_paid_once_at_the_last_policy_token(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = torch.randn(2, 1, len(mask), generator=generator, dtype=torch.float64)
    mask = torch.tensor(mask)
    hidden = [torch.where(mask, x, float("nan")) for x in (logprobs, reference)]
    rewards = token_rewards(*hidden, torch.tensor([2.5], dtype=torch.float64), mask[None], kl_coef=0.3)[0]
    if mask.any():
        wanted = slow.token_rewards(logprobs[0][mask].tolist(), reference[0][mask].tolist(), 2.5, 0.3)
        assert rewards[mask].tolist() == pytest.approx(wanted)
    assert not rewards[~mask].any()


def test_what_ppo_prepares_of_rows_with_holes_is_the_definition():
    """Rewards, values and advantages of the policy's tokens as if nothing stood between them (METHODS: the next value is
    carried across); whitened over all of them."""
    method, rows = PPO(kl_coef=0.3, lam=0.8, gamma=0.9), holed(tokens())
    models = models_for(method)
    with torch.no_grad():
        batch = method.prepare(models, rows)
        logprobs, reference = token_logprobs(models.policy, rows), token_logprobs(models.reference, rows)
        values, scores = token_values(models.value, rows), response_scores(models.reward, rows)
    advantages, returns = [], []
    for i, mask in enumerate(rows.response_mask):
        charged = slow.token_rewards(logprobs[i][mask].tolist(), reference[i][mask].tolist(), float(scores[i]), 0.3)
        found = slow.gae(charged, values[i][mask].tolist(), 0.9, 0.8)
        advantages += found[0]
        returns += found[1]
    assert batch.returns[rows.response_mask].tolist() == pytest.approx(returns, abs=1e-5)
    assert batch.advantages[rows.response_mask].tolist() == pytest.approx(slow.whiten(advantages), abs=1e-4)
    assert batch.metrics["length/response"].item() == pytest.approx(float(rows.response_mask.sum()) / 12)
    assert batch.metrics["kl/sampler"].item() == pytest.approx(
        slow.mean(
            [
                slow.k3(p, q)
                for p, q in zip(
                    rows.extras["sampler_logprobs"][rows.response_mask].tolist(),
                    logprobs[rows.response_mask].tolist(),
                    strict=True,
                )
            ]
        ),
        rel=1e-4,
    )


@pytest.mark.parametrize("method", [RLOO(kl_coef=0.2), GRPO(kl_coef=0.2)], ids=["rloo", "grpo"])
def test_losses_of_groups_with_holes_are_the_definition(method):
    """At the policy that sampled every ratio is 1. RLOO: minus A times the response's log-prob, the mean over responses,
    A of rewards less the sum of k1. GRPO: the mean over each response's own tokens of kl_coef k3 - A."""
    rows, models = holed(tokens()), models_for(method)
    found, _ = means_and_gradient(method, models, rows)
    with torch.no_grad():
        logprobs, reference = token_logprobs(models.policy, rows), token_logprobs(models.reference, rows)
        scores = response_scores(models.reward, rows).tolist()
    p = [logprobs[i][m].tolist() for i, m in enumerate(rows.response_mask)]
    q = [reference[i][m].tolist() for i, m in enumerate(rows.response_mask)]
    parts = [group.tolist() for group in groups(rows)]
    losses = []
    if isinstance(method, RLOO):
        paid = [s - 0.2 * (sum(a) - sum(b)) for s, a, b in zip(scores, p, q, strict=True)]
        for part in parts:
            advantages = slow.leave_one_out([paid[i] for i in part])
            losses += [-a * sum(p[i]) for a, i in zip(advantages, part, strict=True)]
    else:
        for part in parts:
            advantages = slow.z_scores([scores[i] for i in part], 1e-4)
            losses += [
                slow.mean([0.2 * slow.k3(x, y) - a for x, y in zip(p[i], q[i], strict=True)])
                for a, i in zip(advantages, part, strict=True)
            ]
    assert found["loss"] == pytest.approx(slow.mean(losses), abs=2e-5)


# --- what every method promises, with holes --------------------------------------------------------------------------


@pytest.fixture(params=SAMPLED)
def method(request):
    return find_method(request.param).METHOD()


def holed_batch(method):
    rows = holed(batch_for(method))
    return replace(rows, extras={**rows.extras, "turns": torch.tensor([runs(row) for row in rows.response_mask])})


@pytest.mark.parametrize("change", [repadded, left_padded])
def test_padding_changes_neither_loss_nor_gradient_of_rows_with_holes(method, change):
    models, rows = models_for(method), holed_batch(method)
    assert_same(means_and_gradient(method, models, change(rows)), means_and_gradient(method, models, rows))


def test_order_and_microbatches_change_neither_loss_nor_gradient_of_rows_with_holes(method):
    models, rows = models_for(method), holed_batch(method)
    wanted = means_and_gradient(method, models, rows)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert_same(means_and_gradient(method, models, rows.select(order)), wanted)
    for max_tokens in (1, 30):
        assert_same(means_and_gradient(method, models, rows, max_tokens), wanted)
    if len(getattr(method, "drawn_by", ("policy",))) == 1 and "length/turns" in wanted[0]:
        assert wanted[0]["length/turns"] == pytest.approx(18 / 12)


# --- conversations ----------------------------------------------------------------------------------------------------


SEED = (3, 5)


def conversations(chat, policy, environment, **more):
    given = {"sampling": SamplingSettings(max_new_tokens=4), "samples_per_prompt": 2, "max_turns": 3} | more
    return Conversations(policy=policy, chat=chat, environment=Environment(environment), **given)


def items_of(chat, *prompts):
    records = [Prompt(p, {"number": i}, f"p.jsonl:{i + 1}") for i, p in enumerate(prompts)]
    return encode_records(records, "prompts", chat, max_length=100)[0]


def echo(conversation):
    return f"you said {len(conversation[-1]['content'])}"


@pytest.fixture
def chat(tiny_tokenizer):
    return Chat(tiny_tokenizer)


def policy_of(tokenizer, **more):
    """Of vague opinions, so that turns end now and then."""
    return tiny("llama", tokenizer, hidden_size=8, num_hidden_layers=1, max_position_embeddings=200, **more)


def eager_to_stop(policy, token, by=4.5):
    """Ends about every second turn of four tokens: the stop token's logit is raised by a bias in the head."""
    head = torch.nn.Linear(8, policy.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(policy.lm_head.weight)
        head.bias.zero_()[token] = by
    policy.lm_head = head
    return policy


@pytest.fixture
def policy(tiny_tokenizer, chat):
    return eager_to_stop(policy_of(tiny_tokenizer), chat.stop_token_ids[0])


def test_the_mask_is_true_on_what_the_policy_drew_and_nothing_else(chat, policy):
    """Row by row: prompt, then a turn of at most 4 tokens that ends with the stop token, the reply as the template
    writes it with the next header, a turn, ...; and every turn but the last ended by itself."""
    items = items_of(chat, "hello there", "in the morning")
    rows = conversations(chat, policy, echo)(items, *SEED)
    stop = chat.stop_token_ids[0]
    assert rows.group.tolist() == [0, 0, 1, 1]
    counts = rows.extras["turns"].tolist()
    assert len(set(counts)) > 1 and max(counts) == 3
    for i, record in enumerate(rows.extras["records"]):
        ids = rows.ids[i][rows.attention_mask[i]].tolist()
        mask = rows.response_mask[i][rows.attention_mask[i]].tolist()
        said, asked = record.fields["conversation"], rows.extras["asked"][i]
        place = len(chat.encode_prompt(asked))
        assert ids[:place] == chat.encode_prompt(asked) and not any(mask[:place])
        turns = 0
        for number, turn in enumerate(said):
            if turn["role"] == "assistant":
                end = place
                while end < len(ids) and mask[end]:
                    end += 1
                assert 1 <= end - place <= 4 and chat.text(ids[place:end]) == turn["content"]
                ended = ids[end - 1] == stop
                assert stop not in ids[place : end - 1]
                place, turns = end, turns + 1
            elif number < len(said) - 1:
                text = f"\n<|im_start|>user\n{turn['content']}<|im_end|>\n<|im_start|>assistant\n"
                wanted = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
                assert ended and ids[place : place + len(wanted)] == wanted
                assert not any(mask[place : place + len(wanted)])
                place += len(wanted)
        assert place == len(ids) and mask[-1]
        assert turns == counts[i] == runs(rows.response_mask[i])
        assert bool(rows.extras["finished"][i]) == ended


def test_the_rows_are_what_the_template_writes_of_the_whole_conversation(chat, policy):
    """Turns of whole words: what was put together piece by piece is what a file with the same conversation encodes to."""
    scripted = iter(["hello", "the user", "in"])
    items = items_of(chat, "hello there")
    rows = conversations(chat, policy, echo, samples_per_prompt=1)(items, 1)
    talk = [{"role": "user", "content": "hello there"}]
    ids, mask = chat.encode_prompt("hello there"), []
    for i, text in enumerate(scripted):
        turn = chat.tokenizer(text, add_special_tokens=False)["input_ids"] + [chat.stop_token_ids[0]]
        mask += [False] * (len(ids) - len(mask)) + [True] * len(turn)
        ids, talk = ids + turn, [*talk, {"role": "assistant", "content": text}]
        if i < 2:
            talk.append({"role": "user", "content": "go on"})
            ids = ids + chat.encode_reply("hello there", talk[1:])
    assert (ids, mask) == chat.encode(tuple(talk[:-1]), "in", every_turn=True)
    assert len(rows) == 1


def test_sampler_logprobs_are_those_of_the_trainer_in_every_turn(chat, policy):
    """Ids in, ids out: a policy that is asked again about its own tokens says the same; 0 outside of them."""
    rows = conversations(chat, policy, echo, sampling=SamplingSettings(max_new_tokens=4, temperature=0.8))(
        items_of(chat, "hello there", "in the morning", "user"), *SEED
    )
    with torch.no_grad():
        logprobs = token_logprobs(policy, rows, temperature=0.8)
    assert torch.allclose(rows.extras["sampler_logprobs"], logprobs, atol=1e-4)
    assert rows.extras["sampler_logprobs"][rows.response_mask].lt(0).all()
    assert not rows.extras["sampler_logprobs"][~rows.response_mask].any()


def rng_echo(conversation, rng):
    return f"{rng.randrange(1000)} {len(conversation)}"


def equal(one, other):
    assert torch.equal(one.ids, other.ids) and torch.equal(one.response_mask, other.response_mask)
    assert one.extras["records"] == other.extras["records"]


def test_the_same_seed_gives_the_same_conversations_and_another_seed_others(chat, policy):
    items = items_of(chat, "hello there", "in the morning")
    rollout = conversations(chat, policy, rng_echo)
    equal(rollout(items, *SEED), rollout(items, *SEED))
    assert rollout(items, 4).extras["records"] != rollout(items, *SEED).extras["records"]


def test_a_conversation_does_not_depend_on_those_beside_it(chat, policy):
    """Fewer prompts and fewer samples: what is left goes on as before, though others drop out at other times."""
    items = items_of(chat, "hello there", "in the morning", "user")
    whole = conversations(chat, policy, rng_echo, samples_per_prompt=3)(items, *SEED)
    part = conversations(chat, policy, rng_echo, samples_per_prompt=2)(items[:2], *SEED)
    equal(part, whole.select(torch.tensor([0, 1, 3, 4])))


def test_an_environment_that_never_speaks_leaves_what_a_rollout_draws(chat, policy):
    items = items_of(chat, "hello there", "in the morning")
    rows = conversations(chat, policy, lambda: None, samples_per_prompt=3)(items, *SEED)
    plain = Rollout(policy, chat, SamplingSettings(max_new_tokens=4), 3)(items, *SEED)
    for name in ("ids", "attention_mask", "response_mask", "group"):
        assert torch.equal(getattr(rows, name), getattr(plain, name))
    for name in ("finished", "sampler_logprobs"):
        assert torch.equal(rows.extras[name], plain.extras[name])
    assert rows.extras["turns"].tolist() == [1] * 6


def test_a_conversation_ends_when_the_environment_says_so_with_or_without_a_last_word(chat, tiny_tokenizer):
    """Every turn ends by itself; the first conversation may have one turn, the second two, the third all three."""
    sure = eager_to_stop(policy_of(tiny_tokenizer), chat.stop_token_ids[0], by=1e4)

    def environment(conversation, fields):
        turns = (len(conversation) + 1) // 2
        if fields["number"] == 0:
            return None
        return Turn("that is all", done=True, reward=2.0) if fields["number"] == turns - 1 else Turn("go on", reward=1)

    rows = conversations(chat, sure, environment, samples_per_prompt=1)(items_of(chat, "hello", "user", "in the"), 1)
    assert rows.extras["turns"].tolist() == [1, 2, 3] and rows.extras["finished"].all()
    fields = [record.fields for record in rows.extras["records"]]
    assert [f["environment_reward"] for f in fields] == [0.0, 3.0, 4.0]
    assert [len(f["conversation"]) for f in fields] == [1, 4, 6]  # the last word is noted ...
    assert fields[1]["conversation"][-1] == {"role": "user", "content": "that is all"}
    assert all(
        rows.response_mask[i][rows.attention_mask[i]][-1] for i in range(3)
    )  # ... and no token of it is in the row
    reward = load_reward("palate.environment:earned", chat)
    assert reward(rows).scores.tolist() == [0.0, 3.0, 4.0]


def test_a_turn_that_was_cut_ends_the_conversation_and_is_not_answered(chat, tiny_tokenizer):
    never = eager_to_stop(policy_of(tiny_tokenizer), chat.stop_token_ids[0], by=-1e4)
    heard = []
    rows = conversations(chat, never, lambda conversation: heard.append(1))(items_of(chat, "hello"), 1)
    assert not heard and rows.extras["turns"].tolist() == [1, 1] and not rows.extras["finished"].any()


@pytest.mark.parametrize("limit", ["max_length", "context"])
def test_the_whole_conversation_stays_within_its_longest(chat, tiny_tokenizer, limit):
    """Turns of one token each; a reply that leaves no room for a token is not appended."""
    size = {} if limit == "max_length" else {"max_position_embeddings": 60}
    policy = tiny(
        "llama", tiny_tokenizer, hidden_size=8, num_hidden_layers=1, **{"max_position_embeddings": 200} | size
    )
    sure = eager_to_stop(policy, chat.stop_token_ids[0], by=1e4)
    longest = 60 if limit == "max_length" else None
    items = items_of(chat, "hello", "hello there in the morning user")
    rows = conversations(chat, sure, echo, max_turns=50, max_length=longest, samples_per_prompt=1)(items, 1)
    lengths = rows.attention_mask.sum(-1)
    reply = len(
        chat.encode_reply("", [{"role": "assistant", "content": ""}, {"role": "user", "content": "you said 0"}])
    )
    assert (lengths <= 60).all() and (lengths + reply >= 60).all()
    assert not rows.extras["finished"].any() and rows.extras["turns"].min() > 1


class Counter:
    """A user who counts."""

    def __init__(self):
        self.count = 0

    def __call__(self, prompt, conversation):
        self.count += 1
        assert self.count == (len(conversation) + 1) // 2
        return f"{self.count} of {prompt}"


def test_a_class_is_one_object_a_conversation(chat, policy):
    rows = conversations(chat, policy, Counter)(items_of(chat, "hello", "user"), *SEED)
    for asked, record in zip(rows.extras["asked"], rows.extras["records"], strict=True):
        replies = [turn["content"] for turn in record.fields["conversation"] if turn["role"] == "user"]
        assert replies == [f"{i + 1} of {asked}" for i in range(len(replies))]


def test_rewards_and_people_read_the_whole_conversation(chat, policy):
    """The prompt is all but the last turn: a reward that reads text, and a row of samples.jsonl, mean the same ids."""
    rollout = conversations(chat, policy, echo)
    rows = rollout(items_of(chat, "hello there", "in the morning"), *SEED)
    seen = []

    def reward(prompts, responses, conversation, number):
        seen.extend(zip(prompts, responses, conversation, number, strict=True))
        return [0.0] * len(prompts)

    load_reward(reward, chat)(rows)
    entries = rollout.texts(rows, range(len(rows)))
    assert len({int(turns) for turns in rows.extras["turns"]}) > 1
    for i, ((prompt, response, conversation, number), entry) in enumerate(zip(seen, entries, strict=True)):
        assert (prompt, response) == (entry["prompt"], entry["response"]) and number == i // 2
        turns = int(rows.extras["turns"][i])
        if turns == 1:
            assert prompt == rows.extras["asked"][i] and "asked" not in entry
        else:
            asked = {"role": "user", "content": entry["asked"]}
            assert list(prompt) == [asked, *conversation[: 2 * turns - 2]]
        json.dumps(entry)


def test_without_a_template_replies_are_text_that_goes_on():
    """Words of one token each; the reply is put after the policy's stop token as it is."""
    tokenizer = tokenizer_of()
    chat = Chat(tokenizer)
    sure = eager_to_stop(policy_of(tokenizer), chat.stop_token_ids[0], by=1e4)
    rollout = conversations(chat, sure, lambda: "b c", samples_per_prompt=1, max_turns=2)
    rows = rollout(items_of(chat, "a"), 1)
    stop = chat.stop_token_ids[0]
    before = chat.encode_prompt("a")
    b, c = tokenizer.convert_tokens_to_ids(["b", "c"])
    assert rows.ids[0].tolist() == [*before, stop, b, c, stop]
    assert rows.response_mask[0].tolist() == [False] * len(before) + [True, False, False, True]
    (entry,) = rollout.texts(rows, [0])
    assert entry == {"prompt": "ab c", "response": "", "finished": True, "asked": "a"}


def test_other_drawers_have_conversations_too(chat, policy):
    """The most probable conversation beside the sampled ones, in the same group."""
    items = items_of(chat, "hello there", "in the morning")
    rows = conversations(chat, policy, echo, drawn_by=("policy", "greedy"))(items, *SEED)
    assert rows.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.extras["drawn_by"] == ["policy", "policy", "greedy"] * 2
    greedy = conversations(chat, policy, echo, samples_per_prompt=1, sampling=SamplingSettings(4, temperature=0))
    equal(rows.select(torch.tensor([2, 5])), greedy(items, 1))


# --- errors -----------------------------------------------------------------------------------------------------------


def broken(conversation):
    raise KeyError("no such tool")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (broken, "raised KeyError: 'no such tool'"),
        (lambda: 7, "returned 7; a text, None"),
        (lambda: Turn("x", role="robot"), "speaks as 'robot'; expected one of user, tool, system"),
        (lambda: Turn("x", reward=float("nan")), "gave the reward nan"),
        (lambda: "\ud83d", "half a character"),
    ],
)
def test_what_an_environment_does_wrong_is_said_with_the_sample(chat, policy, environment, said):
    with pytest.raises(ModelError, match='environment ".*" ') as found:
        conversations(chat, policy, environment, samples_per_prompt=8)(items_of(chat, "hello there"), *SEED)
    assert said in str(found.value)
    assert "sample (p.jsonl:1)" in str(found.value) and "prompt: 'hello there'" in str(found.value)


def test_an_environment_that_cannot_be_called_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match='parameter "table".*prompt, conversation, fields, rng'):
        Environment(lambda table: None)
    with pytest.raises(ConfigError, match='environment: there is no file "nowhere.py"'):
        find_environment("nowhere.py:talk")
    for wrong in ({"function": "nowhere"}, {"function": "a:b", "max_turns": 0}):
        with pytest.raises(ConfigError, match="environment.(function|max_turns): found"):
            EnvironmentSettings(**wrong)


def test_a_template_that_drops_the_reply_is_refused_with_the_record(tiny_tokenizer):
    """This one knows no tools."""
    template = tiny_tokenizer.chat_template.replace("for m in messages", "for m in messages if m.role != 'tool'")
    chat = Chat(tiny_tokenizer, template)
    turns = [{"role": "assistant", "content": "hello"}, {"role": "tool", "content": "there"}]
    with pytest.raises(ModelError, match="the chat template leaves out the tool turn"):
        chat.encode_reply("user", turns)
    assert chat.encode_reply("user", [turns[0], {"role": "user", "content": "there"}])
    sure = eager_to_stop(policy_of(tiny_tokenizer), chat.stop_token_ids[0], by=1e4)
    with pytest.raises(ModelError, match=r"^p.jsonl:1: the chat template leaves out the tool turn"):
        conversations(chat, sure, lambda: Turn("there", role="tool"))(items_of(chat, "user"), 1)


# --- settings and runs ------------------------------------------------------------------------------------------------


def settings_with(method, **more):
    given = {"model": "m", "out": "o", "data": "d.jsonl", "reward": "r:r", "sampling": {"max_new_tokens": 10}}
    return load_settings(method, settings=given | more)


def test_settings_name_an_environment_in_short_and_in_full():
    assert settings_with("grpo").environment is None
    short = settings_with("grpo", environment="my_module:my_env")
    assert short.environment == EnvironmentSettings("my_module:my_env", 4)
    full = settings_with("grpo", environment={"function": "my.py:my_env", "max_turns": 2})
    assert full.environment == EnvironmentSettings("my.py:my_env", 2)
    with pytest.raises(ConfigError, match="environment: sft samples nothing"):
        require_all(settings_with("sft", environment="a:b"))


@pytest.mark.parametrize("name", ["dapo", "dr_grpo"])
def test_a_method_that_counts_tokens_counts_those_of_all_turns(name):
    facts = Facts(1000, 256)
    config = resolved(settings_with(name, environment={"function": "a:b", "max_turns": 3}), facts)
    assert config.method.settings.max_new_tokens == 30 and config.sampling.max_new_tokens == 10
    assert resolved(config, facts).to_dict() == config.to_dict()
    with pytest.raises(ConfigError, match=r"method.max_new_tokens \(7\) is not .* \(192\)"):
        other = {"environment": {"function": "a:b", "max_turns": 3}, "data": "d.jsonl", "out": "o", "model": "m"}
        resolved(load_settings(name, settings=other, overrides={"method.max_new_tokens": 7}), facts)


ENVIRONMENT = """
def talk(conversation, rng):
    return None if rng.random() < 0.2 else f"you said {len(conversation[-1]['content'])}"

def length(prompts, responses, conversation):
    return [float(sum(len(t["content"]) for t in turns)) for turns in conversation]
"""


def test_a_run_with_an_environment_resumes_bit_identically_and_shows_its_conversations(chat, tiny_tokenizer, tmp_path):
    """Stopped after one batch and after two more, beside one that was not."""
    policy = eager_to_stop(policy_of(tiny_tokenizer), chat.stop_token_ids[0])
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    items = items_of(chat, *(f"hello {i}" for i in range(6)))
    method = RLOO(kl_coef=0.0)

    def fresh(folder):
        own = deepcopy(policy)
        environment = find_environment(f"{tmp_path / 'env.py'}:talk")
        rollout = Conversations(own, chat, SamplingSettings(4), 2, environment=environment, max_turns=3)
        models = Models(policy=own, reward=load_reward(f"{tmp_path / 'env.py'}:length", chat))
        run = run_of(method, models, folder, max_steps=4, save_every=1, samples_every=1)
        return replace(run, items=items, validation=items[:2], rollout=rollout)

    list(train(whole := fresh(tmp_path / "whole")))
    part = stopped_and_resumed(fresh, tmp_path / "part", 1, 3)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all(torch.equal(v, weights_of(part.models)[k]) for k, v in weights_of(whole.models).items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    several = [line for line in lines if "asked" in line]
    assert several and all(line["prompt"][0] == {"role": "user", "content": line["asked"]} for line in several)
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(1 <= line["length/turns"] <= 3 for line in metrics)
    assert all(abs(line["kl/sampler"]) < 1e-5 for line in metrics if line["split"] == "train")


def test_a_run_by_its_settings_talks_before_during_and_after_training(tmp_path):
    """Everything from a settings file: the environment is asked in training, for the validation and for the witnesses."""
    tokenizer = tokenizer_of()
    save_model(
        tiny("llama", tokenizer, max_position_embeddings=120), tokenizer, tmp_path / "policy", stop_token_ids=[2]
    )
    (tmp_path / "env.py").write_text(ENVIRONMENT.replace("f\"you said {len(conversation[-1]['content'])}\"", '"b c"'))
    with open(tmp_path / "prompts.jsonl", "w") as file:
        file.writelines(json.dumps({"prompt": f"a {word}"}) + "\n" for word in "bcdefghijklm")
    run = palate.train(
        "grpo",
        model=tmp_path / "policy",
        reward={"long": f"{tmp_path / 'env.py'}:length", "env": "palate.environment:earned"},
        environment=f"{tmp_path / 'env.py'}:talk",
        data={"train": tmp_path / "prompts.jsonl", "validation_fraction": 0.3},
        sampling={"max_new_tokens": 16},
        samples_per_prompt=3,
        training={"max_steps": 2, "batch_size": 4},
        out=tmp_path / "run",
        quiet=True,
    )
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for some in (
        [x for x in lines if "when" not in x],
        *([x for x in lines if x.get("when") == w] for w in ("before", "after")),
    ):
        several = [line for line in some if "asked" in line]
        assert several and all(line["prompt"].startswith(line["asked"]) and "b c" in line["prompt"] for line in several)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["split"] for line in metrics} == {"train", "validation"}
    assert all(line["length/turns"] > 1 and line["score/env"] == 0 for line in metrics)
    assert all(abs(line["kl/sampler"]) < 1e-5 for line in metrics)
    assert "b c" in (run / "report.html").read_text()
