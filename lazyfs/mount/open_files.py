"""The files that the kernel has open: where the bytes of each come from, and whether its opens are passed through.

The kernel refuses cached and passthrough opens of one inode at the same time, so the first open of an inode decides for all
later ones until the last of its kind is closed.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import AnySparseFile
from lazyfs.content.manifest import File
from lazyfs.content.stat_index import is_unchanged
from lazyfs.counters import Counters
from lazyfs.errors import Permanent
from lazyfs.fetch.chunk import open_origin
from lazyfs.mount.tree import Node


class Span(NamedTuple):
    """Bytes in a file of this host.

    `fd` is valid until the reply is sent: the kernel closes the open only then.
    """

    fd: int
    offset: int
    size: int


def read_span(span: Span) -> bytes:
    """Read the bytes of a span.

    Raises OSError if they cannot be read: a failing disk, or a truncated original.
    """
    data = os.pread(span.fd, span.size, span.offset)
    if len(data) != span.size:
        raise OSError(errno.EIO, "the file is shorter than it was")
    return data


class Backing:
    """An open file that holds (or will hold) the bytes of one manifest file: the original, or the sparse cache file."""

    def __init__(self, fd: int, sparse_file: AnySparseFile | None) -> None:
        self.fd = fd
        self.sparse_file = sparse_file
        # Only lazyfs writes to a sparse cache file, which may have no descriptor (full disk).
        self._fingerprint = self._stat() if sparse_file is None else None

    def _stat(self) -> tuple[int, int]:
        st = os.fstat(self.fd)
        return st.st_size, st.st_mtime_ns

    def changed(self) -> bool:
        """Return whether an original was written to since it was opened.

        A replaced or removed one keeps its bytes.
        """
        return self.sparse_file is None and self._stat() != self._fingerprint

    def complete(self) -> bool:
        """Return whether every byte may be read."""
        return self.sparse_file is None or self.sparse_file.complete()

    def close(self) -> None:
        """Close the descriptor; a sparse cache file's pin is released with it."""
        if self.sparse_file is not None:
            self.sparse_file.close()
        else:
            os.close(self.fd)


@dataclass
class OpenFile:
    """One inode while the kernel has it open.

    `cached` counts opens served by reads, `native` counts passthrough opens.
    """

    node: Node
    file: File
    backing: Backing
    cached: int = 0
    native: int = 0
    backing_id: int = 0
    last_chunk: int = -2
    # Chunks to read ahead (see `Service`).
    window: int = 0
    # Number of `OpenFiles.open` calls in progress, which keep it from being closed.
    opening: int = 0
    # Whether every read may be answered from the backing without looking at chunks.
    complete: bool = False
    touched: set[int] = field(default_factory=set)


class OpenFiles:
    """Table of the open files by inode number. Thread-safe.

    `origins`: files that are read at the place of their import. `on_closed` is called after the last close of a file, before
    its backing is closed.
    """

    def __init__(self, cache: Cache, counters: Counters) -> None:
        self.cache = cache
        self.counters = counters
        self.origins: dict[str, tuple[str, list[int]]] = {}
        self.on_closed: Callable[[OpenFile], None] = lambda opened: None
        self.by_inode: dict[int, OpenFile] = {}
        self.last_use = time.monotonic()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.by_inode)

    def open(self, node: Node, *, may_pass: bool) -> tuple[OpenFile, bool]:
        """Open a file; return its state and whether this open is to be passed through.

        May block on the disk, or on a network file system that holds the original. Raises Permanent (source-changed) if the
        original was written to while open, or what the cache raises.
        """
        opened = self._hold(node)
        try:
            if opened.backing.changed():
                # The kernel's page cache of an open inode may hold the old bytes.
                raise Permanent(
                    f"{opened.file.path}: its original was written to while it is open; "
                    "close it everywhere, then the imported bytes are served again",
                    code="source-changed",
                )
            with self._lock:
                native = may_pass and node.size > 0 and opened.cached == 0 and opened.backing.complete()
                if native:
                    opened.native += 1
                    self.counters.native_opens += 1
                else:
                    opened.cached += 1
                self.counters.opens += 1
            return opened, native
        finally:
            with self._lock:
                opened.opening -= 1
            self._close_unused(opened)

    def _hold(self, node: Node) -> OpenFile:
        """Return the file's state, which is not closed while `opening` counts this call."""
        assert node.file is not None
        with self._lock:
            self.last_use = time.monotonic()
            opened = self.by_inode.get(node.ino)
            if opened is not None:
                opened.opening += 1
                return opened
        backing = self._backing(node.file)
        with self._lock:
            opened = self.by_inode.get(node.ino)
            spare = None if opened is None else backing
            if opened is None:
                opened = self.by_inode[node.ino] = OpenFile(node, node.file, backing)
            opened.opening += 1
        if spare is not None:
            # Another thread opened it at the same time.
            spare.close()
        return opened

    def _backing(self, file: File) -> Backing:
        found = self.origins.get(file.path)
        if found is not None:
            with open_origin(*found) as fd:
                if fd is not None:
                    return Backing(os.dup(fd), None)
        sparse_file = self.cache.open_any(file)
        sparse_file.read_only()
        return Backing(sparse_file.data_fd, sparse_file)

    def release(self, opened: OpenFile, *, native: bool) -> None:
        """Count a close of the inode by the kernel. The last one closes the backing."""
        with self._lock:
            self.last_use = time.monotonic()
            if native:
                opened.native -= 1
            else:
                opened.cached -= 1
        self._close_unused(opened)

    def _close_unused(self, opened: OpenFile) -> None:
        with self._lock:
            if opened.cached or opened.native or opened.opening or self.by_inode.get(opened.node.ino) is not opened:
                return
            del self.by_inode[opened.node.ino]
        self.on_closed(opened)
        # No reply can still need it: the kernel sends a release only after every read of the open was answered.
        opened.backing.close()

    def reads_origin(self, file: File) -> bool:
        """Return whether a file is read at the place of its import."""
        origin = self.origins.get(file.path)
        return origin is not None and is_unchanged(*origin)

    def cached_fraction(self, node: Node) -> float:
        """Return how much of a file is on this host, 0 to 1."""
        if node.file is None or not node.file.size or self.reads_origin(node.file):
            return 1.0
        return self.cache.present_bytes(node.file) / node.file.size
