"""State that trees of the same snapshot share in one process.

It consists of the page maps, the mapped image files, and the plans of a working set. Each tree works on its own copy of
a plan and changes nothing else here. The state lives as long as a tree uses it. Standard library only.
"""

from __future__ import annotations

import contextlib
import threading
from _weakref import ref  # importing weakref itself would delay a start by 1 ms

from checkpoint.criu.pagemap import BadImage, ProcessImage
from checkpoint.lazy_pages import cache_file, pagemap_cache, plan_cache
from checkpoint.lazy_pages.address_space import Plan
from checkpoint.lazy_pages.read_order import Reading
from checkpoint.lazy_pages.readahead import Source
from checkpoint.lazy_pages.residency import Presence, open_source
from checkpoint.lazy_pages.touched_pages import touched
from checkpoint.lazy_pages.working_set import Range, WorkingSet

# Number of ranges fetched as one job.
BATCH = 32
Parts = list[tuple[Source, int, int]]


class Known:
    """The shared state of one folder of images."""

    _all: dict[object, ref[Known]] = {}
    _lock = threading.Lock()

    def __init__(self, folder: str, presence: Presence | None) -> None:
        self._stamps = cache_file.stamps(folder)
        self.images, self._indexed = pagemap_cache.read(folder, self._stamps)
        self.sources = {
            image.pages_file: open_source(f"{folder}/{image.pages_file}", presence)
            for image in self.images.values()
            if image.runs
        }
        for image in self.images.values():
            if image.runs and image.reach > self.sources[image.pages_file].size:
                # A copy from beyond the file's end would read this process's own memory.
                raise BadImage(f"the page map of process {image.pid} names more pages than {image.pages_file} has")
        # One entry for each phase, by its first batch.
        self._plans: dict[int, tuple[list[Range], dict[int, Plan], list[Parts]]] = {}
        self._kept: tuple[bytes, dict[int, Plan]] | None = None
        # Packs that kept plans copy from. All are kept: a tree may still use plans of an earlier working set.
        self._packs: list[Source] = []
        self._keeper: threading.Thread | None = None
        self._folder = folder
        self._planning = threading.Lock()

    @classmethod
    def of(cls, folder: str, presence: Presence | None) -> Known:
        """Return the shared state for exactly these files. Raises BadImage, OSError.

        Files that are still arriving are not shared between restores.
        """
        if presence:
            return cls(folder, presence)
        files = cache_file.stamps(folder, ("pagemap-", "mm-", "pages-"))
        key = folder, tuple(map(tuple, files))
        with cls._lock:
            for old in [old for old, known in cls._all.items() if known() is None]:
                del cls._all[old]  # no tree uses it any more
            kept = cls._all.get(key)
            found = kept() if kept else None
            if found is None:
                found = cls(folder, None)
                cls._all[key] = ref(found)
            return found

    def working_set(self, path: str) -> WorkingSet:
        """Read a working set and check it against these images. Raises BadWorkingSet, OSError."""
        found = WorkingSet.load(path)
        files = {pid: self.sources.get(image.pages_file) for pid, image in self.images.items()}
        found.check({pid: source.size if source else 0 for pid, source in files.items()})
        return found

    def plans(self, ranges: list[Range], zeros: int, first: int) -> tuple[dict[int, Plan], list[Parts]]:
        """Return fresh plans of these ranges by process, and the image parts that each batch needs.

        Batches are numbered from `first`.
        """
        with self._planning:  # a second caller waits and reuses the result
            known = self._plans.get(first)
            if known is None or known[0] != ranges:
                known = self._plans[first] = (ranges, *self._plan(ranges, zeros, first))
        _, made, jobs = known
        return {pid: plan.fresh() for pid, plan in made.items()}, jobs

    def kept_plans(self, working_set: WorkingSet, zeros: int) -> dict[int, Plan] | None:
        """Return the plans cached by an earlier restore for the time before the first token.

        All of their sources are in memory.
        """
        with self._planning:
            if self._kept is None or self._kept[0] != working_set.digest:
                found = plan_cache.read(
                    self._folder, self._stamps, working_set.digest, self.images, self.sources, zeros
                )
                if found is None:
                    return None
                kept, pack = found
                if pack is not None:
                    self._packs.append(pack)
                self._kept = (working_set.digest, kept)
            return {pid: plan.fresh() for pid, plan in self._kept[1].items()}

    def keep(self, working_set: WorkingSet, first: int, reading: Reading, namespace: int) -> None:
        """Cache, in its own thread, the plans that `plans` made with `first`, and the list of reads for a cold disk.

        Happens once, just after a first token, while the processes (of this pid namespace) run.
        """
        with self._planning:
            made = self._plans.get(first)
            digest = working_set.digest
            if not digest or not made or made[0] != working_set.before_first_token or self._keeper is not None:
                return
            if reading.working_set == digest:
                return
            reading.working_set = digest
            keeper = threading.Thread(
                target=self._keep, args=(working_set, made[1], reading, namespace), name="keeper", daemon=True
            )
            with contextlib.suppress(RuntimeError):  # no more threads: the next restore tries again
                keeper.start()
                self._keeper = keeper

    def keep_maps(self) -> OSError | None:
        """Cache the page maps, once. Return the error if that failed, and the snapshot is still there."""
        if self._indexed:
            return None
        self._indexed = True
        error = pagemap_cache.keep(self._folder, self._stamps, self.images)
        return None if isinstance(error, FileNotFoundError) else error

    def packed(self, plan: Plan, piece: int) -> tuple[Source, int, int] | None:
        """Return where an extent lies in the pack, or None if it is copied from the images."""
        for pack in self._packs:
            offset = plan.source(piece) - pack.address
            if 0 <= offset < pack.size:
                return pack, offset, plan.ends[piece] - plan.starts[piece]
        return None

    def _keep(self, working_set: WorkingSet, made: dict[int, Plan], reading: Reading, namespace: int) -> None:
        used = touched(namespace, self.images, working_set.before_first_token)
        packed = plan_cache.keep(self._folder, self._stamps, working_set.digest, made, self.images, self.sources)
        with contextlib.suppress(FileNotFoundError):  # the snapshot was removed
            reading.keep(working_set, self.images, used, packed)

    def settle(self, timeout_s: float) -> None:
        """Wait for the thread that `keep` started."""
        if self._keeper is not None:
            self._keeper.join(timeout_s)

    def _plan(self, ranges: list[Range], zeros: int, first: int) -> tuple[dict[int, Plan], list[Parts]]:
        made = {pid: Plan() for pid in self.images}
        jobs: list[Parts] = []
        for at in range(0, len(ranges), BATCH):
            parts: Parts = []
            for pid, start, end in ranges[at : at + BATCH]:
                image = self.images.get(pid)
                source = self.sources.get(image.pages_file) if image else None
                if image is None or source is None:
                    continue
                # Mapped pages are only read ahead, into the page cache.
                parts += [(source, offset, high - low) for low, high, offset in image.mapped_within(start, end)]
                for low, high in image.unmapped(start, end):
                    parts += _plan_piece(made[pid], image, source, low, high, zeros, first + len(jobs))
            jobs.append(parts)
        for plan in made.values():
            plan.seal()
        return made, jobs


def _plan_piece(plan: Plan, image: ProcessImage, source: Source, start: int, end: int, zeros: int, batch: int) -> Parts:
    """Add a range of the working set to a plan; return the image parts that it needs."""
    parts, position = [], start
    for low, high, offset in image.within(start, end):
        plan.add(position, low, zeros, True, batch)
        plan.add(low, high, source.address + offset, False, batch)
        parts.append((source, offset, high - low))
        position = high
    plan.add(position, end, zeros, True, batch)
    return parts
