"""A saved folder is complete or absent, and what stood there before survives every failure."""

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from palate.errors import RunError
from palate.models.load import load_policy, save_model
from palate.models.save import new_folder
from tiny import LORA, rows, tiny, tokenizer_of


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*args, **kwargs):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failure", [full_disk, full_disk_in_rust])
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_full_disk_leaves_the_old_folder_and_says_what_to_do(tmp_path, monkeypatch, failure, what):
    tokenizer = tokenizer_of()
    save_model(tiny(), tokenizer, tmp_path / "m")
    before = contents(tmp_path / "m")
    target = PreTrainedModel if what == "model" else type(tokenizer)
    monkeypatch.setattr(target, "save_pretrained", failure)
    with pytest.raises(RunError, match="no space left on device.*untouched.*Free some space") as error:
        save_model(tiny(seed=1), tokenizer, tmp_path / "m", overwrite=True)
    assert str(tmp_path / "m") in str(error.value)
    assert contents(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(RunError, match="Nothing was left behind"):
        save_model(tiny(seed=1), tokenizer, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_nothing_existing_is_overwritten_unless_told(tmp_path):
    save_model(tiny(), tokenizer_of(), tmp_path / "m")
    before = contents(tmp_path / "m")
    with pytest.raises(RunError, match="exists already and is not overwritten"):
        save_model(tiny(seed=1), tokenizer_of(), tmp_path / "m")
    assert contents(tmp_path / "m") == before
    (tmp_path / "m" / "extra.txt").write_text("of the old model")
    save_model(tiny(seed=1), tokenizer_of(), tmp_path / "m", overwrite=True)
    assert set(contents(tmp_path / "m")) == set(before)  # the new folder, not a mixture
    assert contents(tmp_path / "m")["model.safetensors"] != before["model.safetensors"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a model; it is not overwritten"):
        save_model(tiny(), tokenizer_of(), tmp_path / "thesis", overwrite=True)
    (tmp_path / "empty").mkdir()
    save_model(tiny(), tokenizer_of(), tmp_path / "empty")
    assert load_policy(tmp_path / "empty") is not None


def test_a_crash_between_or_before_the_renames_is_repaired_by_the_next_save(tmp_path):
    save_model(tiny(), tokenizer_of(), tmp_path / "m")
    before = contents(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.replaced")  # killed after the first rename
    (tmp_path / ".m.saving").mkdir()
    (tmp_path / ".m.saving" / "half").write_text("written")
    with pytest.raises(RunError, match="exists already"):
        save_model(tiny(seed=1), tokenizer_of(), tmp_path / "m")
    assert contents(tmp_path / "m") == before
    save_model(tiny(seed=1), tokenizer_of(), tmp_path / "m", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"] and "half" not in contents(tmp_path / "m")


def test_an_error_that_is_not_the_disks_passes_through_and_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "m") as folder:
        (folder / "half").write_text("written")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_same_weights_same_bytes(tmp_path):
    for name in "ab":
        save_model(tiny(), tokenizer_of(), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_files_are_as_readable_as_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        save_model(tiny(), tokenizer_of(), tmp_path / "m")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o640}


def test_the_chat_template_and_the_stop_ids_are_saved(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} </s>{% endfor %}"
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "m", stop_token_ids=(5, 2))
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [5, 2]
    again = load_policy(tmp_path / "m")
    assert again.generation_config.eos_token_id == [5, 2]
    save_model(again, tokenizer, tmp_path / "again")  # a list that came with the model stays
    assert GenerationConfig.from_pretrained(tmp_path / "again").eos_token_id == [5, 2]
    adapted = load_policy(tmp_path / "m", lora=LORA)
    save_model(adapted, tokenizer, tmp_path / "adapter")
    assert GenerationConfig.from_pretrained(tmp_path / "adapter").eos_token_id == [5, 2]
    assert load_policy(tmp_path / "adapter").get_base_model().generation_config.eos_token_id == [5, 2]


def test_a_published_generation_config_that_transformers_finds_fault_with_can_be_saved(tmp_path):
    save_model(tiny(), tokenizer_of(), tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7}))
    save_model(load_policy(tmp_path / "m"), tokenizer_of(), tmp_path / "again")
    saved = GenerationConfig.from_pretrained(tmp_path / "again")
    assert saved.eos_token_id == [7, 2] and (saved.temperature, saved.top_p) == (0.6, 0.9)


def test_a_model_from_scratch_with_an_adapter_is_saved_whole(tmp_path):
    from palate.models.adapters import add_lora

    policy = add_lora(tiny(), LORA, seed=0, scalar=False)
    save_model(policy, tokenizer_of(), tmp_path / "m")
    ids = rows(6).ids
    assert torch.allclose(load_policy(tmp_path / "m")(ids).logits, policy(ids).logits, atol=1e-5)


def test_when_the_last_rename_fails_the_old_folder_is_put_back(tmp_path, monkeypatch):
    save_model(tiny(), tokenizer_of(), tmp_path / "m")
    before, rename = contents(tmp_path / "m"), Path.rename

    def fails(self, target):
        if self.name.endswith(".saving"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RunError, match="cannot be written: .*Input/output error.*untouched"):
        save_model(tiny(seed=1), tokenizer_of(), tmp_path / "m", overwrite=True)
    assert contents(tmp_path / "m") == before and [p.name for p in tmp_path.iterdir()] == ["m"]
