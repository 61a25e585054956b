"""Concurrency limit for restores: with more replicas than processors, they queue so that the first one serves soon.

Restores that share processors all end late. Each one uses all processors for less than a second (CRIU, the page server,
the engine's own threads, which spin while they wait for each other); four at once on two cores took longer than four in
a row.

Guarantees: a slot is released when its replica serves, fails or starts cold, so a cold start never blocks a restore. A
replica waits at most `SLOT_WAIT_S`, whatever happens to those before it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from plugin.runtime.phases import Phase, PhaseTracker

PROCESSORS_PER_RESTORE = 2
"""Processors that one restore uses: one process places pages while another, or the engine, runs."""
SLOT_WAIT_S = 10.0

_RESTORING_PHASES = frozenset({Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING})


class RestoreLimit:
    """Allow `at_once` concurrent restores; 0: one per two processors that this process may use, at least one."""

    def __init__(self, at_once: int = 0, cores: int | None = None, limit_s: float = SLOT_WAIT_S) -> None:
        cores = len(os.sched_getaffinity(0)) if cores is None else cores
        self._free = threading.Semaphore(at_once or max(1, cores // PROCESSORS_PER_RESTORE))
        self._limit_s = limit_s

    @contextlib.contextmanager
    def slot(self, tracker: PhaseTracker) -> Iterator[bool]:
        """Acquire a slot, waiting at most the limit, and yield whether it was acquired.

        The slot is released when the restore ends, at the latest on exit.
        """
        got = self._free.acquire(timeout=self._limit_s)
        once = threading.Lock()  # acquired by the first release and never released

        def end() -> None:
            if got and once.acquire(blocking=False):
                self._free.release()

        def changed(old: Phase, new: Phase, reason: str) -> None:
            if new not in _RESTORING_PHASES:
                end()

        tracker.listen(changed)
        try:
            yield got
        finally:
            tracker.unlisten(changed)
            end()
