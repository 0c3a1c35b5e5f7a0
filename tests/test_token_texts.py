"""Tokens shown to people: a character that is several tokens is still a character."""

from palate.data.records import Demonstration, write_records
from palate.texts import check_tokens
from palate.texts.looking import REST, token_texts


def test_a_character_of_several_tokens_stands_at_the_first_of_them(tiny_tokenizer) -> None:
    """The tokenizer knows bytes only; each of these characters has three of them."""
    ids = tiny_tokenizer("hello 面包。")["input_ids"]
    texts = token_texts(tiny_tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(text for text in texts if text != REST) == "hello 面包。"
    assert texts[-9:] == ["面", REST, REST, "包", REST, REST, "。", REST, REST]


def test_half_a_character_at_the_end_and_a_special_token_keep_their_names(tiny_tokenizer) -> None:
    ids = [*tiny_tokenizer("面")["input_ids"][:2], tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    names = tiny_tokenizer.convert_ids_to_tokens(ids)
    assert token_texts(tiny_tokenizer, ids) == names and names[-1] == "<|im_end|>"


def test_check_shows_chinese_as_it_is_written(tiny_tokenizer, tmp_path, capsys) -> None:
    from palate.console import print_check

    tiny_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    write_records(tmp_path / "d.jsonl", [Demonstration("你好", "面包")])
    print_check(check_tokens(str(tmp_path / "model"), str(tmp_path / "d.jsonl")))
    said = capsys.readouterr().out
    assert "你|⋯|⋯|好|⋯|⋯|" in said and "[[面|⋯|⋯|包|⋯|⋯|<|im_end|>]]" in said
    assert "⋯ belongs to the character before it" in said
