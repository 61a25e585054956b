"""The reads of a restore before the first token, in the order in which a disk should serve them.

They are cached in `.verified-reading`. From a cold disk, every part of a restore would read its own pages: CRIU the
images, the page server the working set, the engine its mapped files. Small reads then wait behind large ones, and each
fault on a mapped library reads megabytes of neighbours. So everything is requested at once, before the other reads:
images that CRIU parses, pages it copies, used pages of mapped libraries (`touched_pages`), pages that the page server
copies, and then mapped pages, in the order of need.

The list only affects speed: a wrong one reads unneeded pages. Standard library only.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence

from checkpoint.criu.pagemap import ProcessImage, within
from checkpoint.lazy_pages import cache, uffd
from checkpoint.lazy_pages.uffd import PAGE

TYPE_CHECKING = False  # importing typing would delay a restore by 3 ms
if TYPE_CHECKING:
    from checkpoint.lazy_pages.working_set import WorkingSet

FILE_NAME = ".verified-reading"
_VERSION = 4
# Gap in bytes up to which a disk reads two extents at once as fast as separately.
_MERGE_GAP = 16 << 10
# Mapped pages and the pack are read in blocks of a file of the largest folio size, in the order of need. If a smaller
# share than _WHOLE_SHARE of a block is needed, only that part is read. Reading single pages of a block first would keep it
# from becoming one folio.
_BLOCK = 2 << 20
_WHOLE_SHARE = 0.25
# Number of reader threads: with one, the disk would idle while it waits for a CPU.
_READERS = 2
# Blocks per system call; a stop waits for one call.
_BLOCKS_PER_CALL = 32
_SAMPLES = 200
# A page table entry (Documentation/admin-guide/mm/pagemap.rst).
_PRESENT = 1 << 63
_ENTRY_BYTES = 8

Extent = tuple[int, int, int]
"""(number of the file, offset, length)"""


class ColdReads:
    """The cached list of a folder of images, and the thread that requests its reads from the disk.

    `working_set` is the digest of the working set that the list was made with, empty if there is no list. `cold`:
    whether part of the list is not in the page cache. `requested` is set, and listeners are notified, once everything
    that will be copied was requested; mapped pages follow.
    """

    @classmethod
    def start(cls, config: Mapping[str, object]) -> ColdReads | None:
        """Begin the reads for a page server's configuration.

        Returns None if a working set is being recorded, images are still arriving, or only the images may be used.
        """
        without = config.get("record") or config.get("downloading") or not config.get("pack", True)
        return None if without else cls(str(config["images"]))

    def __init__(self, images: str) -> None:
        self.working_set = b""
        self.cold = False
        self.requested = threading.Event()
        self._images = images
        self._notify: Callable[[], None] = lambda: None
        self._stopping = False
        self._fds: list[int] = []
        self._whole_files: list[str] = []
        self._small, self._copied, self._mapped = array("Q"), array("Q"), array("Q")
        try:
            head, lists = cache.read(images, FILE_NAME, _VERSION)
            for extents, body in zip((self._small, self._copied, self._mapped), lists, strict=True):
                extents.frombytes(body)
            paths = [os.path.join(images, cache.checked_pages_file(name)) for name in head["names"]]
            if head["packed"]:
                paths.append(cache.path(images, cache.PACK))
            for path in paths:
                self._fds.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if any(os.path.basename(name) != name for name in head["whole"]):
                raise ValueError("not an image file")
            self._whole_files, self.working_set = head["whole"], bytes.fromhex(head["working_set"])
            self.cold = not self._cached()
        except (OSError, ValueError, TypeError, LookupError):
            self.working_set, self.cold = b"", False  # none yet, of another version, or damaged
        if self.cold:
            try:
                # Issue these hundreds of calls here: another thread would wait for the interpreter lock at each of
                # them.
                for file, offset, length in _triples(self._small):
                    self._request(self._fds[file], offset, length)
                threading.Thread(target=self._read, name="reading", daemon=True).start()
                return
            except (
                RuntimeError,
                OSError,
                LookupError,
            ):  # no more threads, or a bad extent: each part reads its own pages
                self.working_set, self.cold = b"", False
        self._close()

    def listen(self, notify: Callable[[], None]) -> None:
        """Have a thread call `notify` when `requested` is set; call it at once if it is set already."""
        self._notify = notify
        if self.requested.is_set():
            notify()

    @property
    def size(self) -> int:
        """Bytes listed, without the files that are read whole."""
        return sum(sum(extents[2::3]) for extents in (self._small, self._copied, self._mapped))

    def write(
        self,
        working_set: WorkingSet,
        of: Mapping[int, ProcessImage],
        used: Mapping[int, list[tuple[int, int, int]]],
        packed: bool,
    ) -> None:
        """Cache the list of what a restore with this working set reads.

        `used`: of each process, the other mapped memory it used, as (first address, end address, offset in the pages
        file). `packed`: whether the page server copies from a pack (checkpoint.lazy_pages.cache) instead of the
        images.
        """
        whole = sorted(name for name in os.listdir(self._images) if not name.startswith("pages-"))
        names = sorted({image.pages_file for image in of.values()})
        number = {name: at for at, name in enumerate(names)}
        copied: dict[int, list[tuple[int, int]]] = {}
        mapped: list[Extent] = []
        small: list[Extent] = []
        for pid, image in of.items():
            runs = _of_file([*image.eager, *used.get(pid, ())])
            small += [(number[image.pages_file], low, high - low) for low, high in _merged(runs, _MERGE_GAP)]
        for pid, start, end in working_set.before_first_token:
            if found := of.get(pid):
                file = number[found.pages_file]
                copied.setdefault(file, []).extend(_of_file(found.within(start, end)))
                mapped += [(file, low, high - low) for low, high in _of_file(found.mapped_within(start, end))]
        large: list[Extent] = []
        if packed:
            large = _in_blocks([(len(names), 0, os.stat(cache.path(self._images, cache.PACK)).st_size)])
        else:
            small += [
                (file, low, high - low) for file, runs in copied.items() for low, high in _merged(runs, _MERGE_GAP)
            ]
        head = {"working_set": working_set.digest.hex(), "names": names, "packed": packed, "whole": whole}
        lists = [cache.flat(extents) for extents in (small, large, _in_blocks(mapped))]
        cache.write(self._images, FILE_NAME, _VERSION, head, lists)

    def stop(self) -> None:
        """Skip the reads not yet requested. The thread is not joined."""
        self._stopping = True

    def _cached(self) -> bool:
        """Return whether evenly sampled pages are all in the page cache."""
        byte = bytearray(1)
        for fd in self._fds:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # without it, reading one page brings its neighbours
        try:
            for extents in (self._small, self._copied, self._mapped):
                for at in range(0, len(extents), 3 * max(1, len(extents) // (3 * _SAMPLES))):
                    file, offset, _ = extents[at : at + 3]
                    os.preadv(self._fds[file], [byte], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        finally:
            for fd in self._fds:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
        return True

    def _read(self) -> None:
        try:
            try:
                for name in self._whole_files:  # opened here: opening forty files takes 10 ms during a start
                    fd = os.open(os.path.join(self._images, name), os.O_RDONLY | os.O_CLOEXEC)
                    self._request(fd, 0, 0)
                    os.close(fd)
                self._read_large(self._copied)
            finally:
                self.requested.set()
                self._notify()
            self._read_large(self._mapped)
        except (OSError, LookupError, RuntimeError):
            pass  # whichever part needs the bytes reads them itself, and reports errors
        finally:
            self._close()

    def _request(self, fd: int, offset: int, length: int) -> None:
        if not self._stopping:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _read_large(self, extents: array[int]) -> None:
        """Read through mappings that prefer large pages: 2 MB folios load at full disk speed, and cost little more than 4 KB ones."""
        sources: dict[int, tuple[int, int, bool]] = {}
        try:
            whole: list[tuple[int, int]] = []
            for file, offset, length in _triples(extents):
                if file not in sources:
                    address, size = uffd.map_file(f"/proc/self/fd/{self._fds[file]}")
                    sources[file] = (address, size, size > 0 and uffd.prefer_large(address, size))
                address, size, large = sources[file]
                if large and length == _BLOCK and offset < size:
                    whole.append((address + offset, min(length, -(-size // PAGE) * PAGE - offset)))
                else:
                    self._request(self._fds[file], offset, length)
            others = [
                threading.Thread(target=self._populate, args=(whole[first::_READERS],), name="reading", daemon=True)
                for first in range(1, _READERS)
            ]
            for other in others:
                other.start()
            self._populate(whole[::_READERS])
            for other in others:
                other.join()
        finally:
            for address, size, _ in sources.values():
                if size:
                    uffd.unmap(address, size)

    def _populate(self, blocks: list[tuple[int, int]]) -> None:
        for at in range(0, len(blocks), _BLOCKS_PER_CALL):
            if not self._stopping:
                uffd.populate_all(blocks[at : at + _BLOCKS_PER_CALL])

    def _close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


def _of_file(runs: Iterable[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Convert address runs to file ranges."""
    return [(offset, offset + end - start) for start, end, offset in runs]


def _merged(runs: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Sort the runs, and merge those at most `gap` bytes apart."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(runs):
        if found and low - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _in_blocks(extents: Sequence[Extent]) -> list[Extent]:
    """Group extents into file blocks, ordered by the mean position of each block's bytes in the order of need.

    Of blocks with little needed data, only that part is returned.
    """
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    when: dict[tuple[int, int], tuple[int, int]] = {}
    for at, (file, offset, length) in enumerate(extents):
        for low in range(offset // _BLOCK * _BLOCK, offset + length, _BLOCK):
            start, end = max(low, offset), min(low + _BLOCK, offset + length)
            parts.setdefault((file, low), []).append((start, end))
            total, weight = when.get((file, low), (0, 0))
            when[file, low] = (total + at * (end - start), weight + end - start)
    order = sorted(parts, key=lambda block: when[block][0] / when[block][1])
    found = []
    for file, block in order:
        merged = _merged(parts[file, block], _MERGE_GAP)
        if sum(high - low for low, high in merged) >= _WHOLE_SHARE * _BLOCK:
            merged = [(block, block + _BLOCK)]
        found += [(file, low, high - low) for low, high in merged]
    return found


def _triples(numbers: array[int]) -> Iterable[Extent]:
    three = iter(numbers)
    return zip(three, three, three, strict=True)


# Used pages of mapped files


def namespace_of(peer: socket.socket) -> int:
    """Return the inode of the connected process's pid namespace; 0 if unknown."""
    process, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        return os.stat(f"/proc/{process}/ns/pid").st_ino
    except OSError:
        return 0


def _processes(namespace: int) -> dict[int, int]:
    """Map the process numbers inside a namespace to those outside."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}/ns/pid").st_ino == namespace:
                with open(f"/proc/{name}/status", encoding="ascii", errors="replace") as file:
                    numbers = next(line for line in file if line.startswith("NSpid:")).split()
                found[int(numbers[-1])] = int(name)
        except (OSError, StopIteration):
            continue  # it has ended, or we may not read it
    return found


def touched_pages(
    namespace: int, images: Mapping[int, ProcessImage], known: Iterable[tuple[int, int, int]]
) -> dict[int, list[tuple[int, int, int]]]:
    """Return each process's used mapped memory outside the `known` ranges, as (first address, end address, offset).

    The kernel's page tables show it; userfaultfd does not. A process that cannot be inspected has an empty list.
    """
    ranges: dict[int, list[tuple[int, int]]] = {}
    for pid, start, end in known:
        ranges.setdefault(pid, []).append((start, end))
    here = _processes(namespace)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for pid, image in images.items():
        found[pid] = []
        if pid in here and image.mapped:
            try:
                fd = os.open(f"/proc/{here[pid]}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                for start, end in _beside(image, ranges.get(pid, [])):
                    found[pid] += [
                        run for low, high in _present(fd, start, end) for run in within(image.mapped, low, high)
                    ]
            except OSError:
                continue
            finally:
                os.close(fd)
    return found


def _beside(image: ProcessImage, known: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the mapped ranges without the known ranges."""
    found = []
    known.sort()
    at = 0
    for start, end, _ in image.mapped:
        while at < len(known) and known[at][1] <= start:
            at += 1
        position, index = start, at
        while index < len(known) and known[index][0] < end:
            if position < known[index][0]:
                found.append((position, known[index][0]))
            position = max(position, known[index][1])
            index += 1
        if position < end:
            found.append((position, end))
    return found


def _present(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the runs of pages in [start, end) that are present in the page table."""
    entries = array("Q")
    entries.frombytes(os.pread(fd, (end - start) // PAGE * _ENTRY_BYTES, start // PAGE * _ENTRY_BYTES))
    found: list[tuple[int, int]] = []
    for at, entry in enumerate(entries):
        if entry & _PRESENT:
            low = start + at * PAGE
            if found and found[-1][1] == low:
                found[-1] = (found[-1][0], low + PAGE)
            else:
                found.append((low, low + PAGE))
    return found
