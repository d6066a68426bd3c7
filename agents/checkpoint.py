"""A checkpoint on disk: a folder of safetensors and JSON, there whole or not at all.

Everything is written aside and reaches the disk, a manifest with the digest of each file comes
last, then the folder is renamed into place. Nothing is pickled, and nothing that is loaded can
run code. What the tensors and the JSON mean is no business of this module.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch as th
from safetensors.torch import load_file

from agents.saving import sync

FORMAT = "rlhf-gym checkpoint, 1"
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", ".safetensors"
CHUNK = 2**22

DTYPES = {
    th.float64: "F64", th.float32: "F32", th.bfloat16: "BF16", th.float16: "F16",
    th.int64: "I64", th.int32: "I32", th.int16: "I16", th.int8: "I8", th.uint8: "U8",
    th.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in safetensors' format."""

Tensors = dict[str, dict[str, th.Tensor]]
"""Tensors by file (its name without `.safetensors`) and by their own name."""


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was written: a file is missing, cut, or changed."""


def write_checkpoint(path: str | Path, state: Mapping[str, Any], tensors: Tensors) -> None:
    """Write a checkpoint; when this returns, it is on the disk and stays there.

    A checkpoint that is there already is replaced, and readable at every moment in between.

    Args:
        path: The folder to be.
        state: JSON types.
        tensors: What goes to which file.

    Raises:
        FileExistsError: If something else than a checkpoint has the name.
        OSError: If writing fails, a full disk included; with the checkpoint's name. What was there
            is as it was, and nothing is left over.
    """
    path = Path(path)
    aside = _beside(path, f"writing-{os.getpid()}")
    if path.exists() and not (path / MANIFEST).exists():
        raise FileExistsError(f"{path} exists and is no checkpoint: choose another name")
    try:
        made = _make_parents(path)
        _sweep(path)
        aside.mkdir()
        text = json.dumps(state, ensure_ascii=False).encode("utf-8", "surrogatepass")
        files = {STATE: _write(aside / STATE, [text])}
        for name, part in tensors.items():
            files[name + TENSORS] = _write(aside / (name + TENSORS), _safetensors(part))
        _write(aside / MANIFEST, [_manifest(files)])
        sync(aside)
        _put_in_place(aside, path)
        for folder in made:
            sync(folder.parent)
    except OSError as error:
        number = error.errno or errno.EIO
        raise OSError(number, f"could not save {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Tensors]:
    """Verify a checkpoint and read it: its state and its tensors.

    Raises:
        FileNotFoundError: If there is none.
        DamagedCheckpoint: If it is not what was written, with the name of the file.
    """
    folder = found_at(path)
    files = verify(folder)
    tensors = {
        name.removesuffix(TENSORS): load_file(folder / name)
        for name in files
        if name.endswith(TENSORS)
    }
    return _state_in(folder), tensors


def read_state(path: str | Path) -> dict[str, Any]:
    """Verify a checkpoint's state, and read it alone, without the tensors."""
    folder = found_at(path)
    verify(folder, [STATE])
    return _state_in(folder)


def _state_in(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE).read_text("utf-8", "surrogatepass"))
    return state


def found_at(path: str | Path) -> Path:
    """Return the folder that holds a checkpoint: another if a crash came between two renames.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    for folder in (path, _beside(path, "old")):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"expected a checkpoint, got {str(path)!r}, which is no folder")


def verify(path: Path, names: Iterable[str] | None = None) -> list[str]:
    """Compare a checkpoint with its manifest; return the names of its files.

    Args:
        path: The checkpoint.
        names: Compare these files only.

    Raises:
        DamagedCheckpoint: If they differ, with the name of the file.
    """
    files = _read_manifest(path)
    for name in files if names is None else names:
        expected = files[name]
        if not (path / name).is_file():
            raise DamagedCheckpoint(f"{path}: {name} is missing")
        size = (path / name).stat().st_size
        if size != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{path}: {name} is damaged: expected {expected['bytes']} bytes, got {size}"
            )
        if _digest(path / name) != expected["sha256"]:
            raise DamagedCheckpoint(f"{path}: {name} is damaged: its sha256 is not the manifest's")
    return list(files)


def _manifest(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the manifest's text, which ends with a digest of itself."""
    content: dict[str, Any] = {"format": FORMAT, "files": files}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True).encode()


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is missing")
    text = manifest.read_bytes()
    try:
        content = json.loads(text)
        files, format_ = content["files"], content["format"]
        whole = _manifest(files) == text
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        content = text.decode("utf-8", "replace")
        if '"format"' in content and FORMAT not in content and text.rstrip().endswith(b"}"):
            raise DamagedCheckpoint(
                f"{path}: {MANIFEST} is damaged, or of another format than {FORMAT!r}"
            )
        raise DamagedCheckpoint(f"{path}: {MANIFEST} is damaged")
    assert format_ == FORMAT
    for name in (STATE, *files):
        if name not in files or Path(name).name != name:
            raise DamagedCheckpoint(f"{path}: {MANIFEST} does not name the files of a checkpoint")
    return files


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file through to the disk; return what the manifest says of it."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, th.Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a file in safetensors' format, piece by piece: it needs no second copy in memory."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        plain = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield memoryview(plain.view(th.uint8).numpy())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _put_in_place(new: Path, place: Path) -> None:
    """Rename a finished folder; what was there goes only once the new one is on the disk."""
    old = _beside(place, "old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    try:
        new.rename(place)
    except OSError:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_parents(path: Path) -> list[Path]:
    """Make the folders above a path; return those that were not there."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _sweep(path: Path) -> None:
    """Remove what processes that are no more left of this checkpoint."""
    for left in path.parent.glob(f".{path.name}.writing-*"):
        if not _is_running(left.name.rpartition("-")[2]):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: str) -> bool:
    """Say whether another process has this number."""
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")
