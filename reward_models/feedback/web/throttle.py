"""How often a password may be tried. Kept in memory: a restart forgets it."""

import threading
import time
from collections import deque
from collections.abc import Callable


class Throttle:
    """Counts failed attempts in a sliding window, for each name and for all together.

    Counting by name, not by address, holds behind a proxy as well; the common count bounds what
    guessing many names costs.

    Args:
        per_name: failures of one name that are let through in a window.
        in_all: failures of all names together.
        window: its length, seconds.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        per_name: int = 5,
        in_all: int = 30,
        window: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.per_name = per_name
        self.in_all = in_all
        self.window = window
        self._clock = clock
        self._failures: deque[tuple[float, str]] = deque()  # at most `in_all`, oldest first
        self._lock = threading.Lock()

    def attempt(self, name: str) -> float:
        """Count an attempt, as failed until `succeeded` says otherwise.

        Returns:
            0 if it may be made; else the seconds until one may, and it is not counted.
        """
        with self._lock:
            now = self._clock()
            while self._failures and self._failures[0][0] <= now - self.window:
                self._failures.popleft()
            own = [when for when, who in self._failures if who == name]
            blocking = own[-self.per_name :][:1] if len(own) >= self.per_name else []
            if len(self._failures) >= self.in_all:
                blocking.append(self._failures[0][0])
            if blocking:
                return max(blocking) + self.window - now
            self._failures.append((now, name))
            return 0.0

    def succeeded(self, name: str) -> None:
        """Forget the failures of a name whose password was right."""
        with self._lock:
            kept = [failure for failure in self._failures if failure[1] != name]
            self._failures = deque(kept)
