"""The store under fire: many writers, kills, full disks, and files of other versions."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from reward_models.feedback import Accounts, FeedbackStore, StoreError, Task, database

ROOT = Path(__file__).parent.parent

WRITER = """
import sys
from reward_models.feedback import FeedbackStore, Task
path, annotator, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
with FeedbackStore(path) as store:
    store.add((Task("label", f"p{i}", ("a",)) for i in range(n)), overlap_share=0)
    print("ready", flush=True)
    sys.stdin.readline()
    while (assignment := store.next_task(annotator)) is not None:
        store.answer(assignment.id, annotator, True)
        print(assignment.task.prompt, flush=True)
"""


def start_writer(path: Path, annotator: str, n: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), annotator, str(n)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def check_integrity(path: Path) -> None:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


@pytest.mark.slow
def test_twenty_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """They make the file together, and of 400 tasks each is answered once, by one of them."""
    path = tmp_path / "feedback.db"
    writers = {f"w{i}": start_writer(path, f"w{i}", 400) for i in range(20)}
    for writer in writers.values():
        assert writer.stdout.readline() == "ready\n"
    for writer in writers.values():
        writer.stdin.write("go\n")
        writer.stdin.flush()
    printed = {}
    for name, writer in writers.items():
        printed[name] = writer.communicate(timeout=240)[0].split()
        assert writer.returncode == 0
    with FeedbackStore(path) as store:
        answers = store.answers()
    saved = {name: [] for name in writers}
    for answer in answers:
        saved[answer.annotator].append(answer.task.prompt)
    assert saved == printed
    assert Counter(answer.task_id for answer in answers) == Counter(range(1, 401))
    assert sum(bool(texts) for texts in printed.values()) > 1
    check_integrity(path)


@pytest.mark.slow
def test_a_killed_writer_loses_nothing_acknowledged(tmp_path: Path) -> None:
    """Killed at a random moment six times: all that it printed is there, and at most one more."""
    path = tmp_path / "feedback.db"
    rng = random.Random(0)
    printed: set[str] = set()
    for _ in range(6):
        writer = start_writer(path, "ann", 2000)
        assert writer.stdout.readline() == "ready\n"
        writer.stdin.write("go\n")
        writer.stdin.flush()
        time.sleep(rng.uniform(0.02, 0.3))
        os.kill(writer.pid, signal.SIGKILL)
        printed |= set(writer.stdout.read().split("\n")[:-1])
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
        check_integrity(path)
    with FeedbackStore(path) as store:
        saved = [answer.task.prompt for answer in store.answers()]
        assert store.next_task("ann") is not None
    assert len(saved) == len(set(saved))
    assert printed and printed <= set(saved)
    assert len(saved) <= len(printed) + 6


def test_every_answer_is_synced(tmp_path: Path) -> None:
    """SIGKILL does not tell a synced write from one that only the system holds."""
    with FeedbackStore(tmp_path / "f.db") as store, store._database.reading() as connection:
        settings = ("journal_mode", "synchronous", "foreign_keys", "secure_delete", "busy_timeout")
        found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in settings]
    assert found == ["wal", 2, 1, 1, 30000]


def one_answer(path: Path) -> None:
    with FeedbackStore(path) as store:
        store.add([Task("label", f"p{i}", ("a",)) for i in range(2)])
        store.answer(store.next_task("ann").id, "ann", True)


def test_an_older_store_is_brought_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.db"
    one_answer(path)
    newer = (
        *database._STEPS,
        ("ALTER TABLE tasks ADD COLUMN note TEXT", "UPDATE tasks SET note = ''"),
    )
    monkeypatch.setattr(database, "_STEPS", newer)
    for _ in range(2):
        with FeedbackStore(path) as store, store._database.reading() as connection:
            assert connection.execute("PRAGMA user_version").fetchone()[0] == len(newer)
            assert [row["note"] for row in connection.execute("SELECT note FROM tasks")] == [""] * 2
    with FeedbackStore(path) as store:
        assert len(store.answers()) == 1
        store.answer(store.next_task("ann").id, "ann", False)


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.db"
    one_answer(path)
    broken = (
        *database._STEPS,
        ("ALTER TABLE tasks ADD COLUMN note TEXT", "UPDATE missing SET x = 1"),
    )
    with monkeypatch.context() as patch:
        patch.setattr(database, "_STEPS", broken)
        with pytest.raises(StoreError, match=r"f.db: no such table: missing; .* not saved"):
            FeedbackStore(path)
    with FeedbackStore(path) as store, store._database.reading() as connection:
        assert len(connection.execute("SELECT * FROM tasks").fetchone()) == 12


def test_a_newer_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.db"
    with monkeypatch.context() as patch:
        patch.setattr(database, "_STEPS", (*database._STEPS, ()))
        one_answer(path)
    with pytest.raises(StoreError, match="expected a store of version 2 or older, got 3"):
        FeedbackStore(path)


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE films (title TEXT)")
    connection.close()
    text = tmp_path / "text.db"
    text.write_text("no database at all, but long enough to be taken for one " * 20)
    folder = tmp_path / "folder.db"
    folder.mkdir()
    before = foreign.read_bytes(), text.read_bytes()
    with pytest.raises(StoreError, match="expected a feedback store, got another SQLite file"):
        FeedbackStore(foreign)
    with pytest.raises(StoreError, match=r"text.db: file is not a database"):
        FeedbackStore(text)
    with pytest.raises(StoreError, match=r"folder.db: unable to open database file"):
        FeedbackStore(folder)
    with pytest.raises(StoreError, match=r"could not make .*/text.db/f.db: "):
        Accounts(text / "f.db")
    assert (foreign.read_bytes(), text.read_bytes()) == before


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    """No file of this process may grow beyond 300 KB; 20 times that is written."""
    path = tmp_path / "f.db"
    one_answer(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FeedbackStore(path) as store:
        previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        try:
            with pytest.raises(StoreError, match=r"f.db: .*(disk|full).*; this step was not saved"):
                store.add(Task("label", f"p{i}", ("a" * 60_000,)) for i in range(100))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, previous)
        assert len(store.answers()) == 1 and store.progress("ann").left == 1
        store.answer(store.next_task("ann").id, "ann", True)
    check_integrity(path)


def test_a_read_only_store_is_named(tmp_path: Path) -> None:
    """By SQLite's own switch: the tests may run as root, to whom every file can be written."""
    one_answer(tmp_path / "f.db")
    with FeedbackStore(tmp_path / "f.db") as store:
        with store._database.reading() as connection:
            connection.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreError, match=r"f.db: attempt to write a readonly database"):
            store.next_task("ann")
        assert len(store.answers()) == 1


def test_a_lock_that_is_never_released_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_answer(tmp_path / "f.db")
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.1)
    other = sqlite3.connect(tmp_path / "f.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with FeedbackStore(tmp_path / "f.db") as store:
        with pytest.raises(StoreError, match=r"f.db: database is locked; this step was not saved"):
            store.next_task("ann")
        assert len(store.answers()) == 1
        other.execute("ROLLBACK")
        assert store.next_task("ann") is not None
    other.close()
