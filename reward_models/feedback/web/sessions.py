"""Signing in and out, and who is asking.

A session is a random token in a cookie. Every form carries a second token made of it, which
another site cannot know; the form for signing in has a cookie of its own for that.
"""

import hashlib
import hmac
import math
import secrets
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Depends, Form, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import URL

from reward_models.feedback.accounts import Account, Accounts, account_name
from reward_models.feedback.web.rendering import Refusal, page
from reward_models.feedback.web.throttle import Throttle

SESSION = "feedback_session"
VISIT = "feedback_visit"
SESSION_SECONDS = 30 * 86400

router = APIRouter()


class Visit(NamedTuple):
    """Somebody who has signed in.

    Args:
        account: who it is.
        form_token: what their forms must carry.
    """

    account: Account
    form_token: str


class SignedOut(Exception):
    """Nobody is signed in.

    Args:
        expired: whether somebody was.
    """

    def __init__(self, expired: bool) -> None:
        super().__init__("signed out")
        self.expired = expired


def cookie_name(url: URL, kind: str) -> str:
    """What a cookie is called at the port that a page is called up at.

    Browsers keep a host's cookies for all of its ports: two pages would sign each other out. With
    TLS the prefix has them keep out what was set without (RFC 6265bis, 4.1.3.2).
    """
    secure = url.scheme == "https"
    return f"{'__Host-' if secure else ''}{kind}_{url.port or (443 if secure else 80)}"


def form_token(cookie: str) -> str:
    """What a form must carry to belong to the cookie."""
    return hashlib.sha256(f"form of {cookie}".encode("utf-8", "surrogatepass")).hexdigest()


def visitor(request: Request) -> Visit:
    """Whoever is signed in.

    Raises:
        SignedOut: if nobody is.
    """
    session = _cookie(request, SESSION)
    account = _accounts(request).session(session) if session else None
    if not session or account is None:
        raise SignedOut(expired=bool(session))
    return Visit(account, form_token(session))


def poster(visit: Annotated[Visit, Depends(visitor)], token: Annotated[str, Form()] = "") -> Visit:
    """Whoever is signed in and has sent one of our own forms.

    Raises:
        SignedOut: if nobody is signed in.
        Refusal: if the form is not theirs.
    """
    if not _same(token, visit.form_token):
        raise Refusal(403, "That form belongs to another sign-in, so nothing was saved.")
    return visit


def sign_in_page(
    request: Request, status: int = 200, error: str = "", name: str = "", wait: float = 0
) -> Response:
    """The form for signing in.

    Args:
        request: what is answered.
        status: the HTTP status.
        error: what is wrong.
        name: what was typed before.
        wait: seconds until another attempt is taken.
    """
    visit = _cookie(request, VISIT) or secrets.token_urlsafe(32)
    headers = {"Retry-After": str(math.ceil(wait))} if wait else {}
    response = page(
        "sign_in.html", status, headers, token=form_token(visit), error=error, name=name
    )
    _set_cookie(request, response, VISIT, visit)
    return response


@router.get("/sign-in")
def show_sign_in(request: Request) -> Response:
    """The form for signing in."""
    return sign_in_page(request)


@router.post("/sign-in")
def sign_in(
    request: Request,
    name: Annotated[str, Form(max_length=200)],
    password: Annotated[str, Form(max_length=1000)],
    token: Annotated[str, Form()] = "",
) -> Response:
    """Begin a session if the password is right."""
    visit = _cookie(request, VISIT)
    if not visit or not _same(token, form_token(visit)):
        return sign_in_page(request, 403, "That form was out of date. Please sign in again.", name)
    throttle: Throttle = request.app.state.throttle
    who, where = account_name(name), request.client.host if request.client else ""
    wait = throttle.attempt(who, where)
    if wait:
        error = f"Too many attempts. Please try again in {math.ceil(wait)} seconds."
        return sign_in_page(request, 429, error, name, wait)
    accounts = _accounts(request)
    account = accounts.verify(name, password)
    if account is None:
        return sign_in_page(request, 401, "Name and password do not belong together.", name)
    throttle.succeeded(who, where)
    _end_session(request)
    response = RedirectResponse("/", status_code=303)
    session = accounts.start_session(account, SESSION_SECONDS)
    _set_cookie(request, response, SESSION, session, SESSION_SECONDS)
    _set_cookie(request, response, VISIT, "", 0)
    return response


@router.post("/sign-out")
def sign_out(request: Request, visit: Annotated[Visit, Depends(poster)]) -> Response:
    """End the session."""
    _end_session(request)
    response = RedirectResponse("/sign-in", status_code=303)
    _set_cookie(request, response, SESSION, "", 0)
    return response


def _accounts(request: Request) -> Accounts:
    accounts: Accounts = request.app.state.accounts
    return accounts


def _end_session(request: Request) -> None:
    session = _cookie(request, SESSION)
    if session:
        _accounts(request).end_session(session)


def _cookie(request: Request, kind: str) -> str | None:
    return request.cookies.get(cookie_name(request.url, kind))


def _set_cookie(
    request: Request, response: Response, kind: str, value: str, seconds: int | None = None
) -> None:
    """Set a cookie for this host alone, until the browser is closed if no seconds are given."""
    response.set_cookie(
        cookie_name(request.url, kind),
        value,
        seconds,
        path="/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())
