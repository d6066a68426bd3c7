"""A reward function in another process or on another machine, asked over HTTP.

The other side is `http_server`, or anything that answers a POST of
`{"prompts": [...], "completions": [...], <column>: [...]}` with `{"scores": [...]}`.
"""

import http.client
import json
import logging
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from reward_models.contract import checked_scores

logger = logging.getLogger(__name__)

LONGEST_ANSWER = 2**26
"""Bytes of an answer that are read (64 MiB)."""

LONGEST_WAIT = 60.0
"""Seconds between two attempts, at most, whatever the server asks for."""

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LOST = (OSError, http.client.HTTPException)  # OSError: refused, reset, timed out, URLError


class HTTPRewardError(RuntimeError):
    """A server gave no scores, or something else; the message begins with its url."""


class HTTPRewardModel:
    """Asks a server for the scores; calling it is the contract of `RewardFunction`.

    Where the server cannot be reached or says that it is busy, it is asked again, after waits that
    double. An answer that is not one finite number per completion is an error at once: no score is
    ever made up. Redirects are not followed, since the headers may hold a secret.

    Args:
        url: where to post to, http or https.
        timeout: seconds that one attempt may take.
        retries: attempts after the first one.
        backoff: seconds to wait after the first attempt, of which a random half is left out.
        batch_size: texts per request.
        headers: further headers, such as {"Authorization": "Bearer …"}.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        backoff: float = 0.5,
        batch_size: int = 256,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an http or https url, got {url!r}")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                "expected a url without a password, which would be logged: use headers"
            )
        if not (timeout > 0 and retries >= 0 and backoff >= 0 and batch_size >= 1):
            raise ValueError(
                "expected timeout > 0, retries >= 0, backoff >= 0 and batch_size >= 1, got "
                f"{timeout}, {retries}, {backoff} and {batch_size}"
            )
        self.url, self.timeout, self.retries = url, timeout, retries
        self.backoff, self.batch_size = backoff, batch_size
        self._headers = {**(headers or {}), "Content-Type": "application/json"}
        self._chance = random.Random()  # the run's own random numbers are left alone

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any
    ) -> np.ndarray:
        """Score each completion; see `RewardFunction`.

        Raises:
            HTTPRewardError: if there is no answer, or one that holds no scores.
            ValueError: if a column does not fit into JSON.
        """
        everything = {"prompts": prompts, "completions": completions, **columns}
        scores = [np.zeros(0)]
        for start in range(0, len(completions), self.batch_size):
            batch = {
                name: list(values[start : start + self.batch_size])
                for name, values in everything.items()
            }
            scores.append(self._scores(batch))
        return np.concatenate(scores)

    def _scores(self, batch: dict[str, list[Any]]) -> np.ndarray:
        try:
            body = json.dumps(batch, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"expected columns that fit into JSON: {error}") from error
        answer = self._ask(body)
        try:
            values = json.loads(answer)
            if not isinstance(values, dict) or not isinstance(values.get("scores"), list):
                raise ValueError('expected {"scores": [...]}')
            if any(isinstance(score, bool) for score in values["scores"]):
                raise ValueError("expected numbers, got true or false")
            return checked_scores(values["scores"], batch["completions"])
        except (ValueError, RecursionError, OverflowError) as error:
            raise HTTPRewardError(f"{self.url}: {error}; it answered {excerpt(answer)}") from error

    def _ask(self, body: bytes) -> bytes:
        """Post a batch until there is an answer, or no attempt is left."""
        for attempt in range(self.retries + 1):
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = self._refusal(error)
                cause: Exception = error
                final = error.code not in _TRY_AGAIN
                asked_for = error.headers.get("Retry-After", "")
            except _LOST as error:
                cause, final, asked_for = error, False, ""
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if final or attempt == self.retries:
                tries = f" after {attempt + 1} attempts" if attempt else ""
                raise HTTPRewardError(
                    f"{self.url}: expected scores, got {reason}{tries}"
                ) from cause
            wait = self.backoff * 2**attempt * self._chance.uniform(0.5, 1)
            if asked_for.isdecimal():
                wait = max(wait, float(asked_for))
            logger.warning("%s: %s; asking again", self.url, reason)
            time.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, self._headers)  # noqa: S310 http(s) only
        late = TimeoutError(f"no whole answer within {self.timeout:g} s")
        with _Deadline(self.timeout) as deadline:
            try:
                with _opener(deadline).open(request, timeout=self.timeout) as response:
                    answer = self._read(response)
            except urllib.error.HTTPError:
                raise
            except _LOST as error:
                raise (late if deadline.over else error) from error
            if deadline.over:  # what looks like the end may be the cut
                raise late
        return answer

    def _read(self, response: Any) -> bytes:
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LONGEST_ANSWER:
                raise HTTPRewardError(
                    f"{self.url}: expected at most {LONGEST_ANSWER} bytes, got more"
                )
        if response.length:
            raise http.client.IncompleteRead(b"".join(parts), response.length)
        return b"".join(parts)

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f"a redirect to {error.headers.get('Location')!r}, which is not followed"
        try:
            said = excerpt(error.read1(200))  # what is there: no waiting for one that drips
        except _LOST:
            said = "nothing"
        return f"HTTP {error.code} {error.reason}, {said}"


class _Deadline:
    """Cuts a connection when its time is up, headers that drip in byte by byte included.

    A socket's own timeout begins again with each byte.
    """

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        """Take the socket to cut."""
        self._socket = connected

    def _cut(self) -> None:
        self.over = True
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # under TLS too


class _Timed(urllib.request.AbstractHTTPHandler):
    """Lets a deadline watch each connection that is opened."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def do_open(self, http_class: Any, req: Any, **arguments: Any) -> Any:
        """Open a connection."""
        deadline = self._deadline

        class Watched(http_class):  # type: ignore[misc]
            def connect(self) -> None:
                super().connect()
                deadline.watch(self.sock)

        return super().do_open(Watched, req, **arguments)


class _TimedHTTP(_Timed, urllib.request.HTTPHandler):
    pass


class _TimedHTTPS(_Timed, urllib.request.HTTPSHandler):
    pass


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """What speaks http and https, through the system's proxy, follows nothing, opens no file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _TimedHTTP(deadline),
        _TimedHTTPS(deadline),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    return opener


def excerpt(answer: bytes, length: int = 80) -> str:
    """The beginning of an answer, quoted for an error message."""
    text = answer[: 4 * length].decode("utf-8", "replace")
    return repr(text if len(text) <= length else text[:length] + "…")
