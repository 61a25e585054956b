"""After a lazy restore: the page server is told how far its replica is, what its processes needed is kept for the next restore, and that
one finds its pages ready to be mapped.

Runs in a thread of its own from the moment a replica serves until every page is in place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError
from plugin.records import restore_rates

if TYPE_CHECKING:
    from checkpoint.lazy_pages.client import PageServer
    from checkpoint.snapshot.library import Library
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.snapshot_fetch import Fetching

log = logging.getLogger("quickthaw")
FIRST_ANSWER_WAIT_S = 2.0
WORKING_SET_REQUESTS = 3
WORKING_SET_WAIT_S = 10.0
LEAVE_WAIT_S = 5.0
"""How long a stop waits for a working set that is being recorded: writing it took over a second on a busy machine, and without it the next
restore takes four seconds longer."""
DRIFT_FAULTS = 32
"""Faults beside a known working set above which what it missed is added. From a store each of them waits for a chunk of 1 MiB."""
SAID_EVERY_S = 600.0
"""How often it is said that pages are still coming."""
COUNTS = ("faults", "stall_s", "bytes_ahead", "bytes_faulted", "bytes_rest", "bytes_zero", "bytes_cold")
"""What is told of a page server to who watches (checkpoint.lazy_pages.stats)."""


@dataclass
class Following:
    """Follows one replica's restores, one after the other. `served` and `lives` tell how many requests the replica has answered, and
    whether it still runs."""

    fetching: Fetching
    served: Callable[[], int]
    lives: Callable[[], bool]

    def __post_init__(self) -> None:
        self._leaving = threading.Event()
        self._kept = threading.Event()
        self._kept.set()
        self._pages: PageServer | None = None
        self._before = dict.fromkeys(COUNTS, 0.0)  # of the restores before this one

    def counts(self) -> dict[str, float]:
        """COUNTS (bytes, seconds) of all restores until now, and `left`, the bytes still to come."""
        pages = self._pages
        now = pages.known_stats if pages else {}
        left = 0.0 if pages is None or pages.ended.is_set() else now.get("left", 0.0)
        return {name: self._before[name] + now.get(name, 0.0) for name in COUNTS} | {"left": left}

    def begin(self, library: Library, snapshot: Snapshot, pages: PageServer, recording: bool) -> None:
        """Follow a replica that serves now and whose pages are still coming; `recording` its working set."""
        self._leaving.clear()
        self._kept.clear()
        self._before |= {name: count for name, count in self.counts().items() if name in COUNTS}
        self._pages = pages
        threading.Thread(
            target=self._follow, args=(library, snapshot, pages, recording), name="page-follower", daemon=True
        ).start()

    def leave(self) -> None:
        """Before the engine is ended: a working set that is still being recorded is kept as far as it goes: the next restore is fast."""
        self._leaving.set()
        self._kept.wait(LEAVE_WAIT_S)

    def _follow(self, library: Library, snapshot: Snapshot, pages: PageServer, recording: bool) -> None:
        """The rest of the pages waits for the first token, so as not to compete with it."""
        known = library.working_set(snapshot.name)
        # While a working set is recorded, page by page, the first answer takes seconds; it belongs into the first part all the same.
        self._wait_served(1, FIRST_ANSWER_WAIT_S * (10 if recording else 1))
        early = pages.stats()
        log.debug("pages at the first token: %s", early)
        pages.first_token()
        self.fetching.first_token()
        placing_s = early.get("hot_done_s", 0.0) - early.get("first_placed_s", 0.0)
        restore_rates.remember(library.home, early.get("bytes_ahead", 0.0), placing_s, gpu=False)
        self._wait_served(WORKING_SET_REQUESTS, WORKING_SET_WAIT_S)
        # One that was damaged is gone by now, and what it missed is not all that it named.
        drifted = not recording and known.exists() and pages.stats().get("faults_missed", 0) > DRIFT_FAULTS
        # One that ends before the first answer is none.
        save = (recording or drifted) and self.served() > 0 and _is(library, snapshot)
        pages.requests_done(save=known if save else None)
        if save:
            pages.wait_saved(LEAVE_WAIT_S)
        self._kept.set()
        # A slow disk or link is no failure, and whoever closes before the last page is there leaves zeros where pages were to come.
        while not pages.wait_complete(SAID_EVERY_S) and not pages.ended.is_set():
            log.info("pages of %s are still coming: %.0f MB to go", snapshot.name, pages.stats().get("left", 0.0) / 1e6)
        log.debug("pages: %s", pages.stats())
        pages.close()
        if not self.fetching.arriving:
            map_pages(library, snapshot)

    def _wait_served(self, count: int, limit_s: float) -> None:
        limit = time.monotonic() + limit_s
        while self.served() < count and time.monotonic() < limit and self.lives():
            if self._leaving.wait(0.02):
                break


def _is(library: Library, snapshot: Snapshot) -> bool:
    """Whether the name still stands for this snapshot: another's working set would be of no use to it."""
    try:
        return library.load(snapshot.name).digest == snapshot.digest
    except CheckpointError:
        return False


def map_pages(library: Library, snapshot: Snapshot) -> None:
    """Make the view from which later restores map weights and libraries' data instead of copying them, where it has not been made yet."""
    from checkpoint.snapshot import file_backed

    try:
        with library.in_use(snapshot.name) as folder:
            # Of the snapshot that has the name by now: another's areas would show other memory as weights.
            if not file_backed.made(folder):
                size = file_backed.make(folder, library.load(snapshot.name).weight_areas)
                log.debug("the next restores map %.0f MB", size / 1e6)
    except CheckpointError as error:
        log.info("the next restores of %s copy every page: %s", snapshot.name, error)
