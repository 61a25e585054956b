"""Place pages ahead of faults: plan the working set, then copy it phase by phase.

The phases:
- startup: the working set before the first token, while CRIU still restores. While one is recorded, only the processes'
  command lines and environments.
- warm: the working set of the next requests, after the first token.
- background: all other pages, at a limited rate.

Standard library only.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque

from checkpoint.criu.pagemap import BadImage, ProcessImage
from checkpoint.lazy_pages import cache
from checkpoint.lazy_pages.address_space import ProcessGone, ProcessTree, TryAgain, zero_source
from checkpoint.lazy_pages.copy_plan import CHUNK, Plan
from checkpoint.lazy_pages.read_order import ColdReads, touched_pages
from checkpoint.lazy_pages.readahead import DownloadWaiter, PageReader, Source, open_source
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.lazy_pages.working_set import Range, WorkingSet

_STARTUP, _WARM, _BACKGROUND = "startup", "warm", "background"
# Background ranges fetched ahead of being placed, and the size of each.
_WINDOW = 32
_BACKGROUND_RANGE = CHUNK // 2
# Bytes per second of the background phase while requests are there.
_BUSY_RATE = 50e6
# Amount placed between two checks for events.
_STEP_BYTES = CHUNK
_STEP_EXTENTS = 64
_RETRY_S = 0.0005
# Number of working-set ranges sampled for residency in the page cache.
_SAMPLES = 200
# Number of ranges fetched as one job.
_RANGES_PER_JOB = 32
Parts = list[tuple[Source, int, int]]


class Planner:
    """Plans the copies from one folder of images."""

    def __init__(self, folder: str, residency: ResidencyBitmap | None) -> None:
        """Read the page maps and map the pages files. Raises BadImage, OSError."""
        self._fingerprints = cache.fingerprints(folder)
        self.images, self._maps_cached = cache.read_page_maps(folder, self._fingerprints)
        self.sources = {
            image.pages_file: open_source(f"{folder}/{image.pages_file}", residency)
            for image in self.images.values()
            if image.runs
        }
        for image in self.images.values():
            if image.runs and image.reach > self.sources[image.pages_file].size:
                # A copy from beyond the file's end would read this process's own memory.
                raise BadImage(f"the page map of process {image.pid} names more pages than {image.pages_file} has")
        self._pack: Source | None = None
        self._writer: threading.Thread | None = None
        self._folder = folder

    def source(self, image: ProcessImage) -> Source:
        """Return the pages file that a process's pages are copied from; any if it needs none."""
        return self.sources.get(image.pages_file) or next(iter(self.sources.values()))

    def working_set(self, path: str) -> WorkingSet:
        """Read a working set and check it against these images. Raises BadWorkingSet, OSError."""
        found = WorkingSet.load(path)
        files = {pid: self.sources.get(image.pages_file) for pid, image in self.images.items()}
        found.check({pid: source.size if source else 0 for pid, source in files.items()})
        return found

    def plans(self, ranges: list[Range], zeros: int, first: int) -> tuple[dict[int, Plan], list[Parts]]:
        """Return plans of these ranges by process, and the image parts that each batch needs.

        Batches are numbered from `first`.
        """
        made = {pid: Plan() for pid in self.images}
        jobs: list[Parts] = []
        for at in range(0, len(ranges), _RANGES_PER_JOB):
            parts: Parts = []
            for pid, start, end in ranges[at : at + _RANGES_PER_JOB]:
                image = self.images.get(pid)
                source = self.sources.get(image.pages_file) if image else None
                if image is None or source is None:
                    continue
                # Mapped pages are only read ahead, into the page cache.
                parts += [(source, offset, high - low) for low, high, offset in image.mapped_within(start, end)]
                for low, high in image.unmapped(start, end):
                    parts += _plan_range(made[pid], image, source, low, high, zeros, first + len(jobs))
            jobs.append(parts)
        for plan in made.values():
            plan.seal()
        return made, jobs

    def cached_plans(self, working_set: WorkingSet, zeros: int) -> dict[int, Plan] | None:
        """Return the plans cached by an earlier restore for the time before the first token, if they fit.

        All of their sources are in memory.
        """
        found = cache.read_plans(self._folder, self._fingerprints, working_set.digest, self.images, self.sources, zeros)
        if found is None:
            return None
        plans, self._pack = found
        return plans

    def write_plans(
        self, working_set: WorkingSet, plans: dict[int, Plan], cold_reads: ColdReads, namespace: int
    ) -> None:
        """Cache, in a thread, the plans made before the first token, and the list of reads for a cold disk.

        Call it after the first token, while the processes (of this pid namespace) run.
        """
        if self._writer is not None or not working_set.digest or cold_reads.working_set == working_set.digest:
            return
        cold_reads.working_set = working_set.digest
        writer = threading.Thread(
            target=self._write, args=(working_set, plans, cold_reads, namespace), name="cache-writer", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no more threads: the next restore tries again
            writer.start()
            self._writer = writer

    def write_page_maps(self) -> OSError | None:
        """Cache the page maps, once. Return the error if that failed, and the snapshot is still there."""
        if self._maps_cached:
            return None
        self._maps_cached = True
        error = cache.write_page_maps(self._folder, self._fingerprints, self.images)
        return None if isinstance(error, FileNotFoundError) else error

    def prepare(self, path: str) -> None:
        """Cache what a restore with the working set at `path` would, without one: of a snapshot that was pulled.

        The list of reads for a cold disk then lacks the used pages of libraries, which only processes show. Raises
        BadWorkingSet, OSError.
        """
        known = self.working_set(path)
        plans, _ = self.plans(known.before_first_token, zero_source(), 1)
        if error := self.write_page_maps():
            raise error
        self._write(known, plans, ColdReads(self._folder), 0)

    def packed(self, plan: Plan, index: int) -> tuple[Source, int, int] | None:
        """Return where an extent lies in the pack, or None if it is copied from the images."""
        if self._pack is None:
            return None
        offset = plan.source(index) - self._pack.address
        return (self._pack, offset, plan.ends[index] - plan.starts[index]) if 0 <= offset < self._pack.size else None

    def _write(self, working_set: WorkingSet, plans: dict[int, Plan], cold_reads: ColdReads, namespace: int) -> None:
        used = touched_pages(namespace, self.images, working_set.before_first_token)
        packed = cache.write_plans(
            self._folder, self._fingerprints, working_set.digest, plans, self.images, self.sources
        )
        with contextlib.suppress(FileNotFoundError):  # the snapshot was removed
            cold_reads.write(working_set, self.images, used, packed)

    def wait_written(self, timeout_s: float) -> None:
        """Wait for the thread that `write_plans` started."""
        if self._writer is not None:
            self._writer.join(timeout_s)


def _plan_range(plan: Plan, image: ProcessImage, source: Source, start: int, end: int, zeros: int, batch: int) -> Parts:
    """Add a range of the working set to a plan; return the image parts that it needs."""
    parts, position = [], start
    for low, high, offset in image.within(start, end):
        plan.add(position, low, zeros, True, batch)
        plan.add(low, high, source.address + offset, False, batch)
        parts.append((source, offset, high - low))
        position = high
    plan.add(position, end, zeros, True, batch)
    return parts


class Copier:
    """Places the pages of one process tree ahead of faults.

    `fetcher` reads pages before they are placed; `cold_reads` has requested the startup phase's reads from a cold disk;
    `rate` limits the background phase, bytes per second.
    """

    def __init__(
        self,
        tree: ProcessTree,
        planner: Planner,
        working_set: WorkingSet,
        fetcher: PageReader,
        cold_reads: ColdReads | None,
        rate: float,
    ) -> None:
        self.fetcher = fetcher
        self.plans: dict[int, Plan] = {}
        """The plans of the startup and warm phases, by process."""
        self.finished = False
        """Whether every page of every space is in place."""
        self.requests_there = False
        """Whether requests are waiting or being answered: the background phase then leaves them the processors."""
        self._tree, self._stats, self._spaces = tree, tree.stats, tree.spaces
        self._planner = planner
        self._working_set = working_set
        self._cold_reads = cold_reads
        self._rate = rate
        self._zeros = zero_source()
        self._phase = _STARTUP
        self._new_plans: dict[int, Plan] = {}  # the startup plans, if not from the cache: to be cached
        self._caches_written = False
        self._awaiting = False  # whether the startup phase waits until all of it was requested from the disk
        self._fetched: set[int] = set()  # finished jobs
        self._last_job = 0
        self._deferred: dict[int, float] = {}  # process → earliest time of the next attempt
        self._background: deque[Range] = deque()  # (number of a space, start, end)
        self._background_job = 0  # the job of the first of them
        self._background_queued = 0
        self._not_before = 0.0

    def begin_startup(self, ranges: list[Range]) -> None:
        """Plan the pages needed before the first token. Raises OSError."""
        cold_reads = self._cold_reads
        listed = cold_reads is not None and cold_reads.working_set == self._working_set.digest != b""
        resident = self._resident(ranges, listed)
        if cold_reads is not None and listed and resident:
            if cached := self._planner.cached_plans(self._working_set, self._zeros):
                self.plans = cached
                self._awaiting = cold_reads.cold and not cold_reads.requested.is_set()
                return
            cold_reads.working_set = b""  # the plans cached with it are gone: make both again
            resident = not cold_reads.cold
        self._plan(ranges, resident)
        self._new_plans = self.plans

    def _plan(self, ranges: list[Range], resident: bool) -> None:
        """Plan these ranges. Unless their sources are resident, submit all of them to the fetcher."""
        first = self._last_job + 1
        self.plans, jobs = self._planner.plans(ranges, self._zeros, first)
        if resident:
            for plan in self.plans.values():
                plan.resident = True
            return
        for self._last_job, parts in enumerate(jobs, first):
            self.fetcher.submit(self._last_job, parts)

    def _resident(self, ranges: list[Range], listed: bool = False) -> bool:
        """Return whether all ranges count as cached: listed ones, or if evenly sampled ranges are in the page cache.

        A wrong guess only waits for the disk.
        """
        if isinstance(self.fetcher, DownloadWaiter):
            return False  # of images that are still arriving, samples do not represent the rest
        images, sources = self._planner.images, self._planner.sources
        for process, start, end in [] if listed else ranges[:: max(1, len(ranges) // _SAMPLES)]:
            image = images.get(process)
            if image and any(
                not sources[image.pages_file].resident(offset, high - low)
                for low, high, offset in image.within(start, end) + image.mapped_within(start, end)
            ):
                return False
        return True

    def waits(self, now: float) -> list[float]:
        """Return in how many seconds the next extents may be placed."""
        if self._phase == _BACKGROUND:
            return [max(0.0, self._not_before - now)] if self._background and self._background_ready() else []
        return [max(0.0, self._deferred.get(pid, 0.0) - now) for pid in self.plans if self._ready(pid) is not None]

    def collect(self) -> None:
        """Collect what was fetched. Raises OSError if an image cannot be read."""
        if self._awaiting and self._cold_reads and self._cold_reads.requested.is_set():
            self._awaiting = False
            self._stats.bytes_cold += self._cold_reads.size
        finished, cold = self.fetcher.collect()
        self._stats.bytes_cold += cold
        self._fetched.update(finished)

    def _ready(self, pid: int) -> int | None:
        """Return the next extent of a process that can be placed, ignoring its retry time."""
        plan = self.plans[pid]
        index = None if self._awaiting else plan.next()
        if index is None or not (plan.resident or plan.batches[index] in self._fetched):
            return None
        return index if self._tree.restored or any(space.pid == pid for space in self._spaces.values()) else None

    def step(self, now: float) -> None:
        """Place a little, for the next process that is ready. Raises OSError."""
        if self._phase == _BACKGROUND:
            self._step_background(now)
            return
        for pid in list(self.plans):
            if self._deferred.get(pid, 0.0) <= now and self._ready(pid) is not None:
                break
        else:
            return
        plan = self.plans.pop(pid)  # move it to the end: processes take turns
        self.plans[pid] = plan
        spaces = [space for space in self._spaces.values() if space.pid == pid]
        spaces.sort(key=lambda space: space.changed)
        placed, extents = 0, _STEP_EXTENTS
        if spaces and plan.resident and not spaces[0].changed:
            copied, zeros = spaces[0].place_many(plan, _STEP_EXTENTS, _STEP_BYTES)
            self._count(copied, zeros)
            if copied or zeros:
                return
            extents = 1  # the refused one
        for _ in range(extents):
            index = self._ready(pid)
            if index is None or placed >= _STEP_BYTES:
                return
            if not spaces:
                plan.finish(index)  # its process is gone
                continue
            try:
                size = spaces[0].run(plan, index, self._zeros)
            except ProcessGone:
                self._tree.drop(spaces.pop(0))
            except TryAgain:
                self._deferred[pid] = now + _RETRY_S
                return
            else:
                placed += plan.ends[index] - plan.starts[index]
                self._count(*((0, size) if plan.zero[index] else (size, 0)))

    def _count(self, copied: int, zeros: int) -> None:
        self._stats.bytes_ahead += copied
        self._stats.bytes_zero += zeros
        if copied:
            self._stats.first_placed_s = self._stats.first_placed_s or self._tree.now()

    def advance(self) -> bool:
        """Begin the next phase if this one is done; return whether one began."""
        tree = self._tree
        if self._phase == _BACKGROUND:
            if not (self._background and self.requests_there):
                self._write_caches()
            if self._background:
                return False
            self.finished = not any(space.pending for space in self._spaces.values())
            if not self.finished:
                self._begin_background()  # moved or forked during the background phase
            return not self.finished
        if self._awaiting or any(plan.left for plan in self.plans.values()):
            return False
        if self._phase == _STARTUP and tree.restored:
            self._stats.startup_done_s = self._stats.startup_done_s or tree.now()
            if tree.first_token:
                self._phase = _WARM
                ranges = [] if tree.record else self._working_set.after_first_token
                self._plan(ranges, self._resident(ranges))
                return True
        if self._phase == _WARM and (tree.after_requests or not tree.record):
            self._begin_background()
            return True
        return False

    def _write_caches(self) -> None:
        """Write what makes the next restore faster, once. It takes a processor for a moment, which requests that are there need."""
        if self._caches_written:
            return
        self._caches_written = True
        if error := self._planner.write_page_maps():
            self._tree.warn("the next restore reads all page maps again", error)
        if self._cold_reads and self._new_plans:
            self._planner.write_plans(self._working_set, self._new_plans, self._cold_reads, self._tree.namespace)

    def _begin_background(self) -> None:
        self._phase, self.plans = _BACKGROUND, {}
        self._background = deque(
            (space.number, low, min(low + _BACKGROUND_RANGE, end))
            for space in self._spaces.values()
            for start, end, _ in space.pending
            for low in range(start, end, _BACKGROUND_RANGE)
        )
        self._background_job = self._last_job + 1
        self._background_queued = 0
        self._fetch_background()

    def _fetch_background(self) -> None:
        """Keep the fetcher one window ahead, with one job per range."""
        if self._background_queued >= _WINDOW // 2:
            return
        by_number = {space.number: space for space in self._spaces.values()}
        for number, start, end in list(self._background)[self._background_queued : _WINDOW]:
            space = by_number.get(number)
            parts = (
                [(space.source, offset, high - low) for low, high, offset in space.pending.within(start, end)]
                if space
                else []
            )
            self._last_job += 1
            self._background_queued += 1
            if all(source.resident(offset, length) for source, offset, length in parts):
                self._fetched.add(self._last_job)
            else:
                self.fetcher.submit(self._last_job, parts)

    def _background_ready(self) -> bool:
        return self._background_job in self._fetched

    def _step_background(self, now: float) -> None:
        if not self._background or now < self._not_before or not self._background_ready():
            return
        number, start, end = self._background[0]
        for space in list(self._spaces.values()):
            if space.number == number:
                try:
                    size = space.place(start, end)
                except ProcessGone:
                    self._tree.drop(space)
                except TryAgain:
                    self._not_before = now + _RETRY_S
                    return
                else:
                    self._stats.bytes_rest += size
                    rate = min(self._rate, _BUSY_RATE) if self.requests_there else self._rate
                    self._not_before = max(self._not_before, now - 0.01) + size / rate
        self._background.popleft()
        self._fetched.discard(self._background_job)
        self._background_job += 1
        self._background_queued -= 1
        self._fetch_background()

    def stop(self) -> None:
        """Stop reading, without joining the threads."""
        self.fetcher.stop()
        if self._cold_reads:
            self._cold_reads.stop()
