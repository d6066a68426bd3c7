"""What stands before every request: who may be asked for, from where, and how much may be sent.

Passwords, sessions and form tokens are the pages' matter, in `app`.
"""

import logging
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_LIMIT = 64 * 1024

# With no-referrer, browsers send "Origin: null" with our own forms too, and a form from elsewhere
# could not be told from ours. same-origin gives other sites as little.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware: refuses what no page of ours sends, and seals every answer with `HEADERS`.

    Refused are requests to a host name that is not ours (DNS rebinding), posts that do not come
    from our own pages, and bodies longer than `body_limit`, announced or not. An exception that
    nobody caught is logged and becomes a plain page.

    Args:
        app: what is guarded.
        refuse: makes the page that says no, of a status and a sentence.
        hosts: the names that we answer to.
        any_address: whether we also answer to every IP address; such a name cannot be rebound.
        body_limit: longest body, bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        refuse: Callable[[int, str], Response],
        hosts: frozenset[str] = LOOPBACK,
        any_address: bool = False,
        body_limit: int = BODY_LIMIT,
    ) -> None:
        self.app = app
        self.refuse = refuse
        self.hosts = hosts
        self.any_address = any_address
        self.body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def sealed(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None and scope["method"] not in ("GET", "HEAD"):
                body = await _body(receive, self.body_limit)
                if body is None:
                    refusal = (413, "That is more than this page takes.")
                else:
                    receive = _replay(body, receive)
            if refusal is None:
                await self.app(scope, receive, sealed)
            else:
                await self.refuse(*refusal)(scope, receive, sealed)
        except ClientDisconnect:  # half a form must not be taken for a whole one
            return
        except Exception:
            logger.exception("%s %r failed", scope["method"], scope["path"])
            if started:
                raise
            sentence = "Something went wrong here. Nothing was lost that had been saved."
            await self.refuse(500, sentence)(scope, receive, sealed)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 400, "This server does not answer to that address."
        if scope["method"] in ("GET", "HEAD"):
            return None
        if not _is_own(headers, hosts[0]):
            return 403, "That came from another site, so nothing was done."
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return 400, "The request says its length in a way that cannot be read."
        if len(length) > 18 or int(length) > self.body_limit:
            return 413, "That is more than this page takes."
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            parts = urlsplit(f"//{host}")
            name, _ = parts.hostname or "", parts.port  # which is a number, or raises
        except ValueError:
            return False
        if name in self.hosts:
            return True
        try:
            return self.any_address and bool(ip_address(name))
        except ValueError:
            return False


def _is_own(headers: Headers, host: str) -> bool:
    """Whether a post comes from one of our own pages, by what only a browser can set."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin", "")
    return origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None as soon as it is longer than `limit` bytes.

    Raises:
        ClientDisconnect: if it breaks off.
    """
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body already read, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
