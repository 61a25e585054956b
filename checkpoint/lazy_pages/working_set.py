"""A snapshot's working set: the pages its processes need, in the order of need, up to the first token and a little later.

It is recorded on a restore whose faults are served one by one, stored in one file beside the images, and read by the
page server at the next restore. Standard library only, because the page server imports it.

File format: `QTWS`, a 32-bit length, a JSON head, then 16 bytes for every range: first address (64 bits), pages
(32), index into the head's `processes` (32), all little-endian. The first `first` ranges are needed before the first
token, the others soon after it. Ranges name addresses, not offsets: pages that are not in the image read as zeros,
but fault as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from threading import get_ident

from checkpoint.criu.pagemap import PAGE, ProcessImage
from checkpoint.lazy_pages.cache import blake2b

Range = tuple[int, int, int]
"""(process, first address, end address)"""

FILE_NAME = "working-set.qws"
_MAGIC = b"QTWS"
_VERSION = 2
_ENTRY = struct.Struct("<QII")
_MOST = 64 << 20
"""Largest file size read, in bytes: four million ranges."""
_ZEROS = 1 << 30
"""Bytes of fresh zero memory that a process may need before its first answers, beyond its image."""
_GAPS = 3
"""Of three merged pages in a row, at least one was needed (_GAP)."""

# Merge pages at most this far apart: one more page costs 1.6 µs to copy, one more call 3 µs.
_GAP = 2 * PAGE
# Order of need is kept between blocks of this size, and dropped within them.
_BLOCK = 256 << 10


class BadWorkingSet(ValueError):
    """The file is not a working set, or is damaged. A restore continues without it."""


class WorkingSet:
    """Ranges in the order of need; the first `first` of them come before the first token."""

    __slots__ = ("digest", "first", "ranges")

    def __init__(self, ranges: Sequence[Range] = (), first: int = 0) -> None:
        self.ranges = list(ranges)
        self.first = first
        self.digest = b""
        """BLAKE2b of the file it was read from; empty if it was not read from one."""

    @property
    def before_first_token(self) -> list[Range]:
        return self.ranges[: self.first]

    @property
    def after_first_token(self) -> list[Range]:
        return self.ranges[self.first :]

    def bytes_by_process(self, before_first_token: bool = True) -> dict[int, int]:
        """Return the bytes each process needs, including zero pages."""
        total: dict[int, int] = {}
        for process, start, end in self.before_first_token if before_first_token else self.ranges:
            total[process] = total.get(process, 0) + end - start
        return total

    @classmethod
    def from_faults(
        cls,
        before: Iterable[tuple[int, int]],
        after: Iterable[tuple[int, int]],
        images: dict[int, ProcessImage],
        base: WorkingSet | None = None,
    ) -> WorkingSet:
        """Build the working set from (process, address) faults in their order, added to `base`."""
        placed: dict[int, set[int]] = {}
        first = _coalesce(_pages(base.before_first_token if base else (), before), images, placed)
        later = _coalesce(_pages(base.after_first_token if base else (), after), images, placed)
        return cls(first + later, len(first))

    def save(self, path: str) -> None:
        """Write the file atomically, mode 0600."""
        processes = sorted({process for process, _, _ in self.ranges})
        index = {process: number for number, process in enumerate(processes)}
        body = b"".join(
            _ENTRY.pack(start, (end - start) // PAGE, index[process]) for process, start, end in self.ranges
        )
        # The manifest's digests do not cover this file, and a corrupted range could make a restore wait for pages that
        # no image has.
        facts = {"version": _VERSION, "processes": processes, "first": self.first, "ranges": len(self.ranges)}
        head = json.dumps({**facts, "crc": zlib.crc32(json.dumps(facts).encode() + body)}).encode()
        temporary = f"{path}.{os.getpid()}.{get_ident()}.tmp"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(_MAGIC + struct.pack("<I", len(head)) + head + body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def check(self, held: Mapping[int, int]) -> None:
        """Check the set against its images. `held` is the size in bytes of each process's pages file.

        A working set may come from a store with its snapshot; one that names terabytes would fill the memory with
        zeros. Raises BadWorkingSet.
        """
        for process, needed in self.bytes_by_process(before_first_token=False).items():
            if needed > _GAPS * held.get(process, 0) + _ZEROS:
                raise BadWorkingSet(
                    f"the working set names {needed} bytes of process {process}, more than its image can need"
                )

    @classmethod
    def load(cls, path: str) -> WorkingSet:
        """Read the file. Raises BadWorkingSet, or OSError when it is missing."""
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
        if len(data) > _MOST:
            raise BadWorkingSet(f"{path} is larger than any working set")
        try:
            if data[:4] != _MAGIC:
                raise BadWorkingSet(f"{path} is not a working set")
            (size,) = struct.unpack_from("<I", data, 4)
            head = json.loads(data[8 : 8 + size])
            processes, first, count = head["processes"], head["first"], head["ranges"]
            if head["version"] not in (1, _VERSION):
                raise BadWorkingSet(f"{path} is of version {head['version']}, and this reads {_VERSION}")
            body = data[8 + size :]
            if len(body) != count * _ENTRY.size or not 0 <= first <= count:
                raise BadWorkingSet(f"{path} is truncated")
            crc = head.pop("crc", None)  # version 1 had none
            if head["version"] > 1 and crc != zlib.crc32(json.dumps(head).encode() + body):
                raise BadWorkingSet(f"{path} is damaged")
            ranges = [
                (processes[index], start, start + pages * PAGE) for start, pages, index in _ENTRY.iter_unpack(body)
            ]
        except (struct.error, ValueError, KeyError, IndexError, TypeError) as error:
            if isinstance(error, BadWorkingSet):
                raise
            raise BadWorkingSet(f"{path} is damaged") from error
        found = cls(ranges, first)
        found.digest = blake2b(data).digest()
        return found

    def file_ranges(
        self, images: dict[int, ProcessImage], before_first_token: bool = True
    ) -> list[tuple[str, int, int]]:
        """Return (pages file, offset, length) of the ranges in the image, in the order of need.

        Use it to fetch the ranges, or to lay them out.
        """
        found: list[tuple[str, int, int]] = []
        for process, start, end in self.before_first_token if before_first_token else self.after_first_token:
            image = images.get(process)
            if image is None:
                continue
            for low, high, offset in image.within(start, end):
                name, at, length = found[-1] if found else ("", 0, 0)
                if name == image.pages_file and at + length == offset:
                    found[-1] = (name, at, length + high - low)
                else:
                    found.append((image.pages_file, offset, high - low))
        return found


def _pages(known: Iterable[Range], faults: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    for process, start, end in known:
        for page in range(start, end, PAGE):
            yield process, page
    yield from faults


def _coalesce(
    faults: Iterable[tuple[int, int]], images: dict[int, ProcessImage], placed: dict[int, set[int]]
) -> list[Range]:
    """Merge faulted pages that are not in `placed` yet into ranges.

    The ranges come block by block, in the order of each block's first fault.
    """
    blocks: dict[tuple[int, int], list[int]] = {}
    for process, address in faults:
        seen = placed.setdefault(process, set())
        if address not in seen:
            seen.add(address)
            blocks.setdefault((process, address // _BLOCK), []).append(address)
    found: list[Range] = []
    borders_of: dict[int, set[int]] = {}
    for (process, _), addresses in blocks.items():
        addresses.sort()
        start, end = addresses[0], addresses[0] + PAGE
        ranges = []
        for address in addresses[1:]:
            if address - end > _GAP:
                ranges.append((start, end))
                start = address
            end = address + PAGE
        ranges.append((start, end))
        image = images.get(process)
        borders = borders_of.setdefault(process, set(image.borders if image else ()))
        for low, high in ranges:
            for part in image.split(low, high) if image else [(low, high)]:
                last = found[-1] if found else (0, 0, 0)
                joined = last[0] == process and last[2] == part[0]
                if joined and part[0] not in borders:
                    found[-1] = (process, last[1], part[1])
                else:
                    found.append((process, *part))
    return found
