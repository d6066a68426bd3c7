"""Who may sign in to the annotation page: names, password hashes and sessions.

They stand in the store's file, in tables of their own. Real names are in these and nowhere else;
answers carry a pseudonym.
"""

import os
from typing import Any, NamedTuple


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
    """

    def __init__(self, path: str | os.PathLike[str]) -> None: ...

    def __enter__(self) -> "Accounts":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None: ...

    def create(self, name: str, password: str | None = None) -> Account:
        """Make an account; without a password it cannot sign in, but answer at the terminal.

        Names that differ in case only are the same. The pseudonym is random ("annotator-k7f2"),
        so those of two stores can be told apart and none comes back after `forget`.

        Raises:
            ValueError: if the name is taken or empty, or the password has under 8 characters.
        """
        ...

    def set_password(self, name: str, password: str) -> None:
        """Change a password; the person's sessions end.

        Raises:
            UnknownAnnotator: if there is no such account.
            ValueError: if the password has under 8 characters.
        """
        ...

    def find(self, name: str) -> Account | None:
        """The account of that name."""
        ...

    def all(self) -> list[Account]:
        """Every account, the oldest first."""
        ...

    def verify(self, name: str, password: str) -> Account | None:
        """The account if the password is right. Takes as long for a name that is not known."""
        ...

    def start_session(self, account: Account, lasts: float = 30 * 86400) -> str:
        """Begin a session of that many seconds; the token goes into a cookie and is not kept."""
        ...

    def session(self, token: str) -> Account | None:
        """Whose session it is, or None if it is unknown or over."""
        ...

    def end_session(self, token: str) -> None:
        """Sign out."""
        ...
