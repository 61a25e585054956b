"""Follow a lazy restore: report the replica's progress to the page server, save the working set, prepare file-backed images.

Runs in a thread of its own from the moment a replica serves until every page is loaded.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError
from plugin.records import restore_rates

if TYPE_CHECKING:
    from checkpoint.lazy_pages.client import PageServer
    from checkpoint.snapshot.library import Library
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.steps.snapshot_fetch import Fetching

log = logging.getLogger("quickthaw")
FIRST_ANSWER_WAIT_S = 2.0
WORKING_SET_REQUESTS = 3
WORKING_SET_WAIT_S = 10.0
SAVE_WAIT_S = 5.0
"""Maximum seconds that a stop waits for a working set being recorded. Writing it took over 1 s on a busy machine; without
it the next restore takes 4 s longer.
"""
ALL = 1 << 30
"""A number of answered requests that ends every wait for more of them."""
PATIENCE_S = 600.0
"""SAVE_WAIT_S of a rehearsal, which may have to wait for the disk and for every other process."""
DRIFT_FAULTS, LATER_DRIFT_FAULTS = 32, 1024
"""Faults outside a known working set, before the first token and up to the end of its requests, above which the missed pages
are added to it. From a store, each fault waits for a 1 MiB chunk. An addition costs the next restore its plans, and each request
touches a few pages more."""
REPORT_EVERY_S = 0.01
"""Seconds between two looks at whether requests are there, while pages are still arriving."""
LOG_EVERY_S = 600.0
"""Seconds between log lines while pages are still arriving."""
COUNTS = ("faults", "stall_s", "bytes_ahead", "bytes_faulted", "bytes_rest", "bytes_zero", "bytes_cold")
"""Counters of a page server that are exported (checkpoint.lazy_pages.address_space.Stats)."""


@dataclass(frozen=True)
class Pace:
    """How long to wait, in seconds, for the first answer, for the requests of the working set, and for its file.

    `measured`: the rate of this restore says something about those of users.
    """

    first_answer_s: float = FIRST_ANSWER_WAIT_S
    requests_s: float = WORKING_SET_WAIT_S
    save_s: float = SAVE_WAIT_S
    measured: bool = True

    @classmethod
    def patient(cls) -> Pace:
        """Return the pace of a rehearsal, which has the lowest priority and ends each part itself."""
        return cls(math.inf, math.inf, PATIENCE_S, measured=False)


@dataclass
class PageFollower:
    """Follow one replica's restores, one after the other.

    `served` returns how many requests the replica has answered, `lives` whether it still runs, `there` how many requests wait or are
    being answered.
    """

    fetching: Fetching
    served: Callable[[], int]
    lives: Callable[[], bool]
    pace: Pace = field(default_factory=Pace)
    there: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._saved = threading.Event()
        self._saved.set()
        self._pages: PageServer | None = None
        self._before = dict.fromkeys(COUNTS, 0.0)  # totals of earlier restores

    def counts(self) -> dict[str, float]:
        """Return COUNTS (bytes, seconds) over all restores until now, and `left`, the bytes still to come."""
        pages = self._pages
        now = pages.known_stats if pages else {}
        left = 0.0 if pages is None or pages.ended.is_set() else now.get("left", 0.0)
        return {name: self._before[name] + now.get(name, 0.0) for name in COUNTS} | {"left": left}

    def begin(self, library: Library, snapshot: Snapshot, pages: PageServer, recording: bool) -> None:
        """Follow a serving replica whose pages are still arriving. `recording`: its working set is being recorded."""
        self._stopping.clear()
        self._saved.clear()
        self._before |= {name: count for name, count in self.counts().items() if name in COUNTS}
        self._pages = pages
        threading.Thread(
            target=self._follow, args=(library, snapshot, pages, recording), name="page-follower", daemon=True
        ).start()
        threading.Thread(target=self._report_requests, args=(pages,), name="page-pacer", daemon=True).start()

    def save_working_set(self) -> None:
        """Save the working set recorded so far, before the engine ends, and wait for it. It makes the next restore fast."""
        self._stopping.set()
        self._saved.wait(SAVE_WAIT_S)

    def wait_saved(self, limit_s: float) -> bool:
        """Wait until the working set is written, or is not to be. Return False on timeout."""
        return self._saved.wait(limit_s)

    def _follow(self, library: Library, snapshot: Snapshot, pages: PageServer, recording: bool) -> None:
        """Follow one restore to its last page. The background pages wait for the first token, so as not to compete with it."""
        known = library.working_set(snapshot.name)
        # While the working set is recorded page by page, the first answer takes seconds: wait longer, so that it counts
        # in the first part.
        # Where several requests wait, the first answer comes with the others, which need what comes after its pages.
        self._wait_served(1, self.pace.first_answer_s * (10 if recording else 1), math.inf if recording else 1)
        early = pages.stats()
        log.debug("pages at the first token: %s", early)
        pages.first_token()
        self.fetching.first_token()
        placing_s = early.get("startup_done_s", 0.0) - early.get("first_placed_s", 0.0)
        if self.pace.measured and not snapshot.gpu.processes:
            restore_rates.remember(library.home, early.get("bytes_ahead", 0.0), placing_s, gpu=False)
        self._wait_served(WORKING_SET_REQUESTS, self.pace.requests_s)
        soon, all_missed = early.get("faults_missed", 0), pages.stats().get("faults_missed", 0)
        drifted = soon > DRIFT_FAULTS or all_missed > LATER_DRIFT_FAULTS
        # `exists` is checked because a damaged working set has been removed by now, and its misses prove nothing.
        drifted = drifted and not recording and known.exists()
        # Save nothing if the replica ended before its first answer: the set would be incomplete.
        save = (recording or drifted) and self.served() > 0 and _still_named(library, snapshot)
        pages.requests_done(save=known if save else None)
        if save:
            pages.wait_saved(self.pace.save_s)
        self._saved.set()
        # Never give up on a slow disk or link: closing before the last page arrived would leave zeros in its place.
        while not pages.wait_complete(LOG_EVERY_S) and not pages.ended.is_set():
            log.info(
                "snapshot %s: pages are still being copied, %.0f MB left",
                snapshot.name,
                pages.stats().get("left", 0.0) / 1e6,
            )
        log.debug("pages: %s", pages.stats())
        pages.close()
        if not self.fetching.downloading and not snapshot.gpu.processes:
            map_pages(library, snapshot)

    def _report_requests(self, pages: PageServer) -> None:
        """Report when requests come and when there are none any more, until every page is in place."""
        reported = False
        while not pages.ended.wait(REPORT_EVERY_S):
            if (self.there() > 0) != reported:
                reported = not reported
                pages.requests_there(reported)

    def _wait_served(self, count: int, limit_s: float, most: float = math.inf) -> None:
        """Wait for this many answers, `limit_s` seconds, or more than `most` requests at the same time."""
        limit = time.monotonic() + limit_s
        while self.served() < count and time.monotonic() < limit and self.lives() and self.there() <= most:
            if self._stopping.wait(0.02):
                break


def _still_named(library: Library, snapshot: Snapshot) -> bool:
    """Return True if the name still refers to this snapshot: its working set is of no use to another snapshot."""
    try:
        return library.load(snapshot.name).digest == snapshot.digest
    except CheckpointError:
        return False


def map_pages(library: Library, snapshot: Snapshot) -> None:
    """Make the file-backed images, if missing, from which later restores map weights and libraries' data instead of copying."""
    from checkpoint.snapshot import file_backed

    try:
        with library.in_use(snapshot.name) as folder:
            # Read the areas of the snapshot that has the name now: another's areas would map wrong memory as weights.
            if not file_backed.exist(folder):
                size = file_backed.make(folder, library.load(snapshot.name).weight_areas)
                log.debug("the next restores map %.0f MB", size / 1e6)
    except CheckpointError as error:
        log.info("snapshot %s: the next restores copy every page: %s", snapshot.name, error)
