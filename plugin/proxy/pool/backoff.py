"""Compute the pause before a failed operation is retried."""

from __future__ import annotations

import time
from collections.abc import Callable


class Backoff:
    """Pauses that double with each failure in a row, from `first_s` up to `most_s` seconds.

    A success resets the pause, and so does a time without failures of twice `most_s`.
    """

    def __init__(self, first_s: float, most_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.first_s, self.most_s = first_s, most_s
        self.failures = 0
        self._clock = clock
        self._until = self._last = 0.0

    def failed(self, at_least_s: float = 0.0) -> float:
        """Record a failure and return the seconds to wait before the next try."""
        now = self._clock()
        if now - self._last > 2 * self.most_s + at_least_s:
            self.failures = 0
        self.failures += 1
        pause: float = min(self.most_s, self.first_s * 2 ** min(self.failures - 1, 30))
        pause = max(pause, at_least_s)
        self._last, self._until = now, now + pause
        return pause

    def hold(self, pause_s: float) -> None:
        """Pause for `pause_s` seconds, as computed by another process."""
        self._until = self._clock() + pause_s

    def succeeded(self) -> None:
        """Reset the failure count and the pause."""
        self.failures = 0
        self._until = 0.0

    @property
    def left_s(self) -> float:
        """Return the seconds until the next try, 0 if it is due."""
        return max(0.0, self._until - self._clock())
