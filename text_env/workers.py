"""Environments in processes of their own, watched: a dead, stopped or silent one is an error.

By itself, Stable-Baselines3's `SubprocVecEnv` (2.9) waits for ever for a worker that is stopped,
and for one that was killed or that raised if workers are forked; else it raises an `EOFError`
without a word, and then waits for ever in `close`. Gymnasium's `AsyncVectorEnv` (1.4) hands an
environment's error on without saying whose it is, and otherwise does as SB3 does. Both are left as
they are but for the ends of their pipes. While an `AsyncVectorEnv` is made it is not watched.
"""

import os
import shutil
import signal
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import SubprocVecEnv

VecT = TypeVar("VecT")
EnvFn = Callable[[], gym.Env[Any, Any]]


class WorkerError(RuntimeError):
    """A worker of a batch of environments is dead or does not answer; all of them were ended."""


def watch(envs: VecT, seconds: float = 9.0) -> VecT:
    """Let a batch of environments in processes raise `WorkerError` where it would hang.

    The error names the worker and what became of it. All workers are killed first, so that no
    orphan is left and `close` does not wait.

    Args:
        envs: A `SubprocVecEnv` or an `AsyncVectorEnv`; it is changed in place.
        seconds: How long a worker may take for one answer; a reset or step that needs longer is
            taken for a hang.

    Returns:
        The same object.

    Raises:
        TypeError: It is another kind of batch.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected a number > 0, got {seconds}")
    name = next((n for n in ("remotes", "parent_pipes") if hasattr(envs, n)), None)
    if name is None or not hasattr(envs, "processes"):
        raise TypeError(f"expected a SubprocVecEnv or an AsyncVectorEnv, got {type(envs).__name__}")
    pipes = getattr(envs, name)
    setattr(envs, name, type(pipes)(_watched(pipes, envs, seconds, ())))
    if hasattr(envs, "error_queue"):
        envs._raise_if_errors = lambda successes: _raise_if_errors(envs, successes)  # type: ignore[attr-defined]
    return envs


def watched_subproc_vec_env(
    env_fns: Sequence[EnvFn],
    seconds: float = 9.0,
    start_method: str | None = None,
    start_seconds: float = 300.0,
) -> "SubprocVecEnv":
    """An SB3 `SubprocVecEnv`, watched, whose errors also tell what a worker's environment raised.

    Args:
        env_fns: As for `SubprocVecEnv`.
        seconds: As for `watch`.
        start_method: As for `SubprocVecEnv`.
        start_seconds: How long a worker may take to start, in which it imports what it needs and
            makes its environment.

    Raises:
        WorkerError: An environment could not be made.
    """
    from stable_baselines3.common.vec_env import SubprocVecEnv

    if not (seconds > 0 and start_seconds > 0):
        raise ValueError(f"seconds: expected numbers > 0, got {seconds} and {start_seconds}")
    folder = Path(tempfile.mkdtemp(prefix="workers-"))
    reports = [folder / str(number) for number in range(len(env_fns))]

    class WatchedSubprocVecEnv(SubprocVecEnv):
        """SB3's, whose pipes are watched from the moment it makes them."""

        @property
        def remotes(self) -> tuple[Any, ...]:
            return self._remotes

        @remotes.setter
        def remotes(self, pipes: Sequence[Connection]) -> None:
            self._remotes = _watched(pipes, self, start_seconds, reports)

        def close(self) -> None:
            super().close()
            shutil.rmtree(folder, ignore_errors=True)

    told = [_Reporting(fn, path) for fn, path in zip(env_fns, reports, strict=True)]
    try:
        envs = WatchedSubprocVecEnv(told, start_method)
    except WorkerError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(envs, shutil.rmtree, folder, ignore_errors=True)  # if it is never closed
    for pipe in envs.remotes:
        pipe.seconds = seconds
    return envs


def _watched(
    pipes: Sequence[Connection], envs: Any, seconds: float, reports: Sequence[Path]
) -> tuple["_WatchedPipe", ...]:
    return tuple(
        _WatchedPipe(pipe, envs, number, seconds, reports[number] if reports else None)
        for number, pipe in enumerate(pipes)
    )


class _WatchedPipe:
    """The parent's end of a worker's pipe, which does not wait longer than it may."""

    def __init__(
        self, pipe: Connection, envs: Any, number: int, seconds: float, report: Path | None
    ) -> None:
        self._pipe, self._envs, self._number = pipe, envs, number
        self.seconds, self._report = seconds, report

    def recv(self) -> Any:
        """Return the worker's answer, or raise `WorkerError`."""
        process: BaseProcess = self._envs.processes[self._number]
        try:
            wait([self._pipe, process.sentinel], self.seconds)
            if self._pipe.poll():
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._failure() from error
        raise self._failure()

    def send(self, message: Any) -> None:
        """Ask the worker for something, or raise `WorkerError`."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._failure() from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to a worker, which closes it, as the plain pipe."""
        return _plain, (self._pipe,)

    def _failure(self) -> WorkerError:
        process: BaseProcess = self._envs.processes[self._number]
        process.join(0.5)  # a pipe can end a moment before its process does
        cause = _what_became_of(process, self.seconds)
        if said := _read(self._report):
            cause = f"raised {said}"
        return _end(self._envs, self._number, cause)


def _plain(pipe: Connection) -> Connection:
    return pipe


class _Reporting:
    """Makes an environment that writes to a file what it raises, before the worker dies of it."""

    def __init__(self, env_fn: EnvFn, report: Path) -> None:
        self.env_fn, self.report = env_fn, report

    def __call__(self) -> gym.Env[Any, Any]:
        try:
            return _ReportingEnv(self.env_fn(), self.report)
        except Exception as error:
            _write(self.report, error)
            raise


class _ReportingEnv(gym.Wrapper[Any, Any, Any, Any]):
    """Hands everything through, and writes down errors."""

    def __init__(self, env: gym.Env[Any, Any], report: Path) -> None:
        super().__init__(env)
        self._report = report

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Reset the environment."""
        return self._told(lambda: self.env.reset(**arguments))

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment."""
        return self._told(lambda: self.env.step(action))

    def _told(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            _write(self._report, error)
            raise


def _raise_if_errors(envs: Any, successes: Iterable[bool]) -> None:
    """Do what `AsyncVectorEnv` does with its workers' errors, naming the first worker."""
    if np.all(list(successes)):
        return
    number, kind, error, trace = envs.error_queue.get()
    cause = f"raised {kind.__name__}: {error}\n{trace}"
    raise _end(envs, number, cause) from (error if isinstance(error, Exception) else None)


def _end(envs: Any, number: int, cause: str) -> WorkerError:
    """Kill all workers, stopped ones too, and make the error that says why."""
    pid = envs.processes[number].pid
    for process in envs.processes:
        process.kill()
    for process in envs.processes:
        process.join(5)
    for pipe in getattr(envs, "remotes", getattr(envs, "parent_pipes", ())):
        if pipe is not None:
            pipe.close()
    envs.closed, envs.waiting = True, False
    return WorkerError(f"worker {number} (process {pid}) {cause}; all workers were ended")


def _what_became_of(process: BaseProcess, seconds: float) -> str:
    code = process.exitcode
    if code is None:
        stopped = _state(process.pid) in ("T", "t")
        how = "is stopped (SIGSTOP)" if stopped else "hangs"
        return f"{how}: no answer within {seconds:g} s"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}; what it raised is on stderr"


def _state(pid: int | None) -> str:
    """The letter for a process's state, where the system tells (Linux)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _write(report: Path, error: Exception) -> None:
    text = "".join(traceback.format_exception_only(error)).strip()
    place = "".join(traceback.format_tb(error.__traceback__)[-2:])
    try:
        aside = report.with_suffix(f".{os.getpid()}")
        aside.write_text(f"{text}\n{place}", encoding="utf-8", errors="replace")
        aside.rename(report)
    except OSError:  # the worker's own traceback is on stderr still
        return


def _read(report: Path | None) -> str:
    try:
        return "" if report is None else report.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
