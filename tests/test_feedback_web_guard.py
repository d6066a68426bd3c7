"""What stands before the pages: hosts, origins, body lengths, attempts, and how text is shown."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
import httpx
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from reward_models.feedback.web.display import language, visible
from reward_models.feedback.web.guard import HEADERS, Guard
from reward_models.feedback.web.throttle import Throttle


async def echo(scope: Any, receive: Any, send: Any) -> None:
    request = Request(scope, receive)
    if request.url.path == "/broken":
        raise RuntimeError("a secret detail")
    body = await request.body()
    await PlainTextResponse(f"{len(body)} bytes")(scope, receive, send)


def refuse(status: int, sentence: str) -> Response:
    return PlainTextResponse(sentence, status_code=status)


def ask(method: str, url: str, any_address: bool = False, **arguments: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        guard = Guard(echo, refuse, any_address=any_address, body_limit=100)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as client:
            return await client.request(method, url, **arguments)

    return asyncio.run(run())


OWN = {"Origin": "http://localhost:8000"}


@pytest.mark.parametrize(
    ("host", "any_address", "status"),
    [
        ("localhost:8000", False, 200),
        ("LOCALHOST", False, 200),
        ("127.0.0.1", False, 200),
        ("[::1]:8000", False, 200),
        ("evil.example", False, 400),
        ("localhost.evil.example", False, 400),
        ("localhost@evil.example", False, 400),
        ("192.168.0.9", False, 400),
        ("192.168.0.9:80", True, 200),
        ("[fe80::1]", True, 200),
        ("evil.example", True, 400),
        ("[", False, 400),
        ("localhost:port", False, 400),
        ("localhost:99999", False, 400),
        ("", True, 400),
    ],
)
def test_only_our_own_names_are_answered(host: str, any_address: bool, status: int) -> None:
    answer = ask("GET", "http://localhost/", any_address, headers={"Host": host})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (OWN, 200),
        (OWN | {"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://localhost:8000"}, 200),  # behind a proxy that speaks TLS
        ({}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:9000"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        (OWN | {"Sec-Fetch-Site": "cross-site"}, 403),
        (OWN | {"Sec-Fetch-Site": "same-site"}, 403),
    ],
)
def test_posts_come_from_our_own_pages(headers: dict[str, str], status: int) -> None:
    answer = ask("POST", "http://localhost:8000/", headers=headers, content=b"x" * 100)
    assert answer.status_code == status
    assert answer.text == ("100 bytes" if status == 200 else "That came from another site, so "
                           "nothing was done.")  # fmt: skip


async def chunks(n: int) -> AsyncIterator[bytes]:
    for _ in range(n):
        yield b"x" * 10


@pytest.mark.parametrize("content", [b"x" * 101, chunks(11)], ids=["announced", "chunked"])
def test_long_bodies_are_refused(content: Any) -> None:
    answer = ask("POST", "http://localhost:8000/", headers=OWN, content=content)
    assert answer.status_code == 413
    assert answer.text == "That is more than this page takes."


def test_chunked_bodies_of_allowed_length_arrive_whole() -> None:
    answer = ask("POST", "http://localhost:8000/", headers=OWN, content=chunks(10))
    assert answer.text == "100 bytes"


def test_half_a_body_is_not_taken_for_a_whole_one() -> None:
    messages = [
        {"type": "http.request", "body": b"task=1&answer=1", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost:8000"), (b"origin", b"http://localhost:8000")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    asyncio.run(Guard(echo, refuse)(scope, receive, send))
    assert sent == []


def test_a_length_that_is_no_number_is_refused() -> None:
    answer = ask("POST", "http://localhost:8000/", headers=OWN | {"Content-Length": "-1"})
    assert answer.status_code == 400


def test_errors_are_logged_and_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask("GET", "http://localhost/broken")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "a secret detail" in caplog.text


@pytest.mark.parametrize("path", ["/", "/broken"])
def test_every_answer_is_sealed(path: str) -> None:
    answer = ask("GET", f"http://localhost{path}")
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in answer.headers["Content-Security-Policy"]


HERE, THERE = "198.51.100.7", "203.0.113.9"


def test_throttle_holds_one_name_back_and_then_lets_it_go() -> None:
    now = 0.0
    throttle = Throttle(per_pair=2, clock=lambda: now)
    assert [throttle.attempt("ann", HERE) for _ in range(3)] == [0, 0, 60]
    assert throttle.attempt("ben", HERE) == 0
    assert throttle.attempt("ann", THERE) == 0
    now = 59.0
    assert throttle.attempt("ann", HERE) == 1
    now = 60.0
    assert throttle.attempt("ann", HERE) == 0


def test_throttle_forgets_failures_after_a_success() -> None:
    throttle = Throttle(per_pair=2, clock=lambda: 0.0)
    for _ in range(5):
        assert throttle.attempt("ann", HERE) == 0
        throttle.succeeded("ann", HERE)


@pytest.mark.parametrize(
    ("one", "other"),
    [(HERE, HERE), ("2001:db8::1", "2001:db8::ffff:2"), (HERE, f"::ffff:{HERE}")],
)
def test_throttle_bounds_the_attempts_of_one_client(one: str, other: str) -> None:
    throttle = Throttle(per_address=3, clock=lambda: 0.0)
    addresses = [one, other, one, other]
    assert list(map(throttle.attempt, "abcd", addresses)) == [0, 0, 0, 60]
    assert throttle.attempt("d", THERE) == throttle.attempt("d", "2001:db8:0:1::1") == 0


def test_throttle_lets_the_owner_in_while_many_clients_try_a_name() -> None:
    now = 0.0
    throttle = Throttle(per_name=3, clock=lambda: now)
    assert throttle.attempt("ann", HERE) == 0
    throttle.succeeded("ann", HERE)
    assert [throttle.attempt("ann", f"203.0.113.{i}") for i in range(5)] == [0, 0, 0, 60, 60]
    assert throttle.attempt("ann", HERE) == 0
    assert throttle.attempt("ben", THERE) == 0
    now = 60.0
    assert throttle.attempt("ann", "203.0.113.4") == 0


def hidden(name: str) -> str:
    return f'<span class="control">⟨{name}⟩</span>'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, 中文, 👩‍🚀\n\tnext", "plain, 中文, 👩‍🚀\n\tnext"),
        ("<script>alert('1')</script>", "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;"),
        ("\x1b[31mred", f"{hidden('ESC')}[31mred"),
        ("a\x00b\x7f", f"a{hidden('NUL')}b{hidden('DEL')}"),
        ("\u202egnp", f"{hidden('U+202E')}gnp"),
        ("\x9b\ud800", hidden("U+009B") + hidden("U+D800")),
        ("one\r\ntwo\r", f"one\ntwo{hidden('CR')}"),
    ],
)
def test_what_a_reader_would_not_see_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "tag"),
    [("a film", ""), ("这部电影很好", "zh"), ("いい映画", "ja"), ("映画 だ", "ja"), ("영화", "ko")],
)
def test_language_by_script(text: str, tag: str) -> None:
    assert language(text) == tag
