"""Rewards that are a service: a real HTTP server on this machine that works, fails, hangs and talks nonsense."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from palate.data.chat import Chat
from palate.errors import ConfigError, DataError, ModelError
from palate.models.rewards import EndpointReward, endpoint, load_reward
from sampled_rows import rows_of

PAIRS = [("the user ", "said"), ("hello ", "there"), ("in the ", "morning hello"), ("and ", "said hello there")]


class Service:
    """What the server does with each request, in order; the last goes on for ever."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.answers: list = []
        self.times: list[float] = []

    def lengths(self, content: dict) -> bytes:
        return json.dumps({"scores": [len(text.split()) for text in content["responses"]]}).encode()


@pytest.fixture
def service(monkeypatch) -> Iterator[Service]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.02)
    service = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["content-length"])))
            service.requests.append(content)
            service.headers.append(dict(self.headers))
            service.times.append(time.monotonic())
            answer = service.answers.pop(0) if len(service.answers) > 1 else service.answers[0]
            if callable(answer):
                answer = answer(self, content)
            if answer is None:
                return
            status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    service.url = f"http://127.0.0.1:{server.server_address[1]}/score"
    service.answers = [lambda handler, content: service.lengths(content)]
    yield service
    server.shutdown()
    server.server_close()


def hang(handler, content) -> None:
    threading.Event().wait(30)


def drip(handler, content) -> None:
    """A header that never ends, a byte at a time: each read succeeds."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
        for _ in range(300):
            handler.wfile.write(b"y")
            handler.wfile.flush()
            time.sleep(0.1)
    except OSError:
        pass


def drop(handler, content) -> None:
    handler.connection.close()


@pytest.fixture
def chat(tiny_tokenizer) -> Chat:
    return Chat(tiny_tokenizer, "none")


@pytest.fixture
def tokens(chat):
    return rows_of(chat, PAIRS, answer=["1", None, "3", "4"])


def test_texts_and_fields_go_there_and_scores_come_back_in_order(service, chat, tokens) -> None:
    scored = load_reward({"url": service.url, "batch": 3}, chat)(tokens)
    assert scored.scores.tolist() == [1, 1, 2, 3]
    assert service.requests == [
        {
            "prompts": [p for p, _ in PAIRS[:3]],
            "responses": [r for _, r in PAIRS[:3]],
            "fields": {"answer": ["1", None, "3"]},
        },
        {"prompts": [PAIRS[3][0]], "responses": [PAIRS[3][1]], "fields": {"answer": ["4"]}},
    ]
    assert load_reward(service.url, chat)(tokens).scores.tolist() == [1, 1, 2, 3]  # an address alone


def test_a_notebooks_own_loop_is_left_alone(service, chat, tokens) -> None:
    async def cell() -> list:
        return EndpointReward(service.url, chat)(tokens).scores.tolist()

    assert asyncio.run(cell()) == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "fault", [(503, {}, b"busy"), (500, {}, b""), (429, {}, b"slowly"), drop], ids=["503", "500", "429", "drop"]
)
def test_what_passes_is_tried_again_and_said_each_time(service, chat, tokens, fault) -> None:
    service.answers[:0] = [fault, fault]
    with pytest.warns(UserWarning, match="attempt . of 4 in 0.0") as said:
        assert EndpointReward(service.url, chat)(tokens).scores.tolist() == [1, 1, 2, 3]
    assert len(said) == 2 and len(service.requests) == 3
    assert service.times[2] - service.times[1] >= 2 * 0.02  # the second wait is twice the first


def test_the_same_trouble_is_said_every_time() -> None:
    """Python shows a warning of the same text and place once; a run that waits must not look like one that hangs."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            endpoint._say("busy")
    assert len(said) == 3


def test_no_connection_is_tried_again_and_then_an_error_with_a_sample(service, chat, tokens) -> None:
    with __import__("socket").create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with (
        pytest.warns(UserWarning, match="ConnectError"),
        pytest.raises(ModelError, match="in 3 attempts: ConnectError") as error,
    ):
        EndpointReward(url, chat, retries=2)(tokens)
    assert "p.jsonl:1" in str(error.value) and "'the user '" in str(error.value) and "'said'" in str(error.value)


def test_retry_after_is_honoured_as_seconds_and_as_a_date(service, chat, tokens) -> None:
    from email.utils import formatdate

    service.answers[:0] = [(429, {"retry-after": "1"}, b"")]
    with pytest.warns(UserWarning, match="in 1 s"):
        EndpointReward(service.url, chat)(tokens)
    assert service.times[1] - service.times[0] >= 1
    service.answers[:0] = [lambda h, c: (503, {"retry-after": formatdate(time.time() + 2, usegmt=True)}, b"")]
    with pytest.warns(UserWarning):
        EndpointReward(service.url, chat)(tokens)
    assert service.times[-1] - service.times[-2] > 0.9  # dates have whole seconds


def test_a_wait_beyond_the_total_is_not_begun(service, chat, tokens) -> None:
    service.answers = [(503, {"retry-after": "3600"}, b"")]
    start = time.monotonic()
    with pytest.raises(ModelError, match="3.6e.03 s would be beyond the total of 300 s"):
        EndpointReward(service.url, chat)(tokens)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("silence", [hang, drip])
def test_silence_ends_in_an_error_within_the_time_that_was_given(service, chat, tokens, silence) -> None:
    service.answers = [silence]
    start = time.monotonic()
    with (
        pytest.warns(UserWarning, match="no answer within 0.3 s"),
        pytest.raises(ModelError, match="in 2 attempts: no answer within"),
    ):
        EndpointReward(service.url, chat, timeout=0.3, retries=1)(tokens)
    assert time.monotonic() - start < 20


def test_the_total_cuts_an_attempt_short(service, chat, tokens) -> None:
    service.answers = [hang]
    start = time.monotonic()
    with pytest.raises(ModelError, match="no answer within 0.4 s"):
        EndpointReward(service.url, chat, timeout=30, total=0.4)(tokens)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302])
def test_a_refusal_is_not_tried_again(service, chat, tokens, status) -> None:
    service.answers = [(status, {}, b"no such model: gpt9")]
    with pytest.raises(ModelError, match=f"refused: status {status}: 'no such model: gpt9'") as error:
        EndpointReward(service.url, chat)(tokens)
    assert len(service.requests) == 1 and "p.jsonl:1" in str(error.value)


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        (b"<html>hello</html>", "no JSON: '<html>hello", 1),
        (b"\xff\xfe", "no JSON", 1),
        (b"[1, 2, 3, 4]", 'without a list "scores"', 1),
        (b'{"score": [1, 2, 3, 4]}', 'without a list "scores"', 1),
        (b'{"scores": 3}', 'without a list "scores"', 1),
        (b'{"scores": [1, 2]}', "2 scores for 4 responses; one for each", 1),
        (b'{"scores": [1, 2, 3, 4, 5]}', "5 scores for 4 responses", 1),
        (b'{"scores": [1, 2, "3", 4]}', "the score '3'; a number", 3),
        (b'{"scores": [1, null, 3, 4]}', "the score None; a number", 2),
        (b'{"scores": [1, 2, NaN, 4]}', r"gave nan \(1 of 4", 3),
        (b'{"scores": [1, 2, 3, -Infinity]}', "gave -inf", 4),
        (b'{"scores": [1, 1e999, 3, 4]}', "gave inf", 2),
        (b'{"scores": [1, 2, 1' + b"0" * 400 + b", 4]}", "gave inf", 3),
        (b'{"scores": [1, 2, 1e300, 4]}', "gave inf", 3),
    ],
)
def test_an_answer_that_is_no_scores_is_shown_with_its_sample(service, chat, tokens, body, message, line) -> None:
    service.answers = [body]
    with pytest.raises(ModelError, match=message) as error:
        EndpointReward(service.url, chat, name="judge")(tokens)
    assert 'reward "judge"' in str(error.value) and f"p.jsonl:{line}" in str(error.value)
    assert len(service.requests) == 1


def test_an_answer_that_cannot_be_unpacked_is_tried_again_and_then_an_error(service, chat, tokens) -> None:
    service.answers = [(200, {"content-encoding": "gzip"}, b"no gzip at all")]
    with (
        pytest.warns(UserWarning, match="DecodingError"),
        pytest.raises(ModelError, match="in 2 attempts: DecodingError"),
    ):
        EndpointReward(service.url, chat, retries=1)(tokens)


def test_a_token_comes_from_the_environment_and_is_never_written(service, chat, tokens, monkeypatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    EndpointReward(service.url, chat, token_from="JUDGE_TOKEN")(tokens)
    assert {k.lower(): v for k, v in service.headers[0].items()}["authorization"] == "Bearer s3cret"
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(ConfigError, match="JUDGE_TOKEN .token_from. is not set"):
        EndpointReward(service.url, chat, token_from="JUDGE_TOKEN")


def test_fields_that_are_no_json_are_the_records_fault(service, chat) -> None:
    with pytest.raises(DataError, match="^p.jsonl:1: .*as JSON"):
        EndpointReward(service.url, chat)(rows_of(chat, PAIRS[:1], picture=[b"\x00"]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"url": "ftp://x/y"}, "no http or https address"),
        ({"url": "http://"}, "no http or https address"),
        ({"url": "http://host:99999/"}, "no http or https address"),
        ({"url": "http://me:pass@host/"}, "token_from"),
        ({"url": "http://host/", "timeout": 0}, "timeout is 0; expected seconds above 0"),
        ({"url": "http://host/", "retries": -1}, "retries is -1"),
        ({"url": "http://host/", "batch": 0}, "batch is 0"),
        ({"url": "http://host/", "total": "long"}, "total is 'long'"),
        ({"url": "http://host/", "time": 3}, 'unknown key "time" beside "url".*Did you mean "timeout"'),
    ],
)
def test_options_of_a_service_are_checked(chat, spec, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(spec, chat)
