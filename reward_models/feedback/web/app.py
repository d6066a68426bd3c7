"""The annotation page as an application, and a server for it."""

import getpass
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from reward_models.feedback.accounts import Account, Accounts, account_name
from reward_models.feedback.database import StoreError
from reward_models.feedback.store import FeedbackStore
from reward_models.feedback.web import pages, sessions
from reward_models.feedback.web.guard import LOOPBACK, Guard
from reward_models.feedback.web.rendering import Refusal, message
from reward_models.feedback.web.throttle import Throttle

logger = logging.getLogger(__name__)

_WILDCARDS = frozenset({"0.0.0.0", "::", ""})


def make_app(
    store: FeedbackStore,
    accounts: Accounts,
    host: str = "127.0.0.1",
    names: Sequence[str] = (),
    lead: str | None = None,
    throttle: Throttle | None = None,
) -> FastAPI:
    """The annotation page.

    Args:
        store: where tasks come from and answers go.
        accounts: who may sign in.
        host: the address that the page is served at. A loopback address is answered to under
            loopback names only, a wildcard under every IP address.
        names: further names of the server, those that a proxy forwards for instance.
        lead: name of the account that runs the collection. Its dashboard shows disagreements on
            all tasks; that of the others, lest it sway them, on those they have answered.
        throttle: of the attempts to sign in.
    """
    app = FastAPI(title="Feedback", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.store = store
    app.state.accounts = accounts
    app.state.lead = None if lead is None else account_name(lead)
    app.state.throttle = throttle or Throttle()
    app.include_router(sessions.router)
    app.include_router(pages.router)
    app.mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(sessions.SignedOut, _signed_out)
    app.add_exception_handler(StoreError, _not_stored)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _other)
    hosts = LOOPBACK | {name.lower() for name in (host, *names) if name}
    app.add_middleware(Guard, refuse=message, hosts=hosts, any_address=host in _WILDCARDS)
    return app


def serve(
    store: FeedbackStore,
    accounts: Accounts,
    host: str = "127.0.0.1",
    port: int = 8000,
    names: Sequence[str] = (),
    lead: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        store: where tasks come from and answers go.
        accounts: who may sign in.
        host: the address to listen at; others than loopback can be reached from outside.
        port: the port to listen at.
        names: further names of the server.
        lead: name of the account that runs the collection.
        certificate: file with a TLS certificate. Without one, passwords cross the network in
            the clear.
        key: file with its key.

    Raises:
        ValueError: if nobody could sign in.
    """
    if not accounts.anybody_can_sign_in():
        raise ValueError("expected an account that can sign in, got none: make one first")
    if host not in LOOPBACK and certificate is None:
        logger.warning("%s without TLS: passwords and texts can be read on the way", host)
    uvicorn.run(
        make_app(store, accounts, host, names, lead),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


def set_up_account(
    accounts: Accounts, name: str, ask_secretly: Callable[[str], str] = getpass.getpass
) -> Account:
    """Ask at the terminal for a password: of a new account, or a new one for one that is there.

    Args:
        accounts: who may sign in.
        name: to sign in with.
        ask_secretly: shows a question and gives what was typed, without showing that.

    Raises:
        ValueError: if the passwords typed differ, or `Accounts` does not take name or password.
    """
    password = ask_secretly(f"Password for {name} (8 characters or more): ")
    if ask_secretly("The same password again: ") != password:
        raise ValueError("expected the same password twice, got two different ones")
    known = accounts.find(name)
    if known is None:
        return accounts.create(name, password)
    accounts.set_password(name, password)
    return known


# Starlette's type of a handler knows only `Exception`, hence the signatures.


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return message(error.status, error.sentence)


def _signed_out(request: Request, error: Exception) -> Response:
    assert isinstance(error, sessions.SignedOut)
    if error.expired:
        over = "Your session is over and nothing was saved. Please sign in again."
        return sessions.sign_in_page(request, 401, over)
    if request.method == "GET":
        return RedirectResponse("/sign-in", status_code=303)
    return sessions.sign_in_page(request, 401, "Nothing was saved: please sign in first.")


def _not_stored(request: Request, error: Exception) -> Response:
    logger.error("the store failed", exc_info=error)
    return message(503, "The answers' file cannot be used just now. Please try again in a moment.")


def _malformed(request: Request, error: Exception) -> Response:
    return message(422, "That form is not complete, so nothing was saved.")


def _other(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {404: "There is no such page.", 405: "This address only takes forms."}
    return message(error.status_code, sentences.get(error.status_code, "That cannot be read."))
