"""The table of roles reads well in a narrow terminal too."""

import io

import pytest
from rich.console import Console

from palate.stage.roles import Role
from palate.stage.roles_table import RolesTable

PPO = [
    Role("policy", "LlamaForCausalLM", 8_030_261_248, 41_943_040, "bfloat16", 16_060_522_496, 503_316_480),
    Role("reference", "policy, adapter off", 0, 0, "", 0, 0),
    Role(
        "value",
        "LlamaForSequenceClassification",
        7_504_928_768,
        7_504_928_768,
        "float32",
        30_019_715_072,
        90_059_145_216,
    ),
]


def printed(lines: list[Role], width: int, notes: dict[str, str] | None = None) -> str:
    out = Console(file=io.StringIO(), width=width, soft_wrap=True)
    out.print(RolesTable("roles of ppo on cuda, sharing=reference", lines, notes or {}))
    return out.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 120, 140])
def test_no_name_and_no_number_is_broken_and_no_line_too_long(width: int) -> None:
    said = printed(PPO, width, {"reference": ", until its log-probs are known"})
    assert all(len(line.rstrip()) <= width for line in said.splitlines())
    for whole in ("LlamaForSequenceClassification", "8,030,261,248", "41,943,040", "15.0 GiB", "480.0 MiB", "83.9 GiB"):
        assert whole in said


def test_where_the_table_has_no_room_each_role_has_its_paragraph() -> None:
    assert "┃" in printed(PPO, 140)
    narrow = printed(PPO, 80)
    assert "┃" not in narrow
    assert "  policy     LlamaForCausalLM\n" in narrow
    assert (
        "             8,030,261,248 parameters, 41,943,040 trained, bfloat16, 15.0 GiB +\n             480.0 MiB\n"
        in narrow
    )
    assert "  all        127.3 GiB together\n" in narrow


def test_a_single_role_has_no_sum() -> None:
    assert "together" not in printed(PPO[:1], 80) + printed(PPO[:1], 140)
