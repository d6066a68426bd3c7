"""Checkpoints on disk: whole or not at all, whatever happens while one is written or lies there."""

import builtins
import contextlib
import json
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch as th
from safetensors.torch import load_file

from agents import CheckpointStore, DamagedCheckpoint, newest_whole
from agents.checkpoint import DTYPES, read_checkpoint, verify, write_checkpoint
from agents.checkpoint_store import checkpoints_in, one_before, one_process

TENSORS = {
    "policy": {f"{dtype}": th.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    | {"empty": th.zeros(0, 4), "number": th.tensor(2.5), "transposed": th.rand(3, 5).T},
    "optimizer": {"0.step": th.tensor(3.0), "0.exp_avg": th.rand(40)},
}
STATE = {"step": 12, "nan": float("nan"), "text": "é\ud800", "bits": 0.1 + 0.2}


def write(path: Path, step: int = 12) -> None:
    write_checkpoint(path, {**STATE, "step": step}, TENSORS)


def test_what_is_read_is_what_was_written(tmp_path) -> None:
    write(tmp_path / "a")
    state, tensors = read_checkpoint(tmp_path / "a")
    assert repr(state) == repr(STATE)
    assert set(tensors) == {"policy", "optimizer"}
    for file, part in TENSORS.items():
        for name, tensor in part.items():
            assert tensors[file][name].dtype == tensor.dtype
            assert th.equal(tensors[file][name], tensor), name
    assert set(load_file(tmp_path / "a" / "policy.safetensors")) == set(TENSORS["policy"])


# ------------------------------------------------------------------ damage


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_a_thousand_bit_flips_are_refused_by_file_name(tmp_path) -> None:
    write(path := tmp_path / "a")
    chance = random.Random(0)
    for _ in range(1000):
        file = chance.choice(files_of(path))
        before = file.read_bytes()
        data = bytearray(before)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        with pytest.raises(DamagedCheckpoint, match=file.name.replace(".", r"\.")):
            verify(path)
        file.write_bytes(before)
    verify(path)


def test_two_hundred_truncations_are_refused_by_file_name(tmp_path) -> None:
    write(path := tmp_path / "a")
    chance = random.Random(0)
    for _ in range(200):
        file = chance.choice(files_of(path))
        before = file.read_bytes()
        file.write_bytes(before[: chance.randrange(len(before))])
        with pytest.raises(DamagedCheckpoint, match=file.name.replace(".", r"\.")):
            read_checkpoint(path)
        file.write_bytes(before)
    verify(path)


def test_each_missing_file_is_named_and_the_one_before_is_found(tmp_path) -> None:
    write(tmp_path / "step-00000001")
    write(path := tmp_path / "step-00000002")
    for file in files_of(path):
        file.rename(tmp_path / "kept")
        with pytest.raises(DamagedCheckpoint, match=f"{file.name} is missing"):
            verify(path)
        assert one_before(path) == tmp_path / "step-00000001"
        with pytest.warns(
            UserWarning, match=f"{file.name} is missing: the one before, .*00001, is"
        ):
            assert newest_whole(tmp_path) == tmp_path / "step-00000001"
        (tmp_path / "kept").rename(file)
    assert newest_whole(tmp_path) == path
    shutil.rmtree(path)
    (tmp_path / "step-00000001" / "state.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"got none: .*state.json is missing"):
        newest_whole(tmp_path)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path) -> None:
    write(path := tmp_path / "a")
    from agents.checkpoint import _manifest

    files = json.loads((path / "manifest.json").read_text())["files"]
    files["../a/state.json"] = files["state.json"]
    (path / "manifest.json").write_bytes(_manifest(files))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json does not name"):
        verify(path)


# ------------------------------------------------------------------ faults while writing


class Crash(BaseException):
    """The process is gone: nothing runs any more."""


class Faults:
    """Counts file operations, and lets the n-th fail: once, or, as after a crash, all from it."""

    NAMES = ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "scandir", "close")

    def __init__(self, monkeypatch, fail_at: int, crash: bool) -> None:
        self.n, self.fail_at, self.crash, self.on = 0, fail_at, crash, True
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self.counted(builtins.open, self.file))

    def counted(self, function, wrap=lambda x: x):
        def call(*args, **kwargs):
            self.count()
            return wrap(function(*args, **kwargs))

        return call

    def count(self) -> None:
        if not self.on:
            return
        self.n += 1
        if self.crash and self.n >= self.fail_at:
            raise Crash
        if self.n == self.fail_at:
            raise OSError(28, "No space left on device")

    def file(self, file):
        faults = self

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                faults.count()
                return file.write(data)

            def flush(self):
                faults.count()
                return file.flush()

        return File()


def put(folder: Path, step: int) -> None:
    CheckpointStore(folder, keep=2).put(step, lambda path: write(path, step))


@pytest.mark.parametrize("crash", [False, True], ids=["OSError", "crash"])
def test_a_fault_at_every_file_operation_of_a_save(tmp_path, monkeypatch, crash) -> None:
    n_faults, fail_at, done = 0, 0, False
    while not done:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        for step in (1, 2, 3):  # two are kept: the next save removes one
            put(folder, step)
        with monkeypatch.context() as patch:
            faults = Faults(patch, fail_at, crash)
            reported = False
            try:
                put(folder, 4)
                reported = True
            except (OSError, Crash) as error:
                n_faults += 1
                if isinstance(error, OSError):
                    assert "could not save" in str(error) and "step-00000004" in str(error)
            done = faults.n < fail_at
            faults.on = False
        newest = newest_whole(folder)  # no warning: nothing that is there is torn
        assert newest.name == "step-00000004" if reported else newest.name >= "step-00000003"
        assert read_checkpoint(folder / "step-00000003")[0]["step"] == 3
        put(folder, 5)
        assert [p.name for p in checkpoints_in(folder)][-1] == "step-00000005"
        names = {p.name for p in folder.iterdir()}
        assert len(names) == 2 and not any(name.startswith(".") for name in names), names
    assert n_faults > 20


@pytest.mark.parametrize("crash", [False, True], ids=["OSError", "crash"])
def test_a_fault_while_a_checkpoint_is_replaced(tmp_path, monkeypatch, crash) -> None:
    """The same name again: the old one or the new one is there, at every moment."""
    fail_at, done = 0, False
    while not done:
        fail_at += 1
        path = tmp_path / str(fail_at) / "model"
        write(path, 1)
        with monkeypatch.context() as patch:
            faults = Faults(patch, fail_at, crash)
            with contextlib.suppress(OSError, Crash):
                write(path, 2)
            done = faults.n < fail_at
            faults.on = False
        assert read_checkpoint(path)[0]["step"] in ((2,) if done else (1, 2))
        write(path, 3)
        assert read_checkpoint(path)[0]["step"] == 3
        assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_one_before_and_nothing_else(tmp_path) -> None:
    """The limit on a file's size stands for the disk's: a write fails half-way."""
    write(path := tmp_path / "a", 1)
    before = {file.name: file.read_bytes() for file in files_of(path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match=r"could not save .*/a: ") as error:
            write(path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in files_of(path)} == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match="is no checkpoint: choose another name"):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------ a run's store


def test_the_last_few_and_the_best_are_kept(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(1, 7):
        store.put(step, lambda path, step=step: write(path, step))
        if step == 2:
            store.set_best({"checkpoint": "step-00000002", "value": 1.0})
    assert [p.name[-1] for p in checkpoints_in(tmp_path)] == ["2", "5", "6"]
    assert store.best() == tmp_path / "step-00000002"
    store.set_best(None)
    store.prune()
    assert [p.name[-1] for p in checkpoints_in(tmp_path)] == ["5", "6"]
    with pytest.raises(ValueError, match="keep >= 1 checkpoints, got 0"):
        CheckpointStore(tmp_path, keep=0)


def test_one_process_has_a_run_folder(tmp_path) -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with one_process(tmp_path):
            os.write(writes, b"x")
            signal.pause()
        os._exit(0)
    os.read(reads, 1)
    try:
        in_use = pytest.raises(RuntimeError, match=f"in use by process {child}: wait for its end")
        with in_use, one_process(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    with one_process(tmp_path):
        assert (tmp_path / ".lock").read_text().strip() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
