"""Files and folders that appear whole or not at all.

Everything is written to a neighbour with a temporary name, synced to the disk, and renamed.
What a killed process may leave behind is such a neighbour (its name begins with a dot), never a
half-written result.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to; it replaces `path` when the block ends without error.

    Raises:
        OSError: if the disk is full or the place cannot be written; `path` is as it was before.
    """
    path = Path(path)
    with _neighbour(path) as folder:
        temporary = folder / path.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder to fill; it becomes `path` when the block ends without error.

    Args:
        path: the folder to be; its parents are made if need be.
        overwrite: replace what is there. The old folder goes only once the new one is complete.

    Raises:
        FileExistsError: if `path` is there already and `overwrite` is false.
        OSError: if the disk is full or the place cannot be written; `path` is as it was before.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name or allow overwriting")
    with _neighbour(path) as folder:
        temporary = folder / path.name
        temporary.mkdir(mode=0o755)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        replaced = folder / "replaced"
        try:
            if overwrite and path.exists():
                os.rename(path, replaced)
            os.rename(temporary, path)
        except BaseException:  # Ctrl-C between the two, too
            if replaced.exists() and not path.exists():
                os.rename(replaced, path)
            raise
        _sync(path.parent)


@contextmanager
def _neighbour(path: Path) -> Iterator[Path]:
    """A scratch folder beside `path`, on the same disk so that a rename is atomic."""
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield folder
    except SafetensorError as error:  # safetensors does not report a full disk as an OSError
        raise OSError(f"could not write {path}: {error}; nothing was left behind") from error
    except OSError as error:
        if error.errno is None:  # transformers raises such errors for reasons of its own
            raise
        message = f"could not write {path}: {error.strerror}; nothing was left behind"
        raise OSError(error.errno, message) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
