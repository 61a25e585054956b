"""Read the memory layout of processes from CRIU's images.

The layout consists of a process's pages, their offsets in `pages-N.img`, and the borders of its mappings
(images/pagemap.proto, images/mm.proto). Standard library only, and fast: the page server reads every page map of a
snapshot while CRIU itself starts.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Sequence

from checkpoint.criu.images import Value, fields, payloads

PAGE = 4096

# enum of pagemap_entry.flags in images/pagemap.proto
PARENT, LAZY, PRESENT = 1, 2, 4
# Bits of VmaEntry.status in criu/include/image.h. CRIU never dumps a private file mapping's pages as lazy; lazy ones
# are from our own page maps.
FILE_PRIVATE = 1 << 6
# MmEntry.mm_arg_start, mm_arg_end, mm_env_start, mm_env_end (images/mm.proto).
_ARGUMENTS = (8, 9, 10, 11)
_MOST_ARGUMENTS = 8 << 20  # bytes; execve(2) allows 6 MiB at most
# VmaEntry.madv is a bit mask by MADV_… number.
_MADV_WIPEONFORK = 18


# Above every possible address of a process.
_END = 1 << 57


class BadImage(ValueError):
    """An image file is invalid; the message names the file."""


class ProcessImage:
    """The pages of one process, from its page map.

    `runs` holds (first address, end address, offset in the pages file) of every run of lazy pages, ascending. A run
    never crosses the border of a mapping, since the kernel fills one mapping at a time. `eager` lists the pages that
    CRIU itself copies; its runs may cross borders. `mapped` lists the pages that are mapped from the pages file
    (checkpoint.snapshot.file_backed) and need no copy.
    """

    __slots__ = ("borders", "eager", "mapped", "pages_file", "pid", "runs", "wiped_on_fork")

    def __init__(self, pid: int, pages_file: str) -> None:
        self.pid = pid
        self.pages_file = pages_file
        self.runs: list[tuple[int, int, int]] = []
        self.mapped: list[tuple[int, int, int]] = []
        self.eager: list[tuple[int, int, int]] = []
        self.wiped_on_fork: list[tuple[int, int]] = []
        self.borders: list[int] = []

    @property
    def lazy_pages(self) -> int:
        return sum(end - start for start, end, _ in self.runs) // PAGE

    @property
    def eager_pages(self) -> int:
        return sum(end - start for start, end, _ in self.eager) // PAGE

    @property
    def reach(self) -> int:
        """Bytes of the pages file that lazy and mapped pages need. Later runs have larger offsets."""
        return max(
            (offset + end - start for runs in (self.runs, self.mapped) for start, end, offset in runs[-1:]), default=0
        )

    def split(self, start: int, end: int) -> list[tuple[int, int]]:
        """Split [start, end) at the borders of mappings."""
        found = []
        index = bisect_right(self.borders, start)
        while start < end:
            stop = min(end, self.borders[index]) if index < len(self.borders) else end
            found.append((start, stop))
            start = stop
            index += 1
        return found

    def within(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the parts of lazy runs that lie in [start, end), as (start, end, offset)."""
        return within(self.runs, start, end)

    def unmapped(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return [start, end) without the file-backed pages, which lie in separate mappings."""
        found, position = [], start
        for low, high, _ in self.mapped_within(start, end):
            if position < low:
                found.append((position, low))
            position = high
        if position < end:
            found.append((position, end))
        return found

    def mapped_within(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the parts of file-backed runs that lie in [start, end), as (start, end, offset)."""
        return within(self.mapped, start, end)


def within(runs: Sequence[tuple[int, int, int]], start: int, end: int) -> list[tuple[int, int, int]]:
    """Return the parts of ascending runs that lie in [start, end), as (start, end, offset)."""
    index = max(bisect_right(runs, (start,)) - 1, 0)
    found = []
    while index < len(runs) and runs[index][0] < end:
        low, high = max(start, runs[index][0]), min(end, runs[index][1])
        if low < high:
            found.append((low, high, runs[index][2] + low - runs[index][0]))
        index += 1
    return found


def _append(runs: list[tuple[int, int, int]], start: int, size: int, offset: int) -> None:
    """Append a run; merge it with the last one if both address and offset continue."""
    if runs and runs[-1][1] == start and runs[-1][2] + runs[-1][1] - runs[-1][0] == offset:
        runs[-1] = (runs[-1][0], start + size, runs[-1][2])
    else:
        runs.append((start, start + size, offset))


def _mappings(path: str) -> list[tuple[int, int, int, int]]:
    """Return (start, end, madvise bits, status) of every mapping of a process, ascending."""
    found = []
    for number, value in fields(_payloads(path)[0]):
        if number == 14 and isinstance(value, bytes):  # MmEntry.vmas
            vma = dict(fields(value))
            start, end, madv, status = vma.get(1, 0), vma.get(2, 0), vma.get(9, 0), vma.get(7, 0)
            if isinstance(start, int) and isinstance(end, int) and isinstance(madv, int) and isinstance(status, int):
                found.append((start, end, madv, status))
    found.sort()
    return found


def argument_pages(folder: str, pid: int) -> tuple[int, int]:
    """Return the pages of a process's command line and environment as (start, end); both 0 if its image names none.

    The kernel reads them for /proc/PID/cmdline and environ, and shows empty files until they are in place.
    """
    try:
        found = dict(fields(_payloads(f"{folder}/mm-{pid}.img")[0]))
    except (OSError, ValueError, IndexError):
        return 0, 0  # a process without memory; damaged images were rejected before
    places = [value for number in _ARGUMENTS if isinstance(value := found.get(number), int) and value]
    start, end = (min(places) & -PAGE, -(-max(places) // PAGE) * PAGE) if places else (0, 0)
    return (start, end) if end - start <= _MOST_ARGUMENTS else (0, 0)


def read_page_map(path: str) -> tuple[str, list[tuple[int, int, int, bool]]]:
    """Read a page map: the name of its pages file, and every run of pages in there as (start, end, offset, lazy).

    Addresses ascend. Raises BadImage, or OSError when the file is missing.
    """
    try:
        head, *entries = _payloads(path)
        pages_file = f"pages-{_integer(dict(fields(head))[1])}.img"
        runs, offset, reached = [], 0, 0
        for payload in entries:
            entry = dict(fields(payload))
            start, flags = _integer(entry[1]), _integer(entry.get(4, PRESENT))
            # 64 bits since CRIU 4.1, 32 before
            end = start + _integer(entry.get(5) or entry[2]) * PAGE
            if start < reached or start % PAGE or end <= start or end > _END:
                raise BadImage(f"{path} lists an address twice, or an impossible one")
            reached = end
            if flags & (PARENT | PRESENT) == PRESENT:
                runs.append((start, end, offset, bool(flags & LAZY)))
                offset += end - start
    except (ValueError, LookupError, struct.error) as error:
        raise error if isinstance(error, BadImage) else BadImage(f"{path} is not a page map: {error}") from error
    return pages_file, runs


def _integer(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number belongs")
    return value


def _payloads(path: str) -> list[bytes]:
    with open(path, "rb") as file:
        return payloads(file.read())


def read_process(folder: str, pid: int) -> ProcessImage:
    """Read the page map of one process. Raises BadImage, or OSError when a file is missing."""
    pages_file, runs = read_page_map(f"{folder}/pagemap-{pid}.img")
    path = f"{folder}/mm-{pid}.img"
    try:
        mappings = _mappings(path)
        image = ProcessImage(pid, pages_file)
        image.wiped_on_fork = [(start, end) for start, end, madv, _ in mappings if madv >> _MADV_WIPEONFORK & 1]
        image.borders = sorted({border for start, end, _, _ in mappings for border in (start, end)})
        of_files = {start for start, _, _, status in mappings if status & FILE_PRIVATE}
        for start, end, offset, lazy in runs:
            if not lazy:
                _append(image.eager, start, end - start, offset)
                continue
            for low, high in image.split(start, end):
                border = image.borders[bisect_right(image.borders, low) - 1]
                (image.mapped if border in of_files else image.runs).append((low, high, offset + low - start))
    except (ValueError, LookupError, struct.error) as error:
        raise BadImage(f"{path} is damaged: {error}") from error
    return image


def process_ids(folder: str) -> list[int]:
    """List the processes of a snapshot that have memory, ascending."""
    return sorted(
        int(name[8:-4]) for name in os.listdir(folder) if name.startswith("pagemap-") and name[8:-4].isdigit()
    )
