"""Rewards that a program can verify: numbers, forms, tests of code."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.data.chat import Chat
from palate.errors import ConfigError, DataError, ModelError
from palate.models.rewards import CheckReward, check_records, load_reward, programs
from palate.models.rewards.answers import NumberCheck, answer_in
from palate.models.rewards.formats import JsonCheck, RegexCheck, fenced_blocks
from palate.models.rewards.programs import CodeCheck, code_in, run_tests
from palate.models.samples import Sample
from sampled_rows import rows_of

ADD = "def add(a, b):\n    return a + b\n"


def said(*responses: str, finished: bool = True) -> list[Sample]:
    return [Sample("question", text, text, finished, {}, "") for text in responses]


# -- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 72 clips.", 72),
        ("48+24 = 72", 72),
        ("so x=72", 72),
        ("it costs $1,234.50 in all", Fraction("1234.5")),
        ("total -5", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("50%", 50),
        ("50 %", 50),
        ("3/4 of it", Fraction(3, 4)),
        ("2 1/2 hours", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("2\u00bd", Fraction(5, 2)),
        ("1.5e3", 1500),
        ("1.5 x 10^3", 1500),
        ("1.5 \u00d7 10\u00b3", 1500),
        ("2e-2", Fraction(1, 50)),
        ("5 million people", 5_000_000),
        ("1\u202f000", 1000),
        ("10 molecules of H2O.", 10),  # the 2 is part of a word
        ("5 of them, he came 2nd", 5),
        ("the area is 20 m\u00b2", 20),
        ("**72**", 72),
        ("the answer is *72*.", 72),
        ("\u7b54\u6848\u662f72\u4e2a\u3002", 72),
        ("\u7b54\u6848\u662f\uff17\uff12\u3002", 72),
        ("so $x = 72$.", 72),
        ("\\(72\\)", 72),
        ("7, 8", 8),
        ("It is 73. No: 72", 72),
        ("Answer: 72", 72),
        ("72km/h", 72),
        ("so <answer>72</answer>", 72),
        ("$$x = 72$$", 72),
        ("**Answer:** 72", 72),
        # after a mark
        ("some 5\n#### 72", 72),
        ("####72 clips", 72),
        ("#### The final answer is 72.", 72),
        ("#### -3", -3),
        ("#### 71\nNo.\n#### 72", 72),  # the last mark counts
        ("\\boxed{72} #### 73", 73),
        ("#### 73 \\boxed{72}, of 9", 72),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{2\\frac{1}{2}}", Fraction(5, 2)),
        ("\\boxed{1{,}000}", 1000),
        ("\\boxed{10\\,000}", 10000),
        ("\\boxed{\\$10}", 10),
        ("\\boxed{10\\%}", 10),
        ("\\boxed{5 \\text{ dollars}}", 5),
        ("\\boxed{x = 5}", 5),
        ("\\boxed{-\\frac{1}{2}}", Fraction(-1, 2)),
        ("\\boxed{-\\frac12}", Fraction(-1, 2)),
        ("\\boxed{10,\\!000}", 10000),
        ("\\boxed{72^\\circ}", 72),
        ("\\boxed{72\\text{ cm}^2}", 72),
        ("#### 20 m\u00b2", 20),
        ("-\u00bd", Fraction(-1, 2)),
        ("\\boxed{1.5 \\times 10^{3}}", 1500),
    ],
)
def test_a_number_is_read_as_people_write_it(text: str, value: int | Fraction) -> None:
    assert answer_in(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number here",
        "B12 and COVID-19",
        "1,23",
        "3.14.15",
        "at 12:30",
        "3-4 apples",
        "10\u20135",
        "10 - 5",
        "- 5",  # a list's dash or a minus?
        "on 1/2/2023",
        "1/0",
        "10^3",
        "10\u00b2",
        "2**3",
        "7 * 8",
        "7 x 8",
        "7 \u00d7 8",
        "72 + x",
        "3(4)",
        "3\\pi",
        "$5k",
        "5x",
        "2 and a half",
        "--5",
        "1e999999999",  # would take all memory as an integer
        "9" * 5000,
        # a mark without one number is no answer, whatever else the text says
        "it is 72\n####",
        "it is 72\n#### unknown",
        "#### 72 or 73",
        "#### 72-73",
        "#### 48+24 = 72",
        "#### Step 72: and 5",
        "####\n72",
        "it is 72: \\boxed{}",
        "it is \\boxed{72",
        "\\boxed{5 \\text{ or } 6}",
        "\\boxed{2\\sqrt{3}}",
        "\\boxed{3\\pi}",
        "\\boxed{10^3}",
    ],
)
def test_where_there_is_doubt_nothing_is_guessed(text: str) -> None:
    assert answer_in(text) is None


PIECES = [
    *"0123456789.,-+/*^xe$%()[]{}\\ \n=:#akm",
    "\\boxed{",
    "\\frac{",
    "####",
    " million",
    " or ",
    "10^",
    "\u00bd",
    "\u00b2",
]


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.booleans())
def test_no_text_breaks_the_reader(text: str, finished: bool) -> None:
    assert isinstance(answer_in(text, finished=finished), Fraction | None)


@given(
    st.integers(-(10**9), 10**9),
    st.integers(0, 10**4),
    st.sampled_from(["#### {}", "\\boxed{{{}}}", "It is {}.", "5 and {}"]),
)
def test_every_written_number_is_read_back(whole: int, part: int, frame: str) -> None:
    """Written by Python: with and without grouping, with decimals, as a fraction in lowest terms."""
    value = Fraction(f"{whole}.{part:04}")
    for text in (f"{whole}.{part:04}", f"{whole:,}.{part:04}", f"${whole:,}.{part:04}", f"{whole}.{part:04}%"):
        assert answer_in(frame.format(text)) == value
    assert answer_in(frame.format(f"{whole:,}")) == whole
    if value.denominator > 1:
        assert answer_in(frame.format(value)) == value


def test_a_number_at_the_end_of_a_response_that_was_cut_off_is_none() -> None:
    """The policy may have been about to write 720."""
    for text in ("it is 72", "#### 72", "it is 72.", "#### 7,"):
        assert answer_in(text, finished=False) is None
    assert answer_in("#### 72\nThat is", finished=False) == 72
    assert answer_in("it is 72 clips", finished=False) == 72
    assert answer_in("\\boxed{72}", finished=False) == 72


def test_marked_wants_a_mark_and_tolerance_is_exact() -> None:
    marked = NumberCheck(marked=True)
    assert marked.judge(said("it is 72", "#### 72"), [72, 72]) == [0, 1]
    near = NumberCheck(tolerance=0.1)  # 0.1 as written, not as the nearest float
    assert near.judge(said("0.3", "0.30001", "1/3"), [Fraction("0.2"), Fraction("0.2"), Fraction("0.25")]) == [1, 0, 1]
    assert NumberCheck().judge(said("0.3333"), [Fraction(1, 3)]) == [0]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (72, 72),
        (0.1, Fraction(1, 10)),
        ("1,000", 1000),
        ("48/2 = 24\n#### 24", 24),
        ("\\boxed{3/4}", Fraction(3, 4)),
        ("$5", 5),
    ],
)
def test_what_is_right_may_be_a_number_or_a_text(value: object, read: int | Fraction) -> None:
    assert NumberCheck().read(value) == read


@pytest.mark.parametrize("value", ["5 or 6", "none", "", True, [5], float("nan"), "48+24 = 72"])
def test_what_says_no_number_cannot_be_right(value: object) -> None:
    with pytest.raises(ValueError, match="no single number"):
        NumberCheck().read(value)


def corrupted(answer: str, value: Fraction, rng: random.Random) -> dict[str, str]:
    """Wrong answers that look like the right one."""
    digits = answer.replace(",", "")
    wrong = {
        "off by one": str(value + 1) if value.denominator == 1 else str(float(value + 1)),
        "one less": str(value - 1) if value.denominator == 1 else str(float(value - 1)),
        "missing": "",
        "words": "unknown",
        "last digit missing": digits[:-1],
        "two answers": f"{digits} or {value + 1}",
        "range": f"{digits}-{value + 1}",
        "expression": f"{digits}+1",
        "thousands": f"{digits}k",
    }
    if value:
        wrong |= {"sign": str(-value) if digits.isdigit() else f"-{digits}", "ten times": str(value * 10)}
    places = [i for i in range(len(digits) - 1) if digits.isdigit() and digits[i] != digits[i + 1]]
    if places:
        i = rng.choice(places)
        wrong["digits swapped"] = digits[:i] + digits[i + 1] + digits[i] + digits[i + 2 :]
    return wrong


@pytest.mark.shared_data
def test_gsm8k_solutions_are_right_and_their_corruptions_wrong(shared_data) -> None:
    """Every tenth problem; the right number stands in each wrong response too, before the wrong answer."""
    with gzip.open(shared_data / "verifiable" / "gsm8k.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][::10]
    rng, check, unmarked = random.Random(0), NumberCheck(), 0
    for row in rows:
        solution, answer = row["solution"], row["answer"]
        right = check.read(answer)
        for text in (
            f"{solution}\n#### {answer}",
            f"{solution} \\boxed{{{answer}}}",
            f"{solution}\nSo it is {answer}.",
        ):
            assert answer_in(text) == right, text
        unmarked += answer_in(solution) == right
        for name, wrong in corrupted(answer, right, rng).items():
            for text in (f"{solution} It is {answer}.\n#### {wrong}", f"{answer}! {solution} \\boxed{{{wrong}}}"):
                assert answer_in(text) != right, f"{name}: {text}"
    assert len(rows) == 748
    assert unmarked / len(rows) > 0.95  # the last number of a solution is not always its answer


# -- forms ---------------------------------------------------------------------------------------------------------------


def test_a_regular_expression_is_searched_or_matches_the_whole() -> None:
    assert RegexCheck(r"^Answer: \d+$").judge(said("Answer: 5", "The Answer: 5", " Answer: 5"), [None] * 3) == [1, 0, 0]
    assert RegexCheck(r"\d+", match="whole").judge(said(" 55\n", "55 x"), [None] * 2) == [1, 0]
    with pytest.raises(ConfigError, match="no regular expression"):
        RegexCheck("(")
    with pytest.raises(ConfigError, match="Give one"):
        RegexCheck()


def test_an_expression_that_never_ends_is_an_error_with_its_sample(monkeypatch) -> None:
    from palate.models.rewards import formats

    monkeypatch.setattr(formats, "SECONDS", 0.2)
    with pytest.raises(ModelError, match=r"takes more than 0.2 s(?s:.*)aaaaaaaa"):
        RegexCheck(r"^(a|aa)+$").judge(said("a" * 60 + "b"), [None])


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"name": "a", "age": 3}', True),
        (' {"age": 3, "name": "a", "more": null}\n', True),
        ('{"name": "a"}', False),
        ('{"name": "a", "age": "3"}', False),
        ('{"name": "a", "age": 3.5}', False),
        ('{"name": "a", "age": true}', False),  # Python's True is an int; JSON's true is not
        ('{"name": "a", "age": 3} and more', False),
        ('```json\n{"name": "a", "age": 3}\n```', False),
        ('{"name": "a", "age": 3, "age": 3}', False),
        ('{"name": "a", "age": NaN}', False),
        ('[{"name": "a", "age": 3}]', False),
        ("{'name': 'a', 'age': 3}", False),
        ("", False),
        ("[" * 100_000, False),
        ('{"name": "a", "age": ' + "9" * 5000 + "}", False),
    ],
)
def test_json_has_the_names_and_types_that_were_asked_for(text: str, fits: bool) -> None:
    assert JsonCheck({"name": "string", "age": "integer"}).judge(said(text), [None]) == [float(fits)]


def test_json_of_any_shape_names_alone_and_in_a_block() -> None:
    assert JsonCheck().judge(said("[1, 2]", '"a"', "NaN", "a"), [None] * 4) == [1, 1, 0, 0]
    assert JsonCheck(["a"]).judge(said('{"a": null}', '{"b": 1}'), [None] * 2) == [1, 0]
    fenced = JsonCheck(["a"], fenced=True)
    block = '```json\n{"a": 1}\n```'
    assert fenced.judge(said(f"Here:\n{block}\nDone.", block + "\n" + block, '{"a": 1}'), [None] * 3) == [1, 0, 0]
    with pytest.raises(ConfigError, match='"a" has type .int.*Did you mean'):
        JsonCheck({"a": "int"})


def test_blocks_are_closed_or_none() -> None:
    assert fenced_blocks("a\n```python\nx\ny\n```\nb\n```\nz") == ["x\ny"]
    assert code_in("x = 1") == "x = 1" and code_in("  ") is None
    assert code_in("```\na\n```\nthen\n```python\nb\n```") == "b"
    assert code_in("```python\nunfinished") is None
    assert code_in("```\na\n```\n```python\nunfinished") is None


# -- code ----------------------------------------------------------------------------------------------------------------

needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")


@needs_posix
def test_code_is_judged_by_its_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add('a', 'b') == 'ab'"]
    assert run_tests(ADD, tests)[:3] == (3, 3, "")
    minus = run_tests(ADD.replace("+", "-"), tests)
    assert minus[:2] == (1, 3) and minus.problem.startswith("test 1: AssertionError")
    assert run_tests("def add(:", tests).problem.startswith("the code: SyntaxError")
    responses = said(f"```python\n{ADD}```", f"```python\n{ADD.replace('+', '-')}```", "I cannot.")
    assert CodeCheck().judge(responses, [tests] * 3) == [1, 0, 0]
    assert CodeCheck(give="share").judge(responses, [tests] * 3) == pytest.approx([1, 1 / 3, 0])


@needs_posix
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "while True: print('x' * 10_000)",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "x = [0] * 10**9",
        "x = input()",
        "f = open('f', 'wb')\nwhile True: f.write(b'x' * 2**20)",
        "import os\nfor i in range(3, 12):\n    try:\n        while True: os.write(i, b'x' * 10_000)\n    except OSError: pass",
        "import ctypes; ctypes.string_at(0)",
    ],
    ids=["loop", "sleep", "output", "exit", "_exit", "memory", "input", "file", "pipes", "crash"],
)
def test_an_accident_fails_its_tests_in_bounded_time(code: str) -> None:
    start = time.monotonic()
    tested = run_tests(code, ["assert True"], timeout=1)
    assert tested.passed == 0 and tested.problem
    assert time.monotonic() - start < programs.START + programs.SLACK + 10


@needs_posix
def test_memory_files_and_processor_time_have_limits_of_their_own() -> None:
    """Not only the clock: a loop on a busy machine, and 700 MiB where there is room for them, are stopped too."""
    much = run_tests("x = bytearray(700 << 20)", ["assert True"], memory=512)
    assert (
        much.problem.startswith("the code: MemoryError")
        and run_tests("x = bytearray(700 << 20)", ["assert x"], memory=1024).passed
    )
    assert "too large" in run_tests("open('f', 'wb').write(b'x' * (32 << 20))", ["assert True"]).problem
    look = "from resource import *\nseconds, dumps = getrlimit(RLIMIT_CPU), getrlimit(RLIMIT_CORE)"
    assert run_tests(look, ["assert seconds == (7, 7), seconds", "assert dumps[0] == 0"], timeout=7)[:3] == (2, 2, "")


@needs_posix
def test_what_a_program_prints_is_nobodys_business() -> None:
    loud = "import os, sys\nfor _ in range(50):\n    print('x' * 100_000)\n    os.write(2, b'y' * 100_000)\nsys.stdout.close()"
    assert run_tests(loud, ["print('more')", "assert True"])[:2] == (1, 2)  # its own closed output is its own fault
    assert run_tests(loud.rpartition("\n")[0], ["print('more')", "assert True"])[:3] == (2, 2, "")


@needs_posix
def test_what_was_passed_before_the_time_was_over_counts_as_a_share() -> None:
    tested = run_tests(ADD, ["assert add(1, 1) == 2", "while True: pass", "assert True"], timeout=1)
    assert tested[:2] == (1, 3)


@needs_posix
def test_code_sees_no_environment_and_an_empty_folder_that_is_removed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    look = "import os\nnames, files = set(os.environ), os.listdir('.')\nopen('left', 'w').write('x')"
    tests = [
        "assert 'SECRET_TOKEN' not in names, names",
        "assert files == [], files",
        "import sys; assert sys.flags.isolated",
    ]
    assert run_tests(look, tests)[:3] == (3, 3, "")
    assert list(tmp_path.iterdir()) == []


def stays(mark: str) -> bool:
    """Is a process with this argument there, also after two seconds?"""
    if shutil.which("ps") is None:
        pytest.skip("no ps here to look for processes with")
    for _ in range(20):
        if mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout:
            return False
        time.sleep(0.1)
    return True


@needs_posix
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="namespaces are Linux's")
def test_where_the_system_allows_it_there_is_no_network_and_nothing_stays() -> None:
    tested = run_tests("x = 1", ["assert x"])
    if not tested.alone:
        pytest.skip("this system lets no ordinary process have namespaces")
    reach = "import socket\nsocket.create_connection(('127.0.0.1', {}), timeout=2)"
    with __import__("socket").create_server(("127.0.0.1", 0)) as server:
        found = run_tests(reach.format(server.getsockname()[1]), ["assert True"])
    assert found.passed == 0 and "unreachable" in found.problem
    mark = f"86399.{os.getpid()}"
    stay = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)"
    assert run_tests(stay, ["assert True"]).passed == 1
    assert not stays(mark)


@needs_posix
def test_without_namespaces_limits_hold_and_it_is_said_once(tmp_path, monkeypatch) -> None:
    plain = programs.CHILD.read_text().replace(
        "def shut_in() -> bool:", "def shut_in() -> bool:\n    return False\n", 1
    )
    (tmp_path / "child.py").write_text(plain)
    monkeypatch.setattr(programs, "CHILD", tmp_path / "child.py")
    tested = run_tests(ADD, ["assert add(1, 2) == 3"])
    assert tested == (1, 1, "", False)
    mark = f"86398.{os.getpid()}"
    stay = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'])"
    run_tests(stay, ["assert True"])
    assert not stays(mark)  # it is of the same group
    assert run_tests("while True: pass", ["assert True"], timeout=1).passed == 0
    check = CodeCheck()
    with pytest.warns(UserWarning, match="can reach the network"):
        check.judge(said(ADD), [["assert True"]])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check.judge(said(ADD), [["assert True"]])


@needs_posix
def test_a_process_that_does_not_start_is_an_error_and_no_zero(tmp_path, monkeypatch) -> None:
    """Else a broken machine would teach the policy that all code is wrong."""
    (tmp_path / "child.py").write_text("raise SystemExit('no luck today')")
    monkeypatch.setattr(programs, "CHILD", tmp_path / "child.py")
    with pytest.raises(ModelError, match="did not start.*no luck today"):
        run_tests(ADD, ["assert True"])


@pytest.mark.parametrize("value", [[], "", ["a", 3], {"a": 1}, [" "]])
def test_tests_are_texts(value: object) -> None:
    with pytest.raises(ValueError, match="is no test"):
        CodeCheck().read(value)


# -- as rewards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tiny_tokenizer) -> Chat:
    return Chat(tiny_tokenizer, "none")


def test_a_check_reads_its_field_of_each_record(chat) -> None:
    tokens = rows_of(chat, [("48+24? ", "It is 72."), ("48+25? ", "It is 72.")], gold=["72", 73])
    reward = load_reward({"check": "number", "answer": "gold"}, chat)
    scored = reward(tokens)
    assert isinstance(reward, CheckReward) and scored.scores.tolist() == [1, 0] and scored.scores.dtype == torch.float32
    both = load_reward(
        {"right": {"check": "number", "answer": "gold", "weight": 2}, "form": {"check": "regex", "pattern": "It"}}, chat
    )
    scored = both(tokens)
    assert scored.scores.tolist() == [3, 1] and {k: v.tolist() for k, v in scored.parts.items()} == {
        "right": [1, 0],
        "form": [1, 1],
    }


def test_a_record_without_the_field_is_named_with_its_line(chat) -> None:
    tokens = rows_of(chat, [("a ", "1"), ("b ", "2")], answer=["1", None], level=["x", "y"])
    reward = load_reward({"check": "number"}, chat)
    with pytest.raises(DataError, match=r'^p.jsonl:2: reward "number" reads the field "answer".*Found: "level"'):
        reward(tokens)
    with pytest.raises(DataError, match=r"^p.jsonl:2: "):  # before anything is sampled
        check_records(load_reward([{"check": "number"}, {"length": -0.1}], chat), tokens.extras["records"])
    with pytest.raises(DataError, match=r'^p.jsonl:1: .*cannot use the field "level": .x. is no single number'):
        load_reward({"check": "number", "answer": "level"}, chat)(tokens)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"check": "numbr"}, 'check "numbr" is not known.*Did you mean "number"'),
        ({"check": "number", "anser": "x"}, 'unknown key "anser" beside "check: number".*Did you mean "answer"'),
        ({"check": "number", "pattern": "x"}, 'unknown key "pattern"'),
        ({"check": "number", "tolerance": -1}, "tolerance is -1"),
        ({"check": "number", "marked": "yes"}, "marked is 'yes'"),
        ({"check": "regex"}, "Give one"),
        ({"check": "json", "schema": "name"}, "schema is 'name'"),
        ({"check": "code", "timeout": 0}, "timeout is 0; expected a whole number from 1 to 600"),
        ({"check": "code", "memory": 10}, "memory is 10"),
        ({"check": "code", "give": "some"}, 'give "some"'),
        ({"chek": "number", "answer": "x"}, '"chek" is no kind of reward.*Did you mean "check"'),
    ],
)
def test_options_of_checks_are_checked(chat, spec, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(spec, chat)
