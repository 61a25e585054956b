"""Break down a snapshot's bytes: by process and kind of memory, zero pages, and duplicate pages.

`snapshot inspect --contents` uses it to show which memory trimming the engine should have removed, and what an
archive will save. Every page is read once and hashed with XXH3 (64 bits, sufficient for counting); 2 GB take about a
second from page cache.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from checkpoint.criu.images import Message, messages, nested, number, text
from checkpoint.criu.pagemap import PAGE, read_page_map
from checkpoint.cuda.processes import recorded
from checkpoint.errors import Integrity
from checkpoint.store.chunking import page_hashes

LARGE = 32 << 20
"""A private anonymous mapping with at least this many dumped bytes counts as `large`: buffers, pools, arenas. Weights
are distinguished if the engine reported their addresses (Snapshot.weight_areas), because its allocator may have put
them into the heap."""
GPU_STATE, WEIGHTS, PINNED, HUGE = "GPU state", "weights", "pinned", "huge pages"
"""`GPU state`: what the CUDA driver has put into host memory (checkpoint.cuda.processes). `pinned`: locked in memory
(mlock). `huge pages`: of hugetlbfs, or with the advice to use them. `heap`: malloc's, of every thread. What fits several of
these counts as the first one named here."""
_LARGEST = 6  # areas listed of each process
_NAMED = 8 << 20
"""Areas from this many bytes on get a line of their own in the text."""

_ARENA = 64 << 20
"""glibc gives each thread's arena whole parts of this size, of which it makes the beginning accessible."""
_MAP_LOCKED, _MAP_HUGETLB, _MADV_HUGEPAGE = 0x2000, 0x40000, 1 << 14
# Bits of VmaEntry.status, see criu/include/image.h.
_STACK, _HEAP, _FILE_PRIVATE, _FILE_SHARED, _ANON_SHARED, _ANON_PRIVATE, _SYSVIPC, _MEMFD = (
    1 << bit for bit in (1, 5, 6, 7, 8, 9, 10, 14)
)

_Counts = npt.NDArray[np.int64]


class Share(msgspec.Struct):
    """Bytes dumped, bytes of all-zero pages, and bytes of pages equal to an earlier one (zero pages excluded)."""

    bytes: int = 0
    zero: int = 0
    duplicate: int = 0

    def add(self, other: Share) -> None:
        """Add the other share's counts to this one."""
        self.bytes += other.bytes
        self.zero += other.zero
        self.duplicate += other.duplicate


class Area(msgspec.Struct):
    """One mapping: kind, address, mapped size, dumped bytes, and the file behind it."""

    kind: str
    start: int
    mapped: int
    dumped: Share
    file: str = ""


class Process(msgspec.Struct):
    """One process and its memory.

    `pid` is its number inside the sandbox. `largest` lists its largest areas, largest first.
    """

    pid: int
    parent: int
    name: str
    threads: int
    total: Share
    kinds: dict[str, Share]
    largest: list[Area]


class Contents(msgspec.Struct):
    """A snapshot's memory.

    `page`: page size in bytes. `between_processes`: bytes of pages that several processes have, beyond the first
    copy. `image_files`: bytes of the images that hold no pages; with `total` they are the manifest's `image_bytes`.
    `shared_memory`: files of /dev/shm with the bytes they occupy. `other`: bytes of all other files of the snapshot.
    """

    page: int
    total: Share
    between_processes: int
    processes: list[Process]
    shared: dict[str, Share]
    image_files: int
    shared_memory: dict[str, int]
    other: int


_Run = tuple[int, int, int, bool]
"""A run of pages in a page map (checkpoint.criu.pagemap)."""
Places = Mapping[str, Sequence[tuple[int, int]]]
"""By process number, (address, bytes) of its weights."""


def inspect(folder: Path, weights: Places | None = None) -> Contents:
    """Read the images of a snapshot folder (which contains `images/` and optionally `shm/`).

    `weights`: a manifest's `weight_areas`; pages wholly inside them count as weights instead of by their mapping's
    kind, as the driver's areas do beside the images. Raises Integrity if images are missing or garbled.
    """
    images = folder / "images"
    try:
        return _Reader(images, weights or {}).read(folder)
    except OSError as error:
        raise Integrity("image-unreadable", f"{error.filename}: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise Integrity("image-garbled", f"the images in {images} contradict each other: {error}") from error


class _Reader:
    def __init__(self, images: Path, weights: Places) -> None:
        self.weights = weights
        self.images = images
        self.driver = recorded(images)
        self.files = {
            number(m, 2): text(reg, 6) for m in self._optional("files.img") for reg in nested(m, 3)
        }  # FileEntry.id → RegFileEntry.name

    def _optional(self, name: str) -> Iterator[Message]:
        return messages(self.images / name) if (self.images / name).exists() else iter(())

    def read(self, folder: Path) -> Contents:
        tree = [(number(m, 1), number(m, 2), len(m.get(5, []))) for m in messages(self.images / "pstree.img")]
        # A zombie, or a process that shares its parent's memory, has no memory of its own.
        names = [f"{pid}" for pid, _, _ in tree if (self.images / f"pagemap-{pid}.img").exists()]
        names += sorted(file.stem.removeprefix("pagemap-") for file in self.images.glob("pagemap-shmem-*.img"))
        maps = {name: read_page_map(str(self.images / f"pagemap-{name}.img")) for name in names}
        hashes = {name: page_hashes(self.images / pages_file) for name, (pages_file, _) in maps.items()}
        for name, (pages_file, runs) in maps.items():
            if runs and runs[-1][2] + runs[-1][1] - runs[-1][0] > len(hashes[name]) * PAGE:
                raise ValueError(f"{pages_file} has only {len(hashes[name])} pages")
        zero_hash = xxhash.xxh3_64_intdigest(bytes(PAGE))
        between, sums = _count(hashes, zero_hash)

        processes = []
        for pid, parent, threads in tree:
            if f"{pid}" in maps:
                processes.append(self._process(pid, parent, threads, maps[f"{pid}"][1], sums[f"{pid}"]))
        shared = {name: self._share(sums[name], 0, len(hashes[name])) for name in maps if name.startswith("shmem-")}
        total = _sum([p.total for p in processes] + list(shared.values()))
        return Contents(
            page=PAGE,
            total=total,
            between_processes=between * PAGE,
            processes=processes,
            shared=shared,
            image_files=sum(f.lstat().st_size for f in self.images.rglob("*") if f.is_file()) - total.bytes,
            shared_memory=_occupied(folder / "shm"),
            other=sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file() and not _counted(f, folder)),
        )

    def _share(self, sums: tuple[_Counts, _Counts], first: int, pages: int) -> Share:
        zeros, duplicates = (int(s[first + pages] - s[first]) for s in sums)
        return Share(pages * PAGE, zeros * PAGE, duplicates * PAGE)

    def _process(self, pid: int, parent: int, threads: int, runs: list[_Run], sums: tuple[_Counts, _Counts]) -> Process:
        areas = self._areas(pid)
        starts = [area.start for area in areas]
        for start, end, offset, _ in runs:
            at = start
            while at < end:
                area = areas[bisect_right(starts, at) - 1]
                inside = min(end, area.start + area.mapped) - at
                if inside <= 0:
                    raise ValueError(f"process {pid} has pages at {at:#x}, where nothing is mapped")
                area.dumped.add(self._share(sums, (offset + at - start) // PAGE, inside // PAGE))
                at += inside
        kinds: dict[str, Share] = {}
        for area in areas:
            if area.kind == "anonymous" and area.dumped.bytes >= LARGE:
                area.kind = "large"
            if area.dumped.bytes:
                kinds.setdefault(area.kind, Share()).add(area.dumped)
        largest = sorted((a for a in areas if a.dumped.bytes), key=lambda a: (-a.dumped.bytes, a.start))[:_LARGEST]
        return Process(
            pid=pid,
            parent=parent,
            name=next((text(tc, 6) for core in self._optional(f"core-{pid}.img") for tc in nested(core, 3)), ""),
            threads=threads,
            total=_sum(kinds.values()),
            kinds=_by_size(kinds),
            largest=largest,
        )

    def _areas(self, pid: int) -> list[Area]:
        (memory,) = messages(self.images / f"mm-{pid}.img")
        main_stack = number(memory, 5)  # mm_start_stack; VmaEntry.status marks only growing stacks
        areas = []
        hidden: dict[int, int] = {}
        """End by start of mappings that are not accessible."""
        for vma in nested(memory, 14):
            start, end, status = number(vma, 1), number(vma, 2), number(vma, 7)
            file = self.files.get(number(vma, 4), "") if status & (_FILE_PRIVATE | _FILE_SHARED) else ""
            kind = "stack" if start <= main_stack < end else _kind(status)
            if number(vma, 6) & _MAP_LOCKED:
                kind = PINNED
            elif number(vma, 6) & _MAP_HUGETLB or number(vma, 9) & _MADV_HUGEPAGE:
                kind = HUGE
            if not number(vma, 5):
                hidden[start] = end
            areas.append(Area(kind, start, end - start, Share(), file))
        for area in areas:
            end = area.start + area.mapped
            if area.kind == "anonymous" and not area.start % _ARENA and hidden.get(end) == area.start + _ARENA:
                area.kind = "heap"
        areas.sort(key=lambda area: area.start)
        areas = _split(areas, [(start, end - start) for start, end in self.driver.get(str(pid), ())], GPU_STATE)
        return _split(areas, self.weights.get(str(pid), ()), WEIGHTS)


def _by_size(kinds: Mapping[str, Share]) -> dict[str, Share]:
    return dict(sorted(kinds.items(), key=lambda item: -item[1].bytes))


def _split(areas: list[Area], places: Sequence[tuple[int, int]], kind: str) -> list[Area]:
    """Split the areas where whole pages of `places`, (address, bytes), begin and end, and give these a kind; keep their order."""
    whole = [(-(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE) for start, size in places]
    found: list[Area] = []
    for area in areas:
        at, end = area.start, area.start + area.mapped
        for low, high in whole:
            low, high = max(low, at), min(high, end)
            if low >= high:
                continue
            if at < low:
                found.append(Area(area.kind, at, low - at, Share(), area.file))
            found.append(Area(kind, low, high - low, Share(), area.file))
            at = high
        if at < end:
            found.append(Area(area.kind, at, end - at, Share(), area.file))
    return found


def _kind(status: int) -> str:
    if status & _HEAP:
        return "heap"
    if status & _STACK:
        return "stack"
    if status & _FILE_PRIVATE:
        return "private file"
    if status & (_FILE_SHARED | _ANON_SHARED | _SYSVIPC | _MEMFD):
        return "shared"
    return "anonymous" if status & _ANON_PRIVATE else "other"


def _count(hashes: dict[str, npt.NDArray[np.uint64]], zero_hash: int) -> tuple[int, dict[str, tuple[_Counts, _Counts]]]:
    """Count the pages that several address spaces have, beyond the first copy.

    Also returns, for each space, the running sums of zero and duplicate pages.
    """
    joined = np.concatenate([*hashes.values(), np.empty(0, dtype=np.uint64)])
    zero = joined == np.uint64(zero_hash)
    unique, first = np.unique(joined, return_index=True)
    repeated = np.ones(len(joined), dtype=bool)
    repeated[first] = False
    repeated &= ~zero
    distinct = sum(len(np.unique(h)) - int(zero_hash in h) for h in hashes.values())
    between = distinct - (len(unique) - int(zero.any()))
    sums, at = {}, 0
    for name, own in hashes.items():
        part = slice(at, at + len(own))
        sums[name] = (_running(zero[part]), _running(repeated[part]))
        at += len(own)
    return between, sums


def _running(flags: npt.NDArray[np.bool_]) -> _Counts:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(flags, dtype=np.int64)])


def _sum(shares: Iterable[Share]) -> Share:
    total = Share()
    for share in shares:
        total.add(share)
    return total


def _counted(file: Path, folder: Path) -> bool:
    return str(file.relative_to(folder)).startswith(("shm/", "images/"))


def _occupied(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not f.is_symlink()]
    return {str(f.relative_to(folder)): f.stat().st_blocks * 512 for f in files}


def render(contents: Contents) -> list[str]:
    """Format as lines for a terminal: every process with its memory by kind, its largest areas, then the totals."""

    def row(name: str, share: Share, note: str = "") -> str:
        return f"{name:<34}{share.bytes / 1e6:>10.1f}{share.zero / 1e6:>10.1f}{share.duplicate / 1e6:>12.1f}  {note}".rstrip()

    def part(of: int) -> str:
        return f"{of / max(contents.total.bytes, 1):.1%} of all memory"

    lines = [f"{'memory, MB':<34}{'dumped':>10}{'zero':>10}{'duplicate':>12}"]
    for process in contents.processes:
        lines.append(row(f"{process.pid} {process.name}", process.total, _threads(process.threads)))
        lines += [row(f"  {kind}", share) for kind, share in process.kinds.items()]
        for area in process.largest:
            if area.dumped.bytes >= _NAMED:
                lines.append(row(f"    at {area.start:#x}", area.dumped, f"{area.kind} {area.file}".rstrip()))
    lines += [row(f"shared {name}", share) for name, share in contents.shared.items()]
    lines.append("")
    by_kind: dict[str, Share] = {}
    for process in contents.processes:
        for kind, share in process.kinds.items():
            by_kind.setdefault(kind, Share()).add(share)
    lines += [row(f"all {kind}", share, part(share.bytes)) for kind, share in _by_size(by_kind).items()]
    lines += [row("all shared", share, part(share.bytes)) for share in [_sum(contents.shared.values())] if share.bytes]
    lines.append(row("all memory", contents.total))
    lines.append(
        f"{'the rest of the images':<34}{contents.image_files / 1e6:>10.1f}{'':>24}registers, mappings, descriptors"
    )
    lines.append(f"{'the images':<34}{(contents.total.bytes + contents.image_files) / 1e6:>10.1f}")
    lines.append(f"{'of it equal in several processes':<34}{'':>10}{'':>10}{contents.between_processes / 1e6:>12.1f}")
    files = sum(contents.shared_memory.values())
    lines.append(f"{'shared memory files':<34}{files / 1e6:>10.1f}{'':>24}{len(contents.shared_memory)} in /dev/shm")
    lines.append(
        f"{'other files':<34}{contents.other / 1e6:>10.1f}{'':>24}compiled code, temporary files, the manifest"
    )
    return lines


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"
