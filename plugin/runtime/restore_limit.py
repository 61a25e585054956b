"""Turns: where replicas outnumber the processors, they are restored one after the other, so that the first serves soon.

Restores that share processors all end late: each takes the whole host's processors for less than a second (CRIU, the page server, the
engine's own threads, which wait for each other by spinning), and four of them at once on two cores took longer together than in a row.
Promises: a turn ends when its replica serves, fails, or starts cold, so nobody waits for a cold start; and nobody waits longer than
`TURN_LIMIT_S`, whatever becomes of those before.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from plugin.runtime.phases import Phase, PhaseTracker

CORES_A_RESTORE = 2
"""What one restore keeps busy: pages are placed by one process while another, or the engine, runs."""
TURN_LIMIT_S = 10.0

_IN_TURN = frozenset({Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING})


class Turns:
    """So many restores `at_once`; 0: as many as the processors this process may use allow, one for every two, at least one."""

    def __init__(self, at_once: int = 0, cores: int | None = None, limit_s: float = TURN_LIMIT_S) -> None:
        cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._free = threading.Semaphore(at_once or max(1, cores // CORES_A_RESTORE))
        self._limit_s = limit_s

    @contextlib.contextmanager
    def turn(self, tracker: PhaseTracker) -> Iterator[bool]:
        """Wait for a turn, at most the limit; whether it is one. It ends with the restore, at the latest with the block."""
        got = self._free.acquire(timeout=self._limit_s)
        once = threading.Lock()  # locked for good by whichever end comes first

        def end() -> None:
            if got and once.acquire(blocking=False):
                self._free.release()

        def changed(old: Phase, new: Phase, reason: str) -> None:
            if new not in _IN_TURN:
                end()

        tracker.listen(changed)
        try:
            yield got
        finally:
            tracker.unlisten(changed)
            end()
