"""Files and folders appear whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import agents.saving
import reward_models.atomic
from agents.saving import replaced_folder
from reward_models.atomic import atomic_file, atomic_folder


def test_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "run") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("x")
        assert not (tmp_path / "a" / "run").exists()
    assert (tmp_path / "a" / "run" / "part" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["run"]


def test_existing_folder_is_kept_unless_overwriting(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "old").touch()
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True) as folder:
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").touch()
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("n_before", [0, 1])
def test_between_two_renames_the_old_folder_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], n_before: int
) -> None:
    """Either rename fails, or Ctrl-C comes before or after it, in both packages' folders."""
    for package, write in (
        (reward_models.atomic, lambda path: atomic_folder(path, overwrite=True)),
        (agents.saving, replaced_folder),
    ):
        target = tmp_path / package.__name__ / "model"
        target.mkdir(parents=True)
        (target / "old").touch()
        calls, rename = [], os.rename

        def failing(a, b, calls=calls, rename=rename) -> None:
            calls.append(a)
            if len(calls) == n_before + 1:
                raise error
            rename(a, b)

        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, OSError)):
            patch.setattr(os, "rename", failing)
            patch.setattr(Path, "rename", failing)
            with write(target) as folder:
                (folder / "new").touch()
        assert os.listdir(target) == ["old"]
        assert os.listdir(target.parent) == ["model"]


def test_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    message = f"could not write {path}: No space left on device; nothing was left behind"
    with pytest.raises(OSError, match=message) as caught, atomic_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX file size limit")
def test_disk_that_fills_while_a_model_is_saved(tmp_path: Path) -> None:
    """The real thing: the kernel refuses to write more than 100 kB of a 400 kB model."""
    code = """
import resource, signal, sys
import numpy as np
from safetensors.numpy import save_file
from reward_models.atomic import atomic_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with atomic_folder(sys.argv[1]) as folder:
    save_file({"w": np.zeros(100_000, dtype=np.float32)}, folder / "model.safetensors")
"""
    target = tmp_path / "model"
    command = [sys.executable, "-c", code, str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("OSError") and f"could not write {target}" in last_line
    assert os.listdir(tmp_path) == []
