"""The SQLite file that holds feedback: opening it safely, its tables, their versions.

What is in the tables is the business of `store` and `accounts`.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_APPLICATION_ID = 0x524C4846
"""Marks the file as ours: "RLHF"."""

_BUSY_SECONDS = 30.0

_STEPS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE tasks (
            id INTEGER PRIMARY KEY,
            digest TEXT NOT NULL,       -- of kind, prompt, completions and scale
            origins TEXT NOT NULL,      -- JSON list, empty if unknown
            kind TEXT NOT NULL CHECK (kind IN ('comparison', 'rating', 'label')),
            prompt TEXT NOT NULL,
            completions TEXT NOT NULL,  -- JSON list
            scale TEXT NOT NULL,        -- JSON list: lowest, highest
            gold TEXT,                  -- JSON, the right answer
            uncertainty REAL,
            wanted INTEGER NOT NULL,    -- how many people are to be asked
            place REAL NOT NULL,        -- random: the order among equals
            UNIQUE (digest, origins)
        ) STRICT
        """,
        # One row per task and person: open (done is null), skipped (answer is null) or answered.
        # AUTOINCREMENT: a form that is out of date must not meet a newer assignment's id.
        """
        CREATE TABLE assignments (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            task INTEGER NOT NULL REFERENCES tasks (id),
            annotator TEXT NOT NULL,    -- pseudonym
            swapped INTEGER,            -- the second completion was shown first; null: imported
            opened REAL,                -- when it was given, seconds since 1970; null: imported
            done INTEGER UNIQUE,        -- running number of answers and skips; null: open
            answer TEXT,                -- JSON, in the task's own order
            seconds REAL,
            time TEXT,                  -- ISO 8601
            UNIQUE (task, annotator)
        ) STRICT
        """,
        "CREATE UNIQUE INDEX one_open ON assignments (annotator) WHERE done IS NULL",
        """
        CREATE TABLE accounts (
            id INTEGER PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            pseudonym TEXT NOT NULL UNIQUE,
            password TEXT               -- scrypt parameters, salt and hash; null: cannot sign in
        ) STRICT
        """,
        """
        CREATE TABLE sessions (
            token TEXT PRIMARY KEY,     -- sha256 of the token
            account INTEGER NOT NULL REFERENCES accounts (id) ON DELETE CASCADE,
            expires REAL NOT NULL       -- seconds since 1970
        ) STRICT
        """,
    ),
    # JSON: the messages of prompt and completions; null: they are texts
    ("ALTER TABLE tasks ADD COLUMN chat TEXT",),
)
"""The statements of step i take a file from version i to version i + 1."""


class StoreError(OSError):
    """The file cannot be used: it is no store, a newer one, read-only, locked, or the disk is full.

    Nothing of the step that raised it was saved.
    """


class AnswerError(ValueError):
    """An answer was refused, and nothing was saved."""


class UnknownTask(AnswerError):
    """No such task was ever given out."""


class AlreadyAnswered(AnswerError):
    """The task has been answered or skipped: a form that was sent twice, or from two windows."""


class StaleTask(AnswerError):
    """The task was taken back: undone, expired, or it is somebody else's."""


class UnknownAnnotator(ValueError):
    """Nobody of that name is known."""


class Database:
    """A connection that threads may share; every process opens its own.

    Args:
        path: the file; made, with its folder, if it is not there, readable by its owner only.

    Raises:
        StoreError: if the file is not a store, or cannot be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600))
        except OSError as error:
            raise StoreError(
                error.errno, f"could not make {self.path}: {error.strerror}"
            ) from error
        with self._clear_errors():
            self._connection = sqlite3.connect(
                self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, with one state of the file for all that is read in the block."""
        with self._transaction("BEGIN") as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection, alone in writing; on the disk at the block's end, or not at all."""
        with self._transaction("BEGIN IMMEDIATE") as connection:
            yield connection

    def scrub(self) -> None:
        """Leave no trace of deleted rows in the file or its write-ahead log.

        Raises:
            StoreError: if others kept the file busy for half a minute, or the disk is full.
        """
        with self._lock:
            try:
                self._connection.execute("VACUUM")
                checkpoint = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                busy = checkpoint.fetchone()[0]
            except sqlite3.DatabaseError as error:
                raise StoreError(
                    f"{self.path}: deleted, but traces may be left: {error}"
                ) from error
        if busy:
            raise StoreError(f"{self.path}: deleted, but its log is in use and may hold traces")

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with self._lock, self._clear_errors():
            self._connection.execute(begin)
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise StoreError(f"{self.path}: {error}; this step was not saved") from error

    def _prepare(self) -> None:
        """Set the connection up and bring the file to the current version."""
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._connection.execute("PRAGMA secure_delete = ON")
        self._check_version()
        self._use_wal()
        self._connection.execute("PRAGMA synchronous = FULL")
        if self._check_version() < len(_STEPS):
            with self.writing() as connection:
                for step in _STEPS[self._check_version() :]:  # another process may have done it
                    for statement in step:
                        connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {len(_STEPS)}")

    def _check_version(self) -> int:
        within = self._connection.in_transaction
        if not within:  # all three of one state: another process may be making the file
            self._connection.execute("BEGIN")
        try:
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            application = self._connection.execute("PRAGMA application_id").fetchone()[0]
            tables = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        finally:
            if not within:
                self._connection.execute("COMMIT")
        if application != _APPLICATION_ID and (application or version or tables):
            raise StoreError(f"{self.path}: expected a feedback store, got another SQLite file")
        if version > len(_STEPS):
            raise StoreError(
                f"{self.path}: expected a store of version {len(_STEPS)} or older, got {version}; "
                "it was made by a newer rlhf-gym"
            )
        return version

    def _use_wal(self) -> None:
        """Turn on write-ahead logging; SQLite does not wait when several do so at once."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                mode = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
                continue
            if mode != "wal":
                raise StoreError(
                    f"{self.path}: expected a disk on which SQLite can keep a write-ahead log, "
                    "got one (a network share?) on which it cannot"
                )
            return
