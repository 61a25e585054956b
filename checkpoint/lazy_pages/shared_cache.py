"""Plan the copies of one restore: page maps and mapped image files, the plans made of a working set, and their caches.

Standard library only.
"""

from __future__ import annotations

import contextlib
import threading

from checkpoint.criu.pagemap import BadImage, ProcessImage
from checkpoint.lazy_pages import cache
from checkpoint.lazy_pages.copy_plan import Plan
from checkpoint.lazy_pages.read_order import Reading
from checkpoint.lazy_pages.readahead import Source, open_source
from checkpoint.lazy_pages.residency import ResidencyBitmap
from checkpoint.lazy_pages.touched_pages import touched
from checkpoint.lazy_pages.working_set import Range, WorkingSet

# Number of ranges fetched as one job.
BATCH = 32
Parts = list[tuple[Source, int, int]]


class Planner:
    """Plans the copies from one folder of images."""

    def __init__(self, folder: str, residency: ResidencyBitmap | None) -> None:
        """Read the page maps and map the pages files. Raises BadImage, OSError."""
        self._fingerprints = cache.fingerprints(folder)
        self.images, self._indexed = cache.read_page_maps(folder, self._fingerprints)
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
        self._keeper: threading.Thread | None = None
        self._folder = folder

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

    def cached_plans(self, working_set: WorkingSet, zeros: int) -> dict[int, Plan] | None:
        """Return the plans cached by an earlier restore for the time before the first token, if they fit.

        All of their sources are in memory.
        """
        found = cache.read_plans(self._folder, self._fingerprints, working_set.digest, self.images, self.sources, zeros)
        if found is None:
            return None
        plans, self._pack = found
        return plans

    def keep(self, working_set: WorkingSet, plans: dict[int, Plan], reading: Reading, namespace: int) -> None:
        """Cache, in a thread, the plans made before the first token, and the list of reads for a cold disk.

        Call it just after the first token, while the processes (of this pid namespace) run.
        """
        if self._keeper is not None or not working_set.digest or reading.working_set == working_set.digest:
            return
        reading.working_set = working_set.digest
        keeper = threading.Thread(
            target=self._keep, args=(working_set, plans, reading, namespace), name="keeper", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # no more threads: the next restore tries again
            keeper.start()
            self._keeper = keeper

    def keep_maps(self) -> OSError | None:
        """Cache the page maps, once. Return the error if that failed, and the snapshot is still there."""
        if self._indexed:
            return None
        self._indexed = True
        error = cache.write_page_maps(self._folder, self._fingerprints, self.images)
        return None if isinstance(error, FileNotFoundError) else error

    def packed(self, plan: Plan, index: int) -> tuple[Source, int, int] | None:
        """Return where an extent lies in the pack, or None if it is copied from the images."""
        if self._pack is None:
            return None
        offset = plan.source(index) - self._pack.address
        return (self._pack, offset, plan.ends[index] - plan.starts[index]) if 0 <= offset < self._pack.size else None

    def _keep(self, working_set: WorkingSet, plans: dict[int, Plan], reading: Reading, namespace: int) -> None:
        used = touched(namespace, self.images, working_set.before_first_token)
        packed = cache.write_plans(
            self._folder, self._fingerprints, working_set.digest, plans, self.images, self.sources
        )
        with contextlib.suppress(FileNotFoundError):  # the snapshot was removed
            reading.keep(working_set, self.images, used, packed)

    def settle(self, timeout_s: float) -> None:
        """Wait for the thread that `keep` started."""
        if self._keeper is not None:
            self._keeper.join(timeout_s)


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
