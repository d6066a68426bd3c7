"""Rewards over HTTP, with real servers on this machine that fail in every way; never a score."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from reward_models import (
    HTTPRewardError,
    HTTPRewardModel,
    LengthReward,
    http_reward,
    http_server,
    reward_server,
)

TEXTS = {"prompts": ["a", "b", "c"], "completions": [" one", " two three", ""]}
SCORES = b'{"scores": [1, 2.5, -3]}'


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No proxy, and waits are written down instead of waited for."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found: list[float] = []
    monkeypatch.setattr(http_reward, "time", FakeTime(found))
    return found


class FakeTime:
    monotonic = staticmethod(time.monotonic)

    def __init__(self, waits: list[float]) -> None:
        self.sleep = waits.append


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(*answers: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[tuple[str, list]]:
    """A server that gives these answers in turn, the last one for ever; and what it was sent."""
    requests: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((json.loads(body), self.headers))
            answers[min(len(requests), len(answers)) - 1](self)

        def log_message(self, *_: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, requests


def answer(body: bytes, status: int = 200, **headers: str) -> Callable:
    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return give


def hang(seconds: float) -> Callable:
    return lambda handler: time.sleep(seconds)


def drip(head: bytes) -> Callable:
    """Then a byte at a time, each well within the timeout, and never all of them."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 " + head)
        for _ in range(30):
            try:
                handler.wfile.write(b" ")
            except OSError:
                return
            time.sleep(0.1)

    return give


DRIPS = {
    "silent": hang(1.0),
    "body": drip(b"200 OK\r\nContent-Length: 1000\r\n\r\n"),
    "body of no length": drip(b'200 OK\r\n\r\n{"scores": [1, 2, 3]}'),
    "headers": drip(b"200 OK\r\nX-Slow: "),
    "refusal": drip(b"503 Busy\r\nContent-Length: 1000\r\n\r\nbusy"),
}


def cut(handler: BaseHTTPRequestHandler) -> None:
    """Fewer bytes than announced."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(SCORES)


def test_scores_come_back_in_order_batched_with_columns_and_headers() -> None:
    reward_fn = LengthReward(low=1, high=2)
    with running(reward_server(reward_fn, port=0, token="secret")) as url:
        headers = {"Authorization": "Bearer secret"}
        model = HTTPRewardModel(url, batch_size=2, headers=headers)
        scores = model(**TEXTS, reference=["x", "y", "z"])
        np.testing.assert_array_equal(scores, reward_fn(**TEXTS))
        assert model(prompts=[], completions=[]).shape == (0,)
        for wrong in ({}, {"Authorization": "Bearer no"}):
            with pytest.raises(HTTPRewardError, match=r"HTTP 401 .*expected the token"):
                HTTPRewardModel(url, headers=wrong)(**TEXTS)
    with answering(answer(b'{"scores": [1, 2]}'), answer(b'{"scores": [3]}')) as (url, requests):
        scores = HTTPRewardModel(url, batch_size=2)(**TEXTS, reference=["\ud800", None, {"k": 1}])
        assert scores.tolist() == [1, 2, 3]
    first, second = (body for body, _ in requests)
    assert first["prompts"] == ["a", "b"] and first["reference"] == ["\ud800", None]
    assert second == {"prompts": ["c"], "completions": [""], "reference": [{"k": 1}]}


def test_two_times_500_and_then_scores(waits: list[float]) -> None:
    with answering(answer(b"", 500), answer(b"", 503), answer(SCORES)) as (url, requests):
        assert HTTPRewardModel(url, backoff=1.0)(**TEXTS).tolist() == [1, 2.5, -3]
    assert len(requests) == 3
    assert 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2


def test_a_server_that_says_when_to_ask_again_is_obeyed_up_to_a_minute(waits: list[float]) -> None:
    busy = [answer(b"", 429, Retry_After=after) for after in ("7", "99999")]
    with answering(*busy, answer(SCORES)) as (url, _):
        HTTPRewardModel(url)(**TEXTS)
    assert waits == [7, 60]


def test_a_server_that_is_down_is_asked_five_times(waits: list[float]) -> None:
    with running(reward_server(LengthReward(high=2), port=0)) as url:
        pass
    with pytest.raises(HTTPRewardError, match=r"^http://127.*refused.* after 5 attempts") as raised:
        HTTPRewardModel(url)(**TEXTS)
    assert len(waits) == 4 and isinstance(raised.value.__cause__, OSError)


@pytest.mark.parametrize("slow", DRIPS.values(), ids=DRIPS)
def test_a_slow_server_is_given_up_on(slow: Callable) -> None:
    start = time.monotonic()
    with (
        answering(slow) as (url, requests),
        pytest.raises(HTTPRewardError, match=r"timed out|within 0\.3 s|HTTP 503 Busy, 'busy"),
    ):
        try:
            HTTPRewardModel(url, timeout=0.3, retries=1)(**TEXTS)
        finally:
            seconds = time.monotonic() - start
    assert len(requests) == 2 and seconds < 2.5


def test_an_answer_cut_short_is_asked_for_again() -> None:
    with answering(cut, answer(SCORES)) as (url, requests):
        assert len(HTTPRewardModel(url)(**TEXTS)) == 3
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"scores": [1, 2]}', r"expected 3 scores, one per completion, got shape \(2,\)"),
        (b'{"scores": [1, 2, 3, 4]}', "expected 3 scores"),
        (b'{"scores": [1, NaN, 3]}', "expected a finite score, got nan"),
        (b'{"scores": [1, 1e999, 3]}', "expected a finite score, got inf"),
        (b'{"scores": [1, 1' + b"0" * 400 + b", 3]}", "expected numbers"),
        (b'{"scores": ["1", "2", "3"]}', "expected numbers"),
        (b'{"scores": [1, null, 3]}', "expected numbers"),
        (b'{"scores": [1, [2], 3]}', "inhomogeneous|expected numbers"),
        (b'{"scores": [true, 2, 3]}', "got true or false"),
        (b'{"scores": "123"}', "expected {"),
        (b"[1, 2, 3]", "expected {"),
        (b"[" * 100_000, "recursion"),
        (b"<html><h1>It works!</h1>", "Expecting value.*it answered '<html><h1>It works"),
        (b"\xff\xfe\x00garbled", "it answered"),
        (b"", "it answered ''"),
    ],
)
def test_an_answer_that_holds_no_scores_is_an_error_at_once(body: bytes, message: str) -> None:
    with (
        answering(answer(body)) as (url, requests),
        pytest.raises(HTTPRewardError, match=message) as raised,
    ):
        HTTPRewardModel(url)(**TEXTS)
    assert len(requests) == 1
    assert str(raised.value).startswith(url) and "it answered" in str(raised.value)


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusal_is_not_repeated(status: int) -> None:
    with (
        answering(answer(b"no such model", status)) as (url, requests),
        pytest.raises(HTTPRewardError, match=f"HTTP {status} .*'no such model'"),
    ):
        HTTPRewardModel(url)(**TEXTS)
    assert len(requests) == 1


@pytest.mark.parametrize("place", ["file:///etc/passwd", "http://169.254.169.254/", "/elsewhere"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused(status: int, place: str) -> None:
    with (
        answering(answer(b"", status, Location=place)) as (url, requests),
        pytest.raises(HTTPRewardError, match=f"a redirect to '{place}', which is not"),
    ):
        HTTPRewardModel(url)(**TEXTS)
    assert len(requests) == 1


def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_reward, "LONGEST_ANSWER", 1000)
    with (
        answering(answer(b" " * 5000)) as (url, _),
        pytest.raises(HTTPRewardError, match="at most 1000 bytes"),
    ):
        HTTPRewardModel(url)(**TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "file:///etc/passwd"}, "http or https url"),
        ({"url": "localhost:8000"}, "http or https url"),
        ({"url": "http://me:secret@host/"}, "without a password"),
        ({"url": "http://h/", "timeout": 0}, "timeout > 0"),
        ({"url": "http://h/", "batch_size": 0}, "batch_size >= 1"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HTTPRewardModel(**arguments)


def test_columns_that_do_not_fit_into_json() -> None:
    with pytest.raises(ValueError, match="columns that fit into JSON"):
        HTTPRewardModel("http://h/")(**TEXTS, picture=[b"", b"", b""])


def test_the_run_s_random_numbers_are_left_alone() -> None:
    import random

    before = random.getstate()
    with answering(answer(b"", 500), answer(SCORES)) as (url, _):
        HTTPRewardModel(url)(**TEXTS)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {}, 400),
        (b'{"prompts": ["a"], "completions": []}', {}, 400),
        (b'{"prompts": [1], "completions": ["a"]}', {}, 400),
        (b"[" * 100_000, {}, 400),
        (b'{"prompts": ["a"], "completions": ["a"]}', {"Content-Type": "text/plain"}, 415),
        (b"x" * 300, {}, 413),
        (b'{"prompts": ["a"], "completions": ["a"], "boom": [1]}', {}, 500),
    ],
)
def test_the_server_refuses(
    body: bytes, headers: dict, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.error
    import urllib.request

    limit = 200 if status == 413 else 2**20
    monkeypatch.setattr(http_server, "LONGEST_REQUEST", limit)

    def reward_fn(prompts: list[str], completions: list[str]) -> list[float]:
        return [0.0] * len(prompts)

    with running(reward_server(reward_fn, port=0)) as url:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=5)
    assert raised.value.code == status
    assert "error" in json.loads(raised.value.read())


@pytest.mark.parametrize(("size", "status"), [(4_000_000, 401), (20_000_000, 413)])
def test_a_refusal_is_heard_by_a_client_that_still_sends(size: int, status: int) -> None:
    """Not a broken pipe, which would be tried again."""
    token = "right" if status == 413 else "wrong"
    headers = {"Authorization": f"Bearer {token}"}
    with running(reward_server(LengthReward(3), port=0, token="right")) as url:
        model = HTTPRewardModel(url, retries=1, headers=headers)
        with pytest.raises(HTTPRewardError, match=f"got HTTP {status} "):
            model(prompts=["a"], completions=["b" * size])


def test_a_client_that_does_not_wait_is_no_failure_of_the_reward(caplog) -> None:
    asked, gone = threading.Event(), threading.Event()

    def reward_fn(prompts: list[str], completions: list[str]) -> list[float]:
        asked.set()
        assert gone.wait(5)
        return [0.0] * len(prompts)

    body = json.dumps({"prompts": ["a"] * 1000, "completions": ["a"] * 1000}).encode()
    head = f"POST / HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    server = reward_server(reward_fn, port=0)
    server.daemon_threads = False  # it waits for them
    with running(server):
        client = socket.create_connection(server.server_address)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        assert asked.wait(5)
        client.close()
        gone.set()
    # train.py, in another test of this process, lets each answer be logged as information
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["127.0.0.1 did not wait for its scores"]
