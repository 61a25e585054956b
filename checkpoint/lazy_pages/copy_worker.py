"""The second copier: a thread that places large extents of the working set on another core.

Meanwhile the daemon's thread serves faults and small extents. The second copier cannot corrupt memory that this thread
guards (see fault_handler). It places an extent only while it holds the space's `placing` lock, and the daemon reads a
space's events only while it holds that lock. So no event is read between this thread's check of `changed` and the
kernel's answer. Once an event that changes a mapping was read, `changed` is set and this thread skips the space. It
does not modify the daemon's tables: placed extents go into `done`, and the daemon cuts its map and counts. Until then
the map still lists such pages, and the kernel refuses to place them again (EEXIST).

Standard library only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import Space
from checkpoint.lazy_pages.copy_plan import Plan

LARGE = 128 << 10
"""Smallest extent in bytes worth passing to this thread. Below, interpreter overhead dominates."""
_PAUSE_S = 0.0005


class SecondCopier(threading.Thread):
    """Places the large extents of the submitted (space, plan) pairs, beginning at each plan's end."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__(name="second-copier", daemon=True)
        self.done: deque[tuple[Space, Plan, int, bool]] = deque()
        """(space, plan, extent, whether it was placed), for the daemon to collect after `notify`."""
        self._jobs: deque[tuple[Space, Plan]] = deque()
        self._more = threading.Event()
        self._stopping = False
        self._notify = notify
        self.failure = ""
        """Why this thread ended without `stop`. Its reserved extents are then never placed."""

    def submit(self, space: Space, plan: Plan) -> None:
        """Add a plan whose sources are in the page cache."""
        self._jobs.append((space, plan))
        self._more.set()

    def stop(self) -> None:
        """End the thread after its current extent, if any, which it places only in a space that is still open."""
        self._stopping = True
        self._more.set()

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # noqa: BLE001 - the daemon raises it
            self.failure = repr(error)
            self._notify()

    def _run(self) -> None:
        while not self._stopping:
            if not self._jobs:
                self._more.wait()
                self._more.clear()
                continue
            space, plan = self._jobs.popleft()
            refused = False
            for index in range(len(plan.starts) - 1, -1, -1):
                if plan.zero[index] or plan.ends[index] - plan.starts[index] < LARGE or plan.done[index]:
                    continue
                with space.placing:
                    if space.changed or not space.open or self._stopping:
                        break
                    plan.claim(index)
                    code = uffd.request(space.fd, plan.address + uffd.REQUEST_BYTES * index)
                    # Append before releasing the lock: the daemon must know of this extent before it reads an event
                    # that changes its mapping.
                    self.done.append((space, plan, index, code == 0))
                self._notify()
                if code:
                    refused = True
                    break
            if refused:
                # An event is unread, or CRIU has not registered this memory yet.
                time.sleep(_PAUSE_S)
                self._jobs.append((space, plan))
