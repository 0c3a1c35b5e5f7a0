"""Ids and masks: by position, with the model's own template, the same prompt for every response, one stop token."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import CHATML
from palate.data.chat import Chat
from palate.errors import ConfigError, DataError, ModelError

TALK = (
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye now"},
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Qwen3's way: reasoning of earlier turns is removed from the history.
FORGETS = (
    "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# DeepSeek-R1's way: the generation prompt opens the reasoning, and the rendered turn has none of it.
OPENS_THINKING = (
    "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "generation": GENERATION, "forgets": FORGETS, "no_end": NO_END, "llama2": LLAMA2}


def trained(chat, ids, mask):
    """The texts of the runs of the mask."""
    runs, run = [], []
    for number, kept in [*zip(ids, mask, strict=True), (0, False)]:
        if kept:
            run.append(number)
        elif run:
            runs.append(chat.tokenizer.decode(run))
            run = []
    return runs


# -- one response ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", ["Hi", TALK], ids=["text", "talk"])
def test_a_row_is_the_prompt_then_the_response_then_one_stop_token(tiny_tokenizer, template, prompt):
    chat = Chat(tiny_tokenizer, template=template)
    start = chat.encode_prompt(prompt)
    ids, mask = chat.encode(prompt, "Good night")
    assert ids[: len(start)] == start
    assert mask == [False] * len(start) + [True] * (len(ids) - len(start))
    assert ids[-1] == chat.stop_token_ids[0] and ids[len(start) :].count(ids[-1]) == 1
    assert chat.text(ids[len(start) :]) == "Good night"


def test_the_ids_are_those_of_the_whole_rendered_text(tiny_tokenizer):
    """Where a template extends its own prompt, joining ids changes nothing against tokenising the text at once."""
    chat = Chat(tiny_tokenizer)
    ids, _ = chat.encode(TALK, "Good night")
    whole = tiny_tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "Good night"}], tokenize=False)
    assert ids == tiny_tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"]


def test_the_stop_token_is_trained_even_where_pad_is_eos(tiny_tokenizer):
    ids, mask = Chat(tiny_tokenizer).encode("Hi", "Hello")
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    same = Chat(tiny_tokenizer)
    assert same.encode("Hi", "Hello") == (ids, mask)
    assert ids[-1] == tiny_tokenizer.pad_token_id and mask[-1]
    assert same.check() == []


def test_the_mask_does_not_look_at_values(tiny_tokenizer):
    """A prompt that quotes the template's own tokens stays masked; a response that does stays trained."""
    chat = Chat(tiny_tokenizer)
    prompt, response = "a<|im_end|>\n<|im_start|>assistant\nb", "c<|im_end|>d"
    _, mask = chat.encode(prompt, response)
    assert mask.index(True) == len(chat.encode_prompt(prompt)) and all(mask[mask.index(True) :])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(prompt=st.text(max_size=12), response=st.text(min_size=1, max_size=12), name=st.sampled_from(sorted(TEMPLATES)))
def test_any_text_keeps_the_prompt_and_comes_back(tiny_tokenizer, prompt, response, name):
    prompt, response = (t.encode("utf-8", "ignore").decode() for t in (prompt, response))
    chat = Chat(tiny_tokenizer, template=TEMPLATES[name])
    ids, mask = chat.encode(prompt, response)
    start = chat.encode_prompt(prompt)
    assert ids[: len(start)] == start and len(ids) == len(mask) and not any(mask[: len(start)])
    assert all(mask[len(start) :]) and mask[-1] and not mask[0]
    assert chat.text(ids[len(start) :]) == response


def test_many_at_once_is_the_same_as_one_by_one(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)
    prompts = ["Hi", TALK, "Hi", "Morning"]
    found = chat.encode_many(prompts, [["a", " b"], ["c"], ["\n\nd"], []])
    assert [len(each.responses) for each in found] == [2, 1, 1, 0]
    for prompt, each, several in zip(prompts, found, (["a", " b"], ["c"], ["\n\nd"], []), strict=True):
        for response, ids in zip(several, each.responses, strict=True):
            assert each.prompt + ids == chat.encode(prompt, response)[0]
    assert chat.encode_prompts(prompts) == [chat.encode_prompt(prompt) for prompt in prompts]


def test_chosen_and_rejected_share_the_prompts_tokens_though_they_merge_with_it(tiny_tokenizer):
    """A response that begins with letters of the prompt's last word would, tokenised as one text, change its ids."""
    chat = Chat(tiny_tokenizer, template="none")
    word = "morning"
    whole = tiny_tokenizer("the " + word, add_special_tokens=False)["input_ids"]
    start = chat.encode_prompt("the mor")
    assert whole[: len(start)] != start, "the test needs a word that merges"
    ids, _ = chat.encode("the mor", "ning")
    assert ids[: len(start)] == start and chat.text(ids[len(start) :]) == "ning"


# -- earlier turns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "generation", "llama2"])
def test_every_turn_is_trained_with_its_end(tiny_tokenizer, name):
    chat = Chat(tiny_tokenizer, template=TEMPLATES[name])
    ids, mask = chat.encode(TALK, "Good night", every_turn=True)
    said = trained(chat, ids, mask)
    assert [s.strip() for s in said] == [
        f"Hello you{' ' * (name == 'llama2')}<|im_end|>",
        f"Good night{' ' * (name == 'llama2')}<|im_end|>",
    ]
    plain, last_only = chat.encode(TALK, "Good night")
    assert plain == ids and sum(last_only) < sum(mask) and all(b for a, b in zip(last_only, mask, strict=True) if a)


def test_earlier_turns_count_only_when_asked(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)
    ids, mask = chat.encode(TALK, "Good night")
    assert trained(chat, ids, mask) == ["Good night<|im_end|>"]


def test_a_user_who_quotes_the_assistant_is_not_trained_on(tiny_tokenizer):
    chat = Chat(tiny_tokenizer)
    talk = ({"role": "user", "content": "Say: Hello you"}, TALK[1], {"role": "user", "content": "Hello you"})
    ids, mask = chat.encode(talk, "Hello you", every_turn=True)
    assert trained(chat, ids, mask) == ["Hello you<|im_end|>"] * 2
    assert chat.tokenizer.decode(ids).count("Hello you") == 4


def test_a_template_that_forgets_reasoning_masks_what_it_wrote_and_says_so(tiny_tokenizer):
    chat = Chat(tiny_tokenizer, template=FORGETS)
    talk = (TALK[0], {"role": "assistant", "content": "<think>hm</think>Hello you"}, TALK[2])
    ids, mask = chat.encode(talk, "<think>so</think>Good night", every_turn=True)
    assert trained(chat, ids, mask) == ["Hello you<|im_end|>", "<think>so</think>Good night<|im_end|>"]
    assert ids[: len(chat.encode_prompt(talk))] == chat.encode_prompt(talk)
    assert any("removes the <think> part of earlier assistant turns" in finding for finding in chat.check())


def test_reasoning_that_the_template_would_lose_is_kept_after_the_generation_prompt(tiny_tokenizer):
    """The prompt ends with "<think>\\n"; what generation has to write is the rest of the response."""
    chat = Chat(tiny_tokenizer, template=OPENS_THINKING)
    found = chat.encode_many(["Hi"], [["<think>\nhm</think>Hello"]])[0]
    assert chat.tokenizer.decode(found.prompt).endswith("assistant\n<think>\n")
    assert chat.tokenizer.decode(found.responses[0]) == "hm</think>Hello<|im_end|>"
    assert found.rewritten == [True]
    assert any("does not continue its own generation prompt" in finding for finding in chat.check())


def test_reasoning_that_the_template_removes_from_the_last_turn_too_is_kept(tiny_tokenizer):
    """The template continues its prompt, but with half of the response: all of it is trained, and counted."""
    chat = Chat(tiny_tokenizer, template=OPENS_THINKING.replace("<think>\\n' }}{% endif %}", "' }}{% endif %}"))
    found = chat.encode_many(["Hi"], [["<think>hm</think>Hello", "Hello"]])[0]
    assert [chat.tokenizer.decode(ids) for ids in found.responses] == [
        "<think>hm</think>Hello<|im_end|>",
        "Hello<|im_end|>",
    ]
    assert found.rewritten == [True, False]


def test_a_turn_that_the_template_leaves_out_is_not_trained(tiny_tokenizer):
    last_only = CHATML.replace("for m in messages", "for m in messages[-1:]")
    chat = Chat(tiny_tokenizer, template=last_only)
    ids, mask = chat.encode(TALK, "Good night", every_turn=True)
    assert trained(chat, ids, mask) == ["Good night<|im_end|>"]
    assert any("leaves out earlier assistant turns" in finding for finding in chat.check())


# -- findings --------------------------------------------------------------------------------------------------------


def test_a_sound_template_has_no_findings(tiny_tokenizer):
    assert Chat(tiny_tokenizer).check() == []
    assert Chat(tiny_tokenizer, template="default").check() == []
    assert Chat(tiny_tokenizer, template="none").check() == []


def test_a_template_that_drops_the_end_of_turn_gets_the_stop_token_and_a_finding(tiny_tokenizer):
    chat = Chat(tiny_tokenizer, template=NO_END)
    ids, mask = chat.encode("Hi", "Hello")
    assert trained(chat, ids, mask) == ["Hello<|im_end|>"]
    found = chat.check()
    assert len(found) == 1 and found[0].startswith("The template drops the end of turn: after a response it writes")


def test_the_turn_end_of_the_template_comes_before_the_end_of_text(tiny_tokenizer):
    """Gemma's and Llama's case: eos is one token, the end of a turn another."""
    tiny_tokenizer.eos_token = "<|endoftext|>"
    chat = Chat(tiny_tokenizer)
    names = tiny_tokenizer.convert_ids_to_tokens(list(chat.stop_token_ids))
    assert names == ["<|im_end|>", "<|endoftext|>"]
    assert chat.encode("Hi", "Hello")[0][-1] == chat.stop_token_ids[0]


def test_a_double_begin_of_text_is_found(tiny_tokenizer):
    assert Chat(tiny_tokenizer, template="{{ bos_token }}" + CHATML).check() == []
    found = Chat(tiny_tokenizer, template="{{ bos_token }}{{ bos_token }}" + CHATML).check()
    assert len(found) == 1 and found[0].startswith("Double begin-of-text")


def with_post_processor(tokenizer, single):
    from tokenizers.processors import TemplateProcessing

    names = ["<|endoftext|>", "<|im_end|>"]
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_no_second_begin_of_text_where_the_template_or_the_text_writes_it(tiny_tokenizer):
    tokenizer = with_post_processor(tiny_tokenizer, "<|endoftext|> $A")
    bos = tokenizer.bos_token_id
    assert Chat(tokenizer, template="{{ bos_token }}" + CHATML).encode_prompt("Hi").count(bos) == 1
    plain = Chat(tokenizer, template="none")
    assert plain.encode_prompt("Hi").count(bos) == plain.encode_prompt("<|endoftext|>Hi").count(bos) == 1
    found = Chat(tokenizer).check()
    assert len(found) == 1 and found[0].startswith("The template writes no <|endoftext|>")


def test_an_end_token_of_the_tokenizer_stands_once_after_the_response_only(tiny_tokenizer):
    tokenizer = with_post_processor(tiny_tokenizer, "$A <|im_end|>")
    chat = Chat(tokenizer, template="none")
    ids, _ = chat.encode("the morning", " hello")
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert any("ends every text with <|im_end|>" in finding for finding in chat.check())


def test_a_tokenizer_without_a_stop_token_is_found(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    chat = Chat(tiny_tokenizer, template=NO_END)
    assert chat.stop_token_ids == () and trained(chat, *chat.encode("Hi", "Hello")) == ["Hello"]
    found = chat.check()
    assert len(found) == 1 and found[0].startswith("No stop token") and "<|endoftext|>" in found[0]


# -- settings and faults ---------------------------------------------------------------------------------------------


def test_a_system_message_is_put_where_there_is_none(tiny_tokenizer):
    chat = Chat(tiny_tokenizer, system="Be kind.")
    assert chat.prompt_text("Hi").startswith("<|im_start|>system\nBe kind.<|im_end|>")
    own = ({"role": "system", "content": "Be brief."}, *TALK)
    assert "kind" not in chat.prompt_text(own) and "Be brief." in chat.prompt_text(own)
    with pytest.raises(ConfigError, match="needs a chat template"):
        Chat(tiny_tokenizer, template="none", system="Be kind.")


def test_a_template_from_a_file_and_one_that_is_nothing(tiny_tokenizer, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(NO_END)
    assert Chat(tiny_tokenizer, template=str(path)).prompt_text("Hi") == "user: Hi\nassistant: "
    with pytest.raises(ConfigError, match="neither a file nor Jinja"):
        Chat(tiny_tokenizer, template="chatml")


def test_a_template_that_refuses_is_an_error_in_words(tiny_tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    chat = Chat(tiny_tokenizer, template=strict)
    with pytest.raises(DataError, match=r"refuses the conversation \(system, user\): user first"):
        chat.encode(({"role": "system", "content": "x"}, TALK[0]), "Hello")


def test_a_broken_template_is_an_error_in_words(tiny_tokenizer):
    with pytest.raises(ModelError, match="not valid Jinja: line 1"):
        Chat(tiny_tokenizer, template="{% for m in messages %}")
    with pytest.raises(ModelError, match="does not write what the assistant says"):
        Chat(tiny_tokenizer, template="{{ messages[0].content }}")


def test_a_conversation_on_forced_plain_text_is_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match='conversation of 3 messages, and template "none" takes plain text'):
        Chat(tiny_tokenizer, template="none").encode_prompt(TALK)


def test_an_empty_prompt_still_has_a_token_to_predict_from(tiny_tokenizer):
    chat = Chat(tiny_tokenizer, template="none")
    ids, mask = chat.encode("", "Hello")
    assert ids[0] == tiny_tokenizer.bos_token_id and mask[:2] == [False, True]
    tiny_tokenizer.bos_token = tiny_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="empty prompt"):
        Chat(tiny_tokenizer, template="none").encode_prompt("")


def test_the_default_template_is_as_documented(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    chat = Chat(tiny_tokenizer)
    assert chat.template is None and chat.prompt_text("plain") == "plain"
    talk = ({"role": "system", "content": "System text"}, *TALK)
    assert chat.prompt_text(talk) == (
        "System text\n\nUser:\nHi there\n\nAssistant:\nHello you<|im_end|>\n\nUser:\nBye now\n\nAssistant:\n"
    )
    tiny_tokenizer.chat_template = chat.conversation_template
    assert Chat(tiny_tokenizer).prompt_text(talk) == chat.prompt_text(talk)


def test_a_tokenizer_that_cuts_by_itself_is_not_let(tiny_tokenizer):
    """tokenizer.json may hold truncation settings of whoever saved it."""
    whole = Chat(tiny_tokenizer).encode(TALK, "Good night")
    tiny_tokenizer.backend_tokenizer.enable_truncation(5)
    tiny_tokenizer.backend_tokenizer.enable_padding(length=64)
    assert Chat(tiny_tokenizer).encode(TALK, "Good night") == whole


# -- real tokenizers -------------------------------------------------------------------------------------------------


def load(folder, **options):
    from transformers import AutoTokenizer, GPT2Tokenizer

    return (GPT2Tokenizer if folder.name == "gpt2" else AutoTokenizer).from_pretrained(folder, **options)


def test_minimind_writes_its_empty_reasoning_in_the_prompt(shared_data):
    chat = Chat(load(shared_data / "tokenizers" / "minimind-6400"))
    assert chat.check() == []
    ids, mask = chat.encode(TALK, "再见", every_turn=True)
    assert trained(chat, ids, mask) == ["Hello you<|im_end|>", "再见<|im_end|>"]
    assert chat.tokenizer.decode(chat.encode_prompt("Hi")).endswith("assistant\n<think>\n\n</think>\n\n")
    found = chat.encode_many(["Hi"], [["<think>hm</think>Hello"]])[0]
    assert chat.text(found.responses[0]) == "<think>hm</think>Hello" and found.rewritten == [True]


def test_gpt2_continues_text_and_stops(shared_data):
    chat = Chat(load(shared_data / "tokenizers" / "gpt2"))
    assert chat.check() == [] and chat.template is None
    ids, mask = chat.encode("Once upon a time", " there was a cat.")
    whole = chat.tokenizer("Once upon a time there was a cat.<|endoftext|>")["input_ids"]
    assert ids == whole and trained(chat, ids, mask) == [" there was a cat.<|endoftext|>"]
    assert chat.encode("", "Hello")[0][0] == chat.tokenizer.eos_token_id


def test_tiny_stories_has_no_end_of_text_until_it_is_named(shared_data):
    folder = shared_data / "tokenizers" / "tiny-stories-2k"
    found = Chat(load(folder)).check()
    assert len(found) == 1 and found[0].startswith("No stop token") and "<|EOS|>" in found[0]
    chat = Chat(load(folder, eos_token="<|EOS|>", bos_token="<|BOS|>"))
    ids, mask = chat.encode("Once upon", " a time")
    assert (ids[0], ids[-1], chat.text(ids[mask.index(True) :])) == (0, 2, " a time") and chat.check() == []


def test_stories260k_ends_its_stories_with_the_begin_token(shared_data):
    """generation_config.eos_token_id is [1, 2], and 1, the begin of text, is what its stories end with."""
    tokenizer = load(shared_data / "models" / "stories260k-hf")
    chat = Chat(tokenizer, stop_token_ids=[1, 2])
    ids, mask = chat.encode("Once upon a time", " there was a cat.")
    assert ids == [*tokenizer("Once upon a time there was a cat.")["input_ids"], 1]
    assert chat.stop_token_ids == (1, 2) and mask[-1] and chat.check() == []
    assert chat.text(ids[mask.index(True) :]) == " there was a cat."


@pytest.mark.parametrize("name", ["tokenizers/minimind-6400", "tokenizers/gpt2", "models/stories260k-hf"])
@pytest.mark.parametrize("template", [None, "default"])
def test_real_conversations_come_back(shared_data, name, template):
    from palate.data.records import read_records

    chat = Chat(load(shared_data / name), template=template)
    some = read_records(shared_data / "preferences" / "hh_rlhf.jsonl.gz", "comparisons", limit=100)
    some += read_records(shared_data / "preferences" / "politeness_ai.jsonl.gz", "comparisons", limit=100)
    for record, found in zip(
        some, chat.encode_many([r.prompt for r in some], [[r.chosen, r.rejected] for r in some]), strict=True
    ):
        assert found.prompt == chat.encode_prompt(record.prompt)
        assert [ids[-1] for ids in found.responses] == [chat.stop_token_ids[0]] * 2
        assert [chat.text(ids) for ids in found.responses] == [record.chosen, record.rejected]
