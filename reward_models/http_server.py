"""A reward function as a small HTTP server: the other side of `http_reward`.

For one machine or a trusted network; without TLS, which a proxy in front of it can add.
"""

import hmac
import json
import logging
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reward_models.contract import RewardFunction, checked_scores

logger = logging.getLogger(__name__)

LONGEST_REQUEST = 2**24
"""Bytes of a request (16 MiB)."""

READ_AWAY = 2**27
"""Bytes of a refused request that are read all the same: a client that is still sending when its
connection is closed sees a broken pipe, and not the answer."""


def reward_server(
    reward_fn: RewardFunction, host: str = "127.0.0.1", port: int = 8000, token: str | None = None
) -> ThreadingHTTPServer:
    """Make a server that answers with a reward function's scores, one request at a time.

    `reward_server(model).serve_forever()` runs it.

    Args:
        reward_fn: what scores; it is given the request's other lists as columns.
        host: the address to listen on; only this machine can reach the default one.
        port: 0 takes a free one (`server.server_port`).
        token: what requests must bring as "Authorization: Bearer <token>"; None asks for none.
    """
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 30.0  # seconds that a connection may say nothing

        def do_POST(self) -> None:
            given, length = (self.headers.get(k, "") for k in ("Authorization", "Content-Length"))
            if not (length.isdecimal() and len(length) <= 20):
                return self._say(411, {"error": "expected the header Content-Length"})
            size = int(length)
            if token is not None and not hmac.compare_digest(
                given.encode(), f"Bearer {token}".encode()
            ):
                return self._refuse(401, "expected the token in the header Authorization", size)
            if self.headers.get_content_type() != "application/json":  # browsers' forms cannot
                return self._refuse(415, "expected the content type application/json", size)
            if size > LONGEST_REQUEST:
                return self._refuse(413, f"expected at most {LONGEST_REQUEST} bytes", size)
            try:
                values = _checked_request(json.loads(self.rfile.read(size)))
            except (ValueError, RecursionError) as error:
                return self._say(400, {"error": str(error)[:300]})
            try:
                with turn:
                    scores = reward_fn(**values)
                answer = {"scores": checked_scores(scores, values["completions"]).tolist()}
            except Exception as error:
                logger.exception("the reward function failed")
                return self._say(500, {"error": f"{type(error).__name__}: {error}"[:300]})
            try:
                self._say(200, answer)
            except ConnectionError:
                logger.warning("%s did not wait for its scores", self.client_address[0])

        def _refuse(self, status: int, reason: str, size: int) -> None:
            left = min(size, READ_AWAY)
            while left and (part := self.rfile.read1(min(left, 2**16))):  # type: ignore[attr-defined]
                left -= len(part)
            self._say(status, {"error": reason})

        def _say(self, status: int, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            logger.info(format, *arguments)

    return ThreadingHTTPServer((host, port), Handler)


def _checked_request(values: Any) -> dict[str, Sequence[Any]]:
    if not isinstance(values, dict) or not {"prompts", "completions"} <= set(values):
        raise ValueError('expected {"prompts": [...], "completions": [...]}')
    if not all(isinstance(column, list) for column in values.values()):
        raise ValueError("expected lists")
    if len({len(column) for column in values.values()}) != 1:
        raise ValueError("expected lists of one length")
    texts = [*values["prompts"], *values["completions"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("expected prompts and completions to be text")
    return values
