"""The checkpoints of a run: the last few and the best are kept, by one process at a time."""

import errno
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agents.checkpoint import DamagedCheckpoint, found_at, verify
from agents.saving import sync

PREFIX, BEST, LOCK = "step-", "best.json", ".lock"


class CheckpointStore:
    """A folder of checkpoints, `step-00012345/` each, and `best.json`, which names one of them."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        """Keep the last `keep` checkpoints, and the best, in `folder`.

        Raises:
            ValueError: If none is to be kept.
        """
        if keep < 1:
            raise ValueError(f"expected keep >= 1 checkpoints, got {keep}")
        self.folder, self.keep = Path(folder), keep

    def put(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` make the checkpoint of a step; then older ones go.

        A damaged one of the same step, or what a crash left behind, is removed before. When this
        returns, the checkpoint is on the disk; nothing that fails later takes it away.

        Args:
            step: Tokens so far.
            write: Makes a checkpoint at a path.
        """
        path = self.path_of(step)
        if path.exists() and not is_whole(path):
            discard(path)
        write(path)
        with suppress(OSError):  # what should go stays, whole, and goes the next time
            self.prune(step)
        return path

    def path_of(self, step: int) -> Path:
        """Return where the checkpoint of a step is, if there is one."""
        return self.folder / f"{PREFIX}{step:08d}"

    def prune(self, step: int | None = None) -> None:
        """Remove all but the last few and the best, and what crashes left behind.

        Args:
            step: The last ones are those up to this step (tokens); of later ones, from before the
                run went on from an earlier one, the damaged go. None: the last of all.
        """
        best, found = self.best(), checkpoints_in(self.folder)
        if step is not None:
            later = [path for path in found if (step_of(path) or 0) > step]
            found = found[: len(found) - len(later)]
            for path in later:
                if not is_whole(path):
                    discard(path)
        for path in found[: -self.keep]:
            if best is None or path != best:
                discard(path)
        for left in self.folder.glob(f".{PREFIX}*"):
            whole = left.name.endswith(".old") and not found_at_name(left).exists()
            if not whole:
                shutil.rmtree(left, ignore_errors=True)

    def require_none_after(self, step: int) -> None:
        """Refuse a folder that has another training's checkpoints, or this one's of another course.

        Raises:
            FileExistsError: If there is a whole one of a later step (tokens).
        """
        for path in reversed(checkpoints_in(self.folder)):
            if (step_of(path) or 0) > step and is_whole(found_at(path)):
                raise FileExistsError(
                    f"{path} is of a later step than this training, which is at {step} tokens: go "
                    "on from it, remove the later ones, or choose another folder"
                )

    def best(self) -> Path | None:
        """Return the best checkpoint, if it is known."""
        facts = self.best_facts()
        path = None if facts is None else self.folder / str(facts.get("checkpoint"))
        return path if path is not None and path.is_dir() else None

    def best_facts(self) -> dict[str, Any] | None:
        """Return what `best.json` says: checkpoint, key and value."""
        try:
            facts = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None

    def set_best(self, facts: dict[str, Any] | None) -> None:
        """Write `best.json`, whole or not at all; None removes it."""
        if facts == self.best_facts():
            return
        place, aside = self.folder / BEST, self.folder / f".{BEST}"
        if facts is None:
            place.unlink(missing_ok=True)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        sync(aside)
        os.replace(aside, place)
        sync(self.folder)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Return a folder's checkpoints, whole or not, the oldest first."""
    named = [path for path in Path(folder).glob(f"{PREFIX}*") if step_of(path) is not None]
    for left in Path(folder).glob(f".{PREFIX}*.old"):  # a crash came between two renames
        if not found_at_name(left).exists():
            named.append(found_at_name(left))
    return sorted(named, key=lambda path: step_of(path) or 0)


def newest_whole(folder: str | Path, before: int | None = None) -> Path:
    """Return a folder's newest checkpoint that is whole; warn of newer ones that are not.

    Args:
        folder: Of `CheckpointStore`.
        before: Only consider those of earlier steps (tokens).

    Raises:
        FileNotFoundError: If there is none.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints_in(folder)):
        if before is not None and (step_of(path) or 0) >= before:
            continue
        try:
            verify(found_at(path))
        except (DamagedCheckpoint, OSError) as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}: the one before, {path}, is taken", stacklevel=2)
        return path
    found = f": {'; '.join(damaged)}" if damaged else ""
    raise FileNotFoundError(f"expected a whole checkpoint in {folder}, got none{found}")


def one_before(path: str | Path) -> Path | None:
    """Return the newest whole checkpoint beside a damaged one that is older than it."""
    step = step_of(Path(path))
    try:
        return None if step is None else newest_whole(Path(path).parent, before=step)
    except FileNotFoundError:
        return None


def step_of(path: Path) -> int | None:
    """Return the step of a checkpoint by its name; None if it is not one of a store."""
    digits = path.name.removeprefix(PREFIX)
    named = path.name.startswith(PREFIX) and digits.isdecimal() and digits.isascii()
    return int(digits) if named else None


def is_whole(path: Path) -> bool:
    """Say whether a checkpoint is what was written."""
    try:
        verify(path)
    except (DamagedCheckpoint, OSError):
        return False
    return True


def discard(path: Path) -> None:
    """Remove a checkpoint: out of sight at once, so that a crash leaves no half of it."""
    gone = path.with_name(f".{path.name}.gone")
    try:
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
    except OSError:
        return  # it stays, whole, and goes the next time
    shutil.rmtree(gone, ignore_errors=True)


def found_at_name(left: Path) -> Path:
    """Return the checkpoint that something beside it, `.step-….old`, belongs to."""
    return left.with_name(left.name[1:].removesuffix(".old"))


@contextmanager
def one_process(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; the system lets go of it when the process ends.

    Raises:
        RuntimeError: If another process has it, with its number.
    """
    place = Path(folder) / LOCK
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked(place)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        place.unlink(missing_ok=True)
        os.close(handle)


def _locked(place: Path) -> int:
    """Open and lock a file; again, if its last holder has removed it meanwhile."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Unlike flock's, children that are forked do not inherit it.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.fstat(handle).st_ino == place.stat().st_ino:
                return handle
        except OSError as error:
            holder = os.read(handle, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise RuntimeError(
                f"{place.parent} is in use by process {holder}: wait for its end, stop it, or "
                "choose another run folder"
            ) from None
        os.close(handle)
