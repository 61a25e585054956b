"""Logging: one line per event on standard error, which a detached daemon redirects to its log file."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable


def configure(role: str) -> None:
    """Send the process's log records to standard error as `time role level message`.

    SIGUSR1 dumps the stacks of all threads there, to diagnose a mount that seems stuck.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request


class RepeatLimiter:
    """Rate-limit repeated log messages. Thread-safe.

    The first event of a kind is logged at once; later ones are counted and logged once per `every_s` seconds. A store that
    is down for an hour fails thousands of times for one reason.
    """

    def __init__(self, log: logging.Logger, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self.every_s = every_s
        self.clock = clock
        self._kinds: dict[str, tuple[float, int, int, str]] = {}
        self._lock = threading.Lock()

    def log(self, level: int, kind: str, message: str) -> None:
        """Record an event of this kind; log it if it is the first of `every_s` seconds."""
        self.tick()
        now = self.clock()
        with self._lock:
            since, level_before, count, _ = self._kinds.get(kind, (-1.0, level, 0, ""))
            first = since < 0
            self._kinds[kind] = (now if first else since, max(level, level_before), 0 if first else count + 1, message)
        if first:
            self._log.log(level, "%s", message)

    def tick(self) -> None:
        """Log the repeats counted since the kind was last logged, once `every_s` has passed.

        `log` calls it; called periodically as well, it logs counts that no later event follows. A kind without new events is
        forgotten, so that its next event is logged at once.
        """
        now, said = self.clock(), []
        with self._lock:
            for kind, (since, level, count, message) in list(self._kinds.items()):
                if now - since < self.every_s:
                    continue
                if count:
                    said.append((level, count, message))
                    self._kinds[kind] = (now, level, 0, message)
                else:
                    del self._kinds[kind]
        for level, count, message in said:
            self._log.log(level, "%d more like this one within %.0f s: %s", count, self.every_s, message)
