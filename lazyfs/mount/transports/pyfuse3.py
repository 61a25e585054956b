"""The transport over pyfuse3 (libfuse): needs no privilege beyond fusermount3, does not support passthrough.

Large answers from the cache are sent from a mapping of the cache file, which one call populates and which lives as long as
the answer: one copy instead of two, and never more of a cache file in this process's memory than one answer. Small answers,
and those of a file read in place (which may be truncated at any moment), are read into one page-aligned buffer. All of this
runs in the trio thread: a thread hop costs nearly half of the throughput. Reads that wait for chunks sleep on an event that
the fetcher's answer thread sets.
"""

from __future__ import annotations

import errno
import functools
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio

from lazyfs.errors import HostLacks, LazyfsError, to_errno
from lazyfs.mount import kernel
from lazyfs.mount.open_files import OpenFile, Span, read_span
from lazyfs.mount.service import Service
from lazyfs.mount.tree import Node
from lazyfs.mount.xattrs import get_xattr, list_xattrs

log = logging.getLogger("lazyfs.pyfuse3")
_FOREVER_S = 86400 * 365
# Longer than libfuse's INIT handshake takes on a busy machine. Missing it costs throughput, not correctness.
_HANDSHAKE_S = 1.0
# libfuse's largest request; a larger one would get memory of its own.
_BUFFER = 1 << 20
_WORTH_MAPPING = 128 << 10
_PAGE = mmap.PAGESIZE
_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
F = TypeVar("F", bound=Callable[..., Any])
_T_NS = 1_000_000_000 * 10**9


class Pyfuse3Transport:
    """One mounted connection.

    `start` mounts and serves in a thread; `wait` reports when the mount is gone.
    """

    name = "pyfuse3"
    passthrough = False

    def __init__(self, service: Service, mountpoint: str, source: str, *, allow_other: bool = False) -> None:
        self.service = service
        self.allow_other = allow_other
        self.mountpoint = mountpoint
        self.source = source
        self.unmounted = False
        self._thread = threading.Thread(target=self._run, name="fuse", daemon=True)

    def start(self) -> None:
        """Mount and start serving. Raises HostLacks if the host does not allow it."""
        options = set(pyfuse3.default_options) | {"ro", f"fsname={self.source}", "subtype=quickthaw"}
        if self.allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(_Operations(self.service), self.mountpoint, options)
        except RuntimeError as error:
            raise HostLacks(
                f"cannot mount at {self.mountpoint}: {error}; check that /dev/fuse and fusermount3 exist"
            ) from error
        # The kernel resets the readahead to libfuse's default at the INIT handshake, which the loop handles. A marker
        # value that disappears shows that it has happened. Unprivileged, neither can be set, and 128 KiB remain.
        settable = kernel.set_read_ahead(self.mountpoint)
        self._thread.start()
        deadline = time.monotonic() + _HANDSHAKE_S
        while settable and time.monotonic() < deadline:
            if kernel.read_ahead(self.mountpoint) != kernel.READ_AHEAD_KIB:
                kernel.set_read_ahead(self.mountpoint)
                break
            time.sleep(0.001)

    def wait(self, limit_s: float) -> bool:
        """Wait up to `limit_s` seconds; return whether the mount is gone."""
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            # Several tasks: otherwise a read that waits for the network would block all others.
            trio.run(pyfuse3.main, 1, 99)
            # libfuse ends the loop after an abort, too. That mount stays, without a server, until it is unmounted or mounted again.
            self.unmounted = True
        finally:
            pyfuse3.close(unmount=False)


def _errors_as_errno(operation: F) -> F:
    """Convert every exception of an operation to an errno for its reader: any other exception would end the mount."""

    @functools.wraps(operation)
    async def inner(self: _Operations, *arguments: Any) -> Any:
        try:
            return await operation(self, *arguments)
        except pyfuse3.FUSEError:
            raise
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        except LazyfsError as error:
            self.service.repeats.log(logging.ERROR, error.code, f"{error.code}: {error}")
            raise pyfuse3.FUSEError(to_errno(error)) from error
        except Exception as error:
            log.exception("%s failed", operation.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return inner  # type: ignore[return-value]


class _Operations(pyfuse3.Operations):  # type: ignore[misc]
    enable_writeback_cache = False
    supports_dot_lookup = False

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.service = service
        self.handles: dict[int, OpenFile] = {}
        self.next_handle = 1
        self.next_unique = 1
        self.buffer = memoryview(mmap.mmap(-1, _BUFFER))
        self.token: trio.lowlevel.TrioToken | None = None

    def _node(self, inode: int) -> Node:
        node = self.service.tree.get(inode)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node

    def _attributes(self, node: Node) -> Any:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, entry.st_mode, entry.st_nlink, entry.st_size = node.ino, node.mode, node.nlink, node.size
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = _T_NS
        entry.st_blksize, entry.st_blocks = 1 << 20, (node.size + 511) // 512
        entry.entry_timeout = entry.attr_timeout = _FOREVER_S
        return entry

    @_errors_as_errno
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
        parent = self._node(parent_inode)
        node = {b".": parent, b"..": self._node(parent.parent)}.get(name) or parent.children.get(name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG if len(name) > 255 else errno.ENOENT)
        return self._attributes(node)

    @_errors_as_errno
    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        return self._attributes(self._node(inode))

    @_errors_as_errno
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        node = self._node(inode)
        if not node.target:
            raise pyfuse3.FUSEError(errno.EINVAL)
        return node.target

    @_errors_as_errno
    async def opendir(self, inode: int, ctx: Any) -> int:
        if not self._node(inode).is_dir:
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    @_errors_as_errno
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        children = list(self._node(fh).children.items())
        for position in range(start_id, len(children)):
            name, node = children[position]
            if not pyfuse3.readdir_reply(token, name, self._attributes(node), position + 1):
                return

    @_errors_as_errno
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        node = self._node(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        if node.file is None:
            raise pyfuse3.FUSEError(errno.EISDIR if node.is_dir else errno.EINVAL)
        # In a thread: the disk, or a network file system with the original, must not block other requests.
        opened, _ = await trio.to_thread.run_sync(functools.partial(self.service.files.open, node, may_pass=False))
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.handles[handle] = opened
        return pyfuse3.FileInfo(fh=handle, keep_cache=True)

    @_errors_as_errno
    async def read(self, fh: int, off: int, size: int) -> memoryview | bytes:
        opened = self.handles.get(fh)
        if opened is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        if self.token is None:
            self.token = trio.lowlevel.current_trio_token()
        token, arrived = self.token, trio.Event()
        answer: list[Span | bytes | int] = []

        def reply(data: Span | bytes | int) -> None:
            answer.append(data)
            if threading.get_ident() != here:
                try:
                    token.run_sync_soon(arrived.set)
                except trio.RunFinishedError:
                    # Unmounted meanwhile: no reader is waiting.
                    return

        here = threading.get_ident()
        self.next_unique += 1
        self.service.read(opened, off, size, self.next_unique, reply)
        if not answer:
            await arrived.wait()
        data = answer[0]
        if isinstance(data, int):
            raise pyfuse3.FUSEError(data)
        if not isinstance(data, Span):
            return data
        if data.size >= _WORTH_MAPPING and opened.backing.sparse_file is not None and data.fd == opened.backing.fd:
            try:
                return _mapped(data)
            except OSError:
                pass  # an old kernel, or a failing disk: the read below shows which
        return self._bytes(data)

    def _bytes(self, span: Span) -> memoryview | bytes:
        """Read the span into the shared buffer: pyfuse3 sends it before this thread runs another task.

        Raises FUSEError if it cannot be read.
        """
        try:
            if span.size > _BUFFER:
                return read_span(span)
            if os.preadv(span.fd, [self.buffer[: span.size]], span.offset) < span.size:
                raise OSError(errno.EIO, "the file is shorter than it was")
        except OSError as error:
            log.error("cannot read %d bytes at %d: %s", span.size, span.offset, error.strerror)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
        return self.buffer[: span.size]

    @_errors_as_errno
    async def release(self, fh: int) -> None:
        opened = self.handles.pop(fh, None)
        if opened is not None:
            self.service.files.release(opened, native=False)

    @_errors_as_errno
    async def statfs(self, ctx: Any) -> Any:
        stats = pyfuse3.StatvfsData()
        stats.f_bsize = stats.f_frsize = 4096
        stats.f_blocks = -(-self.service.tree.size // 4096)
        stats.f_files, stats.f_namemax = len(self.service.tree.nodes) - 1, 255
        return stats

    @_errors_as_errno
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        value: bytes = await trio.to_thread.run_sync(get_xattr, self.service, self._node(inode), name)
        return value

    @_errors_as_errno
    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        return [n for n in list_xattrs(self._node(inode)).split(b"\0") if n]

    @_errors_as_errno
    async def forget(self, inode_list: Any) -> None:
        return


def _mapped(span: Span) -> memoryview:
    """Return the span in a mapping that lives as long as the answer.

    Raises OSError if its pages cannot be populated.
    """
    start = span.offset & -_PAGE
    mapping = mmap.mmap(span.fd, span.offset + span.size - start, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
    mapping.madvise(_MADV_POPULATE_READ)
    return memoryview(mapping)[span.offset - start :]
