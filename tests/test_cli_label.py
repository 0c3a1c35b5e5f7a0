"""``palate label`` at the keyboard: from responses to records for training, and what is said when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import sqlite3

import pytest
from typer.testing import CliRunner

from feedback_stores import answer_all, prefer_good
from palate.cli import app
from palate.data.records import read_records
from palate.feedback import people
from palate.feedback.store import Store


def label(*words: object, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``; its messages are added when it fails."""
    done = CliRunner().invoke(app, ["label", *map(str, words)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output if code else done.stdout


@pytest.fixture
def responses(tmp_path):
    """Two responses to each of four prompts, as the sample stage of a pipeline writes them."""
    path = tmp_path / "responses.jsonl"
    lines = [{"prompt": f"prompt {i}", "responses": [f"good {i}", f"bad {i}"]} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_from_responses_to_records_for_training(tmp_path, responses) -> None:
    db, out = tmp_path / "feedback.db", tmp_path / "comparisons.jsonl"
    label("import", db, responses, "--task", "compare")
    label("import", db, responses)  # again: nothing new
    added = json.loads(label("annotators", "add", db, "anna", "--json"))
    assert added["link"] == f"http://127.0.0.1:8765/login#{added['token']}"
    with Store.open(db) as store:
        answer_all(store, added["pseudonym"], prefer_good)
    found = json.loads(label("status", db, "--json"))
    assert (found["items"], found["done"], found["complete"]) == (4, 4, 4)
    assert "4 of 4 answers" in label("status", db)
    label("export", db, "--as", "comparisons", "--margins", "0.33,0.67,1", "-o", out)
    assert {(r.chosen[:4], r.margin, r.annotator) for r in read_records(out, "comparisons")} == {
        ("good", 0.67, added["pseudonym"])
    }
    assert len(label("export", db, "--as", "rankings").splitlines()) == 4
    assert "intact" in label("verify", db)
    unknown = label("export", db, "--as", "dpo", code=2)
    assert "comparisons" in unknown and "preference" in unknown and "argilla" in unknown


def test_a_store_that_another_process_holds_is_said_to_be_held(tmp_path, responses, monkeypatch) -> None:
    """Writing waits for another writer; reading as well where that one lets nobody in."""
    monkeypatch.setattr("palate.feedback.store.PATIENCE", 0.05)
    db = tmp_path / "feedback.db"
    label("import", db, responses, "--task", "compare")
    other = sqlite3.connect(db, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    said = label("annotators", "add", db, "anna", code=1)
    assert "another process kept the store locked for 0.05 s" in said and "Traceback" not in said
    assert "0 of 4 answers" in label("status", db)
    other.execute("COMMIT")
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    said = label("status", db, code=1)
    assert f"{db}: another process kept the store locked" in said and "not a store" not in said
    other.close()
    assert "0 of 4 answers" in label("status", db)


@pytest.mark.parametrize(("command", "sql"), [("label", "SELECT nothing"), ("methods", "BEGIN IMMEDIATE")])
def test_a_bug_in_sql_and_another_s_database_are_not_told_as_the_store(tmp_path, monkeypatch, command, sql) -> None:
    held = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    held.execute("BEGIN IMMEDIATE")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None, timeout=0)
    monkeypatch.setattr("palate.feedback.upkeep.status", lambda _: other.execute(sql))
    monkeypatch.setattr("palate.lookup.method_names", lambda: other.execute(sql))
    label("init", tmp_path / "feedback.db")
    words = ["label", "status", str(tmp_path / "feedback.db")] if command == "label" else [command]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, sqlite3.OperationalError) and "the store of feedback" not in done.output


def test_backup_verify_and_merge(tmp_path, responses) -> None:
    db, copy = tmp_path / "feedback.db", tmp_path / "copy.db"
    label("import", db, responses, "--task", "compare")
    noted = json.loads(label("verify", db, "--json"))["last_hash"]
    label("backup", db, copy)
    with Store.open(copy) as store:
        answer_all(store, people.add_person(store, "ben").pseudonym)
    label("merge", db, copy)
    assert json.loads(label("status", db, "--json"))["done"] == 4
    label("verify", db, "--after", noted)
    assert "cut off" in label("verify", db, "--after", "f" * 64, code=1)
    assert "exists already" in label("backup", db, copy, code=1)


def test_people(tmp_path, responses) -> None:
    db = tmp_path / "feedback.db"
    label("import", db, responses)
    label("annotators", "add", db, "anna", "--role", "admin")
    assert "anna" in label("annotators", "list", db) and "taken" not in label("annotators", "list", db)
    label("annotators", "role", db, "anna", "adjudicator")
    label("annotators", "deactivate", db, "anna")
    assert "may not log in" in label("annotators", "link", db, "anna", code=1)
    label("annotators", "activate", db, "anna")
    assert label("annotators", "link", db, "anna", "--url", "https://x.example").startswith("https://x.example/login#")
    label("annotators", "forget", db, "anna")
    assert "anna" not in label("annotators", "list", db)
    assert "already" in label(
        "annotators", "add", db, json.loads(label("annotators", "list", db, "--json"))[0]["name"], code=1
    )


def test_every_template_makes_a_store_and_can_be_printed(tmp_path) -> None:
    names = [line.split()[0] for line in label("templates").splitlines()]
    assert set(names) == {"compare", "instructgpt", "rank", "rewrite", "spans", "thumbs"}
    for name in names:
        path = tmp_path / f"{name}.yaml"
        path.write_text(label("templates", name))
        label("init", tmp_path / f"{name}.db", "--task", path)
        with Store.open(tmp_path / f"{name}.db") as store:
            assert store.task.title


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status", "none.db"], 1, "no such store"),
        (["status", "odd.jsonl"], 1, "odd.jsonl: not a store of feedback"),
        (["serve", "none.db"], 1, "no such store"),
        (["init", "a.db", "--task", "nothing"], 2, "no task template"),
        (["init", "a.db", "--task", "wrong.yaml"], 2, "wrong.yaml:1: questions.0.scale"),
        (["import", "a.db", "none.jsonl"], 1, "no such file"),
        (["import", "a.db", "odd.jsonl"], 1, "odd.jsonl:1"),
        (["export", "made.db", "--as", "poems"], 2, "comparisons, rankings"),
        (["export", "made.db", "--as", "demonstrations"], 2, "It asks"),
        (["export", "made.db", "--as", "comparisons", "--margins", "1,x"], 2, "expected numbers"),
        (["export", "made.db", "--as", "comparisons", "--margins", "1"], 2, "expected 3 of them"),
        (["annotators", "add", "made.db", "x", "--role", "king"], 1, "Roles"),
        (["serve", "made.db", "--host", "192.0.2.1"], 2, "nobody has a login token"),
        (["serve", "made.db", "--host", "0.0.0.0"], 2, "nobody has a login token"),
        (["serve", "made.db", "--host", "no.such.name.invalid"], 2, "has no address"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path, monkeypatch, words, code: int, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("questions:\n  - {id: a, type: rating, scale: 99}\n")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    label("init", "made.db", "--task", "compare")
    assert said in label(*words, code=code)


def test_an_empty_import_leaves_no_store(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.jsonl").write_text('{"prompt": "p", "answer": "x"}\n')
    label("import", "a.db", "odd.jsonl", code=1)
    assert not (tmp_path / "a.db").exists()


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "nh3", "markdown_it", "PIL"])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, package: str) -> None:
    label("init", tmp_path / "a.db")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    said = label("serve", tmp_path / "a.db", code=2)
    assert package in said and "pip install 'palate[label]'" in said


def test_the_store_works_without_the_server_s_packages() -> None:
    """feedback/ imports none of them: only server/ and the serve command do."""
    import subprocess
    import sys

    program = (
        "import sys; sys.modules.update(dict.fromkeys(['fastapi', 'uvicorn', 'nh3', 'markdown_it', 'PIL', 'httpx2', 'torch']))\n"
        "import palate.cli.label, palate.feedback.export, palate.feedback.queue, palate.feedback.people, palate.feedback.summary"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_server_s_socket_is_one_that_asyncio_sends_from_at_once() -> None:
    """asyncio sets TCP_NODELAY where a socket's protocol is named; without it each answer took 40 ms more."""
    import socket

    from palate.cli.label.serving import listen

    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_who_follows_the_printed_link_at_once_is_not_turned_away() -> None:
    """The link is printed before the server is ready: until then the socket itself takes the connection."""
    import socket

    from palate.cli.label.serving import listen

    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5) as client:
        assert client.getpeername() == listening.getsockname()


def test_pictures_are_taken_in_with_the_records_that_name_them(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures").mkdir()
    image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    records = tmp_path / "records.jsonl"
    line = {"prompt": "What is it?", "responses": ["a cat", "a dog"], "images": ["a.png"]}
    records.write_text(json.dumps(line) + "\n")
    db = tmp_path / "feedback.db"
    assert "no such picture" in label("import", db, records, "--task", "compare", code=1)  # not beside the records
    label("import", db, records, "--images", tmp_path / "pictures")
    with Store.open(db) as store, store.read() as tx:
        (kept,) = tx.all("SELECT hash, type FROM image")
        assert json.loads(tx.one("SELECT images FROM item")[0]) == [kept[0]] and kept[1] == "image/png"
    records.write_text(json.dumps({**line, "prompt": "And now?", "images": ["../../feedback.db"]}) + "\n")
    assert "outside" in label("import", db, records, "--images", tmp_path / "pictures", code=1)
