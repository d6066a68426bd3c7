"""How often a password may be tried. Kept in memory: a restart forgets it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import NamedTuple


class _Failure(NamedTuple):
    when: float
    name: str
    address: str


class Throttle:
    """Counts failed attempts in a sliding window: by name, by client address, and by both.

    What one address does never delays another, but for attempts on one name that come from many
    addresses: they delay that name where nobody has signed in with it before. So its owner, at the
    usual address, waits a window at most, and only for failures there.

    Args:
        per_pair: failures of one name from one address that are let through in a window.
        per_name: failures of one name from all addresses together.
        per_address: failures of all names from one address.
        window: its length, seconds.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        per_pair: int = 5,
        per_name: int = 30,
        per_address: int = 30,
        window: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.per_pair = per_pair
        self.per_name = per_name
        self.per_address = per_address
        self.window = window
        self._clock = clock
        self._failures: deque[_Failure] = deque()  # oldest first
        self._usual: set[tuple[str, str]] = set()  # names where they have signed in
        self._lock = threading.Lock()

    def attempt(self, name: str, address: str) -> float:
        """Count an attempt, as failed until `succeeded` says otherwise.

        Returns:
            0 if it may be made; else the seconds until one may, and it is not counted.
        """
        address = _one_client(address)
        with self._lock:
            now = self._clock()
            while self._failures and self._failures[0].when <= now - self.window:
                self._failures.popleft()
            mine = [f.when for f in self._failures if f.name == name]
            here = [f.when for f in self._failures if f.address == address]
            both = [f.when for f in self._failures if f.name == name and f.address == address]
            counts = [(both, self.per_pair), (here, self.per_address)]
            if (name, address) not in self._usual:
                counts.append((mine, self.per_name))
            blocking = [times[-most] for times, most in counts if len(times) >= most]
            if blocking:
                return max(blocking) + self.window - now
            self._failures.append(_Failure(now, name, address))
            return 0.0

    def succeeded(self, name: str, address: str) -> None:
        """Forget the failures of a name at an address where its password was right."""
        address = _one_client(address)
        with self._lock:
            self._usual.add((name, address))
            self._failures = deque(
                f for f in self._failures if (f.name, f.address) != (name, address)
            )


def _one_client(address: str) -> str:
    """The address, or of an IPv6 address the /64, all of which one client may have."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if not isinstance(parsed, IPv6Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(IPv6Network((int(parsed), 64), strict=False).network_address)
