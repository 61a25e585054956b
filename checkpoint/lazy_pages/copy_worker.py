"""The second copier: places large pieces of the working set on another core while the daemon's thread serves faults and small pieces.

Why it cannot corrupt what the daemon's one thread guards (see daemon): a piece is placed only while this thread holds its space's
`placing` lock, and the daemon reads a space's events only while it holds that lock. So no event is read between this thread's look at
`changed` and the kernel's answer; once an event was read that changed a mapping, `changed` is set and this thread leaves the space
alone. It takes nothing from the daemon's tables: what it has placed goes into `done`, and the daemon cuts its map and counts.
Until then the map says that such a page is still to be brought; placing it again is refused by the kernel (EEXIST).

Standard library only.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import Plan, Space

LARGE = 128 << 10
"""Bytes from which on a piece is worth handing over: below, the interpreter's own time is most of the work."""
_PAUSE_S = 0.0005


class SecondCopier(threading.Thread):
    """Works on the (space, plan) pairs it is given, from each plan's end, until they have nothing large left."""

    def __init__(self, notify: Callable[[], None]) -> None:
        super().__init__(name="second-copier", daemon=True)
        self.done: deque[tuple[Space, Plan, int, bool]] = deque()
        """(space, plan, piece, whether it was placed): the daemon's to collect after `notify`."""
        self._jobs: deque[tuple[Space, Plan]] = deque()
        self._more = threading.Event()
        self._stopping = False
        self._notify = notify
        self.failure = ""
        """Why this thread has ended, where nobody stopped it: what it has claimed is placed by nobody."""

    def submit(self, space: Space, plan: Plan) -> None:
        """Help with a plan whose sources are in the page cache."""
        self._jobs.append((space, plan))
        self._more.set()

    def stop(self) -> None:
        """The thread ends after the piece that it is at, if any (which it places only in a space that is still open)."""
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
                    # Before the lock is given up: who then reads an event has to know of this piece before its mapping changes.
                    self.done.append((space, plan, index, code == 0))
                self._notify()
                if code:
                    refused = True
                    break
            if refused:
                # An event waits to be read, or CRIU has not registered this memory yet.
                time.sleep(_PAUSE_S)
                self._jobs.append((space, plan))
