"""Writing model folders so that a crash or a full disk leaves the old one or the new one."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Give a new folder to write into; when the block ends well, put it in place of `path`.

    Everything is written beside the target and reaches the disk before it is renamed. When the
    block fails, `path` is as it was and nothing is left over.

    Yields:
        The folder to write into.

    Raises:
        OSError: If writing fails, a full disk included; with the target's name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    aside.chmod(0o755)
    old = aside.with_name(aside.name + "-old")
    try:
        yield aside
        for file in aside.rglob("*"):
            sync(file)
        sync(aside)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors hides a full disk in its own error
        reason = getattr(error, "strerror", None) or error
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"could not save {path}: {reason}") from error
    finally:
        if old.exists() and not path.exists():  # it failed, or Ctrl-C came, between the two renames
            old.rename(path)
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
