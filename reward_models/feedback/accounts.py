"""Who may sign in to the annotation page: names, password hashes and sessions.

They stand in the store's file, in tables of their own. Real names are in these and nowhere else;
answers carry a pseudonym.
"""

import hashlib
import hmac
import os
import secrets
import sqlite3
import threading
import time
import unicodedata
from typing import Any, NamedTuple

from reward_models.feedback.database import Database, UnknownAnnotator

_PARAMETERS = (2**15, 8, 3)
"""scrypt's n, r and p: 32 MB and some tenths of a second (OWASP's Password Storage Cheat Sheet)."""

_MINIMUM_LENGTH = 8

_HASHING = threading.Semaphore(2)
"""So that a flood of sign-ins does not fill the memory."""

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
"""Of random pseudonyms; no i, l, o, 0 and 1, which look alike."""


class Account(NamedTuple):
    """A person who may sign in.

    Args:
        name: as typed at sign-in, in lower case.
        pseudonym: what the answers know this person by.
    """

    name: str
    pseudonym: str


class Accounts:
    """The people who may sign in, in the same file as the `FeedbackStore`.

    An instance may be shared by threads; every process opens its own.

    Args:
        path: the file; made, with its folder, if it is not there.

    Raises:
        StoreError: if the file is not a store, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._database = Database(path)

    def __enter__(self) -> "Accounts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def create(self, name: str, password: str | None = None) -> Account:
        """Make an account; without a password it cannot sign in, but answer at the terminal.

        Names that differ in case only are the same. The pseudonym is random ("annotator-k7f2"),
        so those of two stores can be told apart and none comes back after `forget`.

        Raises:
            ValueError: if the name is taken or empty, or the password has under 8 characters.
        """
        name = account_name(name)
        if not name or not name.isprintable():
            raise ValueError(f"expected a name, got {name!r}")
        if name.startswith("annotator-"):
            raise ValueError(f"expected a name that does not look like a pseudonym, got {name!r}")
        stored = None if password is None else _hashed(_checked(password))
        with self._database.writing() as connection:
            if _find(connection, name) is not None:
                raise ValueError(f"expected a new name, got {name!r}, which has an account")
            pseudonym = _new_pseudonym(connection)
            connection.execute(
                "INSERT INTO accounts (name, pseudonym, password) VALUES (?, ?, ?)",
                (name, pseudonym, stored),
            )
        return Account(name, pseudonym)

    def set_password(self, name: str, password: str) -> None:
        """Change a password; the person's sessions end.

        Raises:
            UnknownAnnotator: if there is no such account.
            ValueError: if the password has under 8 characters.
        """
        stored = _hashed(_checked(password))
        with self._database.writing() as connection:
            row = _find(connection, account_name(name))
            if row is None:
                raise UnknownAnnotator(f"expected the name of an account, got {name!r}")
            connection.execute("UPDATE accounts SET password = ? WHERE id = ?", (stored, row["id"]))
            connection.execute("DELETE FROM sessions WHERE account = ?", (row["id"],))

    def find(self, name: str) -> Account | None:
        """The account of that name."""
        with self._database.reading() as connection:
            row = _find(connection, account_name(name))
        return None if row is None else Account(row["name"], row["pseudonym"])

    def all(self) -> list[Account]:
        """Every account, by name."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT name, pseudonym FROM accounts ORDER BY name")
            return [Account(*row) for row in rows]

    def anybody_can_sign_in(self) -> bool:
        """Whether some account has a password; those made for the terminal have none."""
        with self._database.reading() as connection:
            found = connection.execute(
                "SELECT EXISTS (SELECT 1 FROM accounts WHERE password IS NOT NULL)"
            ).fetchone()
        return bool(found[0])

    def verify(self, name: str, password: str) -> Account | None:
        """The account if the password is right. Takes as long for a name that is not known."""
        with self._database.reading() as connection:
            row = _find(connection, account_name(name))
        stored = None if row is None else row["password"]
        right = _is_right(password, stored or _NOBODYS)
        if row is None or stored is None or not right:
            return None
        return Account(row["name"], row["pseudonym"])

    def start_session(self, account: Account, lasts: float = 30 * 86400) -> str:
        """Begin a session of that many seconds; the token goes into a cookie and is not kept.

        Raises:
            UnknownAnnotator: if the account is gone.
        """
        token, now = secrets.token_urlsafe(32), time.time()
        with self._database.writing() as connection:
            connection.execute("DELETE FROM sessions WHERE expires <= ?", (now,))
            row = _find(connection, account.name)
            if row is None:
                raise UnknownAnnotator(f"expected the name of an account, got {account.name!r}")
            connection.execute(
                "INSERT INTO sessions (token, account, expires) VALUES (?, ?, ?)",
                (_token_hash(token), row["id"], now + lasts),
            )
        return token

    def session(self, token: str) -> Account | None:
        """Whose session it is, or None if it is unknown or over."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT name, pseudonym FROM sessions JOIN accounts ON accounts.id = account "
                "WHERE token = ? AND expires > ?",
                (_token_hash(token), time.time()),
            ).fetchone()
        return None if row is None else Account(*row)

    def end_session(self, token: str) -> None:
        """Sign out."""
        with self._database.writing() as connection:
            connection.execute("DELETE FROM sessions WHERE token = ?", (_token_hash(token),))


def account_name(name: str) -> str:
    """A name as it is kept: however it is typed or composed, one person's is one."""
    whole = name.encode("utf-8", "replace").decode()
    return " ".join(unicodedata.normalize("NFKC", whole).casefold().split())


def _find(connection: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    return connection.execute("SELECT * FROM accounts WHERE name = ?", (name,)).fetchone()


def _new_pseudonym(connection: sqlite3.Connection) -> str:
    while True:
        pseudonym = "annotator-" + "".join(secrets.choice(_LETTERS) for _ in range(4))
        if not connection.execute(
            "SELECT 1 FROM accounts WHERE pseudonym = :it "
            "UNION SELECT 1 FROM assignments WHERE annotator = :it",
            {"it": pseudonym},
        ).fetchone():
            return pseudonym


def _checked(password: str) -> str:
    if len(password) < _MINIMUM_LENGTH:
        raise ValueError(
            f"expected a password of at least {_MINIMUM_LENGTH} characters, got {len(password)}"
        )
    return password


def _hashed(password: str) -> str:
    """Parameters, salt and hash as one text."""
    salt = secrets.token_bytes(16)
    n, r, p = _PARAMETERS
    return f"{n}${r}${p}${salt.hex()}${_scrypt(password, salt, n, r, p).hex()}"


def _is_right(password: str, stored: str) -> bool:
    n, r, p, salt, expected = stored.split("$")
    found = _scrypt(password, bytes.fromhex(salt), int(n), int(r), int(p))
    return hmac.compare_digest(found, bytes.fromhex(expected))


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    normal = unicodedata.normalize("NFKC", password).encode("utf-8", "surrogatepass")
    with _HASHING:
        return hashlib.scrypt(normal, salt=salt, n=n, r=r, p=p, maxmem=256 * n * r, dklen=32)


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


_NOBODYS = "$".join((*map(str, _PARAMETERS), "00" * 16, "00" * 32))
"""What a password for an unknown name is compared with, which takes as long."""
