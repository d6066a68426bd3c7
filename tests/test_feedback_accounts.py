"""Accounts: names, passwords and sessions, and what of them is on the disk."""

import time
from pathlib import Path

import pytest

from reward_models.feedback import Account, Accounts, UnknownAnnotator, accounts


@pytest.fixture(autouse=True)
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "_PARAMETERS", (2**4, 8, 1))
    monkeypatch.setattr(accounts, "_NOBODYS", "$".join(("16", "8", "1", "00" * 16, "00" * 32)))


@pytest.fixture
def people(tmp_path: Path):
    with Accounts(tmp_path / "feedback.db") as people:
        yield people


def test_signing_in(people: Accounts) -> None:
    ann = people.create(" Ann  Ö ", "correct horse")
    assert ann.name == "ann ö" and ann.pseudonym.startswith("annotator-")
    assert people.verify("ANN O\u0308", "correct horse") == ann  # composed on another keyboard
    for name, password in [
        ("ann ö", "Correct horse"),
        ("ann ö", ""),
        ("bob", "correct horse"),
        ("", ""),
        ("\ud800", "\ud800"),
        (ann.pseudonym, "correct horse"),
    ]:
        assert people.verify(name, password) is None
    assert people.find("Ann Ö") == ann and people.find("bob") is None
    bob = people.create("Bob")
    assert people.verify("bob", "") is None
    assert people.all() == [ann, bob] and ann.pseudonym != bob.pseudonym


def test_whether_anybody_can_sign_in(people: Accounts) -> None:
    people.create("Terminal only")
    assert not people.anybody_can_sign_in()
    people.create("Ann", "correct horse")
    assert people.anybody_can_sign_in()


@pytest.mark.parametrize(
    ("name", "password", "message"),
    [
        ("ANN", "long enough", "expected a new name, got 'ann', which has an account"),
        ("  ", "long enough", "expected a name, got ''"),
        ("a\x1bb", "long enough", "expected a name, got"),
        ("Annotator-3", "long enough", "expected a name that does not look like a pseudonym"),
        ("bob", "1234567", "expected a password of at least 8 characters, got 7"),
    ],
)
def test_impossible_accounts_are_refused(
    people: Accounts, name: str, password: str, message: str
) -> None:
    people.create("Ann", "long enough")
    with pytest.raises(ValueError, match=message):
        people.create(name, password)
    assert len(people.all()) == 1


def test_sessions_outlive_a_restart_and_end(tmp_path: Path) -> None:
    with Accounts(tmp_path / "f.db") as people:
        ann = people.create("Ann", "long enough")
        token, other = people.start_session(ann), people.start_session(ann)
    with Accounts(tmp_path / "f.db") as people:
        assert people.session(token) == people.session(other) == ann
        people.end_session(token)
        assert people.session(token) is None and people.session(other) == ann
        assert people.session("") is None and people.session("\ud800") is None
        short = people.start_session(ann, lasts=0)
        assert people.session(short) is None
        with pytest.raises(UnknownAnnotator, match="expected the name of an account, got 'bob'"):
            people.start_session(Account("bob", "annotator-0000"))


def test_a_new_password_ends_the_sessions(people: Accounts) -> None:
    ann = people.create("Ann", "long enough")
    token = people.start_session(ann)
    people.set_password("ANN", "even longer")
    assert people.session(token) is None
    assert people.verify("ann", "long enough") is None
    assert people.verify("ann", "even longer") == ann
    with pytest.raises(UnknownAnnotator, match="expected the name of an account, got 'bob'"):
        people.set_password("bob", "even longer")


def test_neither_password_nor_token_is_on_the_disk(tmp_path: Path) -> None:
    with Accounts(tmp_path / "f.db") as people:
        ann = people.create("Ann", "correct horse")
        people.create("Bob", "correct horse")
        token = people.start_session(ann)
        blob = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        with people._database.reading() as connection:
            hashes = [row[0] for row in connection.execute("SELECT password FROM accounts")]
    assert b"correct horse" not in blob and token.encode() not in blob
    assert len(set(hashes)) == 2 and all(stored.startswith("16$8$1$") for stored in hashes)
    assert (tmp_path / "f.db").stat().st_mode & 0o077 == 0


def test_a_hash_keeps_its_own_parameters(people: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = people.create("Ann", "correct horse")
    monkeypatch.setattr(accounts, "_PARAMETERS", (2**5, 8, 1))
    assert people.verify("ann", "correct horse") == ann


def test_an_unknown_name_costs_as_much(people: Accounts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: one hash of the same cost in each case."""
    calls: list[tuple[int, ...]] = []
    real = accounts._scrypt

    def counted(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
        calls.append((n, r, p))
        return real(password, salt, n, r, p)

    people.create("Ann", "correct horse")
    people.create("Terminal only")
    monkeypatch.setattr(accounts, "_scrypt", counted)
    for name in ("ann", "bob", "terminal only"):
        assert people.verify(name, "wrong password") is None
    assert calls == [(16, 8, 1)] * 3


def test_the_real_cost_is_bearable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    started = time.process_time()
    stored = accounts._hashed("correct horse")
    assert stored.startswith("32768$8$3$") and accounts._NOBODYS.startswith("32768$8$3$")
    assert 0.02 < time.process_time() - started < 10
