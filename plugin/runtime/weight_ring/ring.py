"""Threads that read a stream of segments from files into a ring of shared memory, ahead of one reader.

Slot number n of the stream is in slot n modulo the ring's size. The reader takes slots in order and frees them in order. The
memory is a memfd: the reader maps it too, and registers it with its driver. A thread that waits for a stalled file keeps the
memory and the files until it ends; nothing else waits for it.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import mmap
import os
import threading
import time
from collections.abc import Sequence

from checkpoint.errors import Failed
from plugin.runtime.weight_ring.layout import ZEROS

SLOT_BYTES = 16 << 20
SLOTS = 8
THREADS = 8
_MADV_HUGEPAGE = 14
_LOOK, _ADVISE = 2 << 20, 128 << 10
"""Bytes for each look whether they are in the page cache, and for each advice: the kernel reads no more at once (read_ahead_kb)."""


class Source:
    """One file of the stream."""

    def __init__(self, path: str | os.PathLike[str], size: int) -> None:
        """Open the file. Raises OSError, also if its size is not `size` (bytes)."""
        self.path = os.fspath(path)
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd).st_size
        if found != size:
            self.close()
            raise OSError(0, f"it has {found} bytes, where the snapshot's engine read {size}", self.path)

    def warm(self, offset: int, size: int) -> bool:
        """Have the kernel read a part that is not in the page cache; return False where the file system does not say what is.

        Raises OSError.
        """
        for at in range(offset, offset + size, _LOOK):
            try:
                os.preadv(self.fd, [bytearray(1)], at, os.RWF_NOWAIT)
            except BlockingIOError:
                for part in range(at, min(at + _LOOK, offset + size), _ADVISE):
                    os.posix_fadvise(self.fd, part, _ADVISE, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    return False
                raise
        return True

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


class Ring:
    """Reads `segments` ((file, offset, bytes); ZEROS as the file stands for zeros) from `sources`, by their number."""

    def __init__(
        self,
        sources: dict[int, Source],
        segments: Sequence[tuple[int, int, int]],
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
        threads: int | None = None,
    ) -> None:
        """Make the memory; `start` begins to read. The ring closes the sources. Raises OSError."""
        self.total = sum(size for _, _, size in segments)
        self.slot_bytes = min(slot_bytes, max(mmap.PAGESIZE, self.total))
        self.count = -(-self.total // self.slot_bytes)
        """Slots of the whole stream."""
        self.slots = min(slots, self.count)
        self._sources, self._segments = sources, segments
        self._starts = [0, *itertools.accumulate(size for _, _, size in segments)]
        self.fd = os.memfd_create("quickthaw-weights", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.slots * self.slot_bytes)
        self._memory = mmap.mmap(self.fd, self.slots * self.slot_bytes)
        with contextlib.suppress(OSError):  # the kernel may give no huge pages to shared memory
            self._memory.madvise(_MADV_HUGEPAGE)
        self._state = threading.Condition()
        self._next = self._freed = self._users = 0
        self._filled: set[int] = set()
        self._closed = False
        self.error = ""
        """Why no more slots will be filled: `code: reason`, or ""."""
        self.began = 0.0
        self.ahead = (0, 0.0)
        """Bytes that were read before the first slot was taken, and when the last of them was there (monotonic seconds)."""
        self.ended = 0.0
        """When the last slot was filled (monotonic seconds); 0 until then."""
        wanted = threads or min(THREADS, os.cpu_count() or 1)
        self._threads = [
            threading.Thread(target=self._work, name=f"weights-{number}", daemon=True)
            for number in range(min(wanted, self.count))
        ]
        if self.count > self.slots:
            self._threads.append(threading.Thread(target=self._warm, name="weights-warm", daemon=True))

    def start(self) -> None:
        """Begin to read, with as many threads as can be started. Raises Failed (weights-unreadable) if that is none."""
        self.began = time.monotonic()
        self._users = len(self._threads)
        for number, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:
                with self._state:
                    self._users -= len(self._threads) - number
                if not number:
                    self.close()
                    raise Failed("weights-unreadable", f"no thread to read them: {error}") from error
                return

    def wait_filled(self, number: int, timeout_s: float) -> int:
        """Return the bytes of slot `number` of the stream once they are there; 0 if they will never be, or not within the timeout."""
        with self._state:
            self._state.wait_for(lambda: number in self._filled or self.error or self._closed, timeout_s)
            return self._size(number) if number in self._filled else 0

    def wait_ahead(self, timeout_s: float) -> bool:
        """Wait until every slot is filled that can be before one is freed; return whether they are."""
        with self._state:
            self._state.wait_for(lambda: len(self._filled) >= self.slots or self.error or self._closed, timeout_s)
            return len(self._filled) >= self.slots

    def view(self, number: int) -> memoryview:
        """Return the memory of slot `number` of the stream. It must be released before `close`."""
        at = number % self.slots * self.slot_bytes
        return memoryview(self._memory)[at : at + self._size(number)]

    def free(self, number: int) -> None:
        """Let slot `number`, and all before it, be filled again."""
        with self._state:
            self._freed = max(self._freed, number + 1)
            self._state.notify_all()

    def close(self) -> None:
        """Stop reading and give the memory back, at once or as soon as a stalled read ends. Idempotent."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.notify_all()
            idle = not self._users
        os.close(self.fd)
        if idle:
            self._release()

    def _release(self) -> None:
        for source in self._sources.values():
            source.close()
        with contextlib.suppress(BufferError):  # a reader holds a view: the memory goes with it
            self._memory.close()

    def _size(self, number: int) -> int:
        return min(self.slot_bytes, self.total - number * self.slot_bytes)

    def _work(self) -> None:
        try:
            while (number := self._take()) is not None:
                self._fill(number)
                with self._state:
                    self._filled.add(number)
                    now = time.monotonic()
                    if not self._freed:
                        self.ahead = (sum(map(self._size, self._filled)), now)
                    if len(self._filled) == self.count:
                        self.ended = now
                    self._state.notify_all()
        except OSError as error:
            with self._state:
                self.error = self.error or f"weights-unreadable: {error.filename}: {error.strerror or error}"
                self._state.notify_all()
        finally:
            self._leave()

    def _warm(self) -> None:
        """When the ring is full and nobody takes from it, bring what follows into the page cache."""
        try:
            with self._state:
                self._state.wait_for(lambda: len(self._filled) >= self.slots or self._closed or self.error)
            begin, at = self.slots * self.slot_bytes, 0
            for file, offset, size in self._segments:
                skip = min(size, max(0, begin - at))
                for part in range(skip, size if file != ZEROS else 0, self.slot_bytes):
                    if self._closed or self._freed or self.error:
                        return
                    if not self._sources[file].warm(offset + part, min(self.slot_bytes, size - part)):
                        return
                at += size
        except OSError:
            pass  # whoever reads it finds the same error, and says so
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._state:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            self._release()

    def _take(self) -> int | None:
        """Return the number of the next slot to fill, once it is free; None when nothing is left to do."""
        with self._state:
            number = self._next
            if number == self.count or self._closed or self.error:
                return None
            self._next += 1
            self._state.wait_for(lambda: number - self._freed < self.slots or self._closed or self.error)
            return None if self._closed or self.error else number

    def _fill(self, number: int) -> None:
        begin = number * self.slot_bytes
        with self.view(number) as view:
            index = bisect.bisect_right(self._starts, begin) - 1
            done = 0
            while done < len(view):
                file, offset, size = self._segments[index]
                inside = begin + done - self._starts[index]
                part = min(size - inside, len(view) - done)
                with view[done : done + part] as into:
                    if file == ZEROS:
                        into[:] = bytes(part)
                    else:
                        self._read(self._sources[file], into, offset + inside)
                done, index = done + part, index + 1

    def _read(self, source: Source, into: memoryview, offset: int) -> None:
        while into:
            if self._closed:
                raise OSError(0, "stopped", source.path)
            try:
                got = os.preadv(source.fd, [into], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, source.path) from error
            if not got:
                raise OSError(0, "the file became shorter", source.path)
            into, offset = into[got:], offset + got
