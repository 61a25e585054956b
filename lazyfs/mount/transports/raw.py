"""The FUSE protocol spoken directly over /dev/fuse: the transport that supports passthrough of complete files.

pyfuse3 (`lazyfs.mount.transports.pyfuse3`) cannot request passthrough, which is worth a factor of two to four. Layouts are
those of <linux/fuse.h>, protocol 7.40 and later. Each thread reads requests from its own clone of the connection. Reads are
answered by splicing the cache file's pages through a pipe: a fifth less processor time than a writev of a mapping, whose
pages must be faulted in and unmapped again, and the pages never count as this process's memory. Without CAP_SYS_ADMIN the
connection comes from `fusermount3`, and nothing is passed through: the kernel wants that privilege for it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable

from lazyfs.errors import HostLacks, LazyfsError, to_errno
from lazyfs.mount import kernel
from lazyfs.mount.open_files import OpenFile, Span, read_span
from lazyfs.mount.service import Service
from lazyfs.mount.tree import Node
from lazyfs.mount.xattrs import get_xattr, list_xattrs

log = logging.getLogger("lazyfs.raw")

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_READ = struct.Struct("<QQIIQII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_OPEN_OUT = struct.Struct("<QIi")
_STATFS = struct.Struct("<QQQQQIIII24x")
_DIRENT = struct.Struct("<QQII")

(_LOOKUP, _FORGET, _GETATTR, _READLINK, _OPEN, _READ_OP, _STATFS_OP, _RELEASE) = (1, 2, 3, 5, 14, 15, 17, 18)
(_GETXATTR, _LISTXATTR, _INIT, _OPENDIR, _READDIR, _RELEASEDIR) = (22, 23, 26, 27, 28, 29)
(_ACCESS, _INTERRUPT, _DESTROY, _IOCTL, _BATCH_FORGET) = (34, 36, 38, 39, 42)
# All modifying operations. The read-only mount stops these in the kernel, except an ioctl or a remount. (fsync is not
# among them: unimplemented, it succeeds, as on any read-only file system.)
_WRITES = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47})

_CLONE, _BACKING_OPEN, _BACKING_CLOSE = 0x8004E500, 0x4010E501, 0x4004E502
_ASYNC_READ, _PARALLEL_DIROPS, _MAX_PAGES = 1, 1 << 18, 1 << 22
_CACHE_SYMLINKS, _INIT_EXT, _PASSTHROUGH = 1 << 23, 1 << 30, 1 << 37
# With it the kernel answers ECONNABORTED after an abort, whose mount is still there, and ENODEV only after an unmount.
_ABORT_ERROR = 1 << 21
_KEEP_CACHE, _NOFLUSH, _FOPEN_PASSTHROUGH = 2, 32, 128
# The manifest is immutable: names and attributes never change while the mount lives.
_FOREVER_S = 86400 * 365
_BUFFER = 64 << 10
_PAGE = os.sysconf("SC_PAGE_SIZE")
# The largest size without CAP_SYS_RESOURCE: one slot per page, and one for the reply's header.
_PIPE = 1 << 20
_MOST_PAGES = _PIPE // _PAGE - 1
_NONBLOCK = 2


# Threads that wait for reads from the local disk; they do nothing else.
_DISK_THREADS = 4
# Opening a file and checking an original may block on a disk or a network file system.
_REFUSED_PAUSE_S = 0.1
_SLOW, _SLOW_THREADS = frozenset({_OPEN, _GETXATTR}), 4


def in_memory(span: Span) -> bool:
    """Return whether the kernel's page cache holds both ends of the span, so that a read will hardly wait for the disk.

    Also True if the file system cannot tell (tmpfs, which has no disk to wait for).
    """
    probe = bytearray(1)
    try:
        for place in (span.offset, span.offset + span.size - 1):
            os.preadv(span.fd, [probe], place, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        # The read itself finds and reports the error.
        return True
    return True


class Pipe:
    """A pipe through which one thread splices replies. Empty between replies, or closed and replaced."""

    def __init__(self) -> None:
        self.out, self.into = os.pipe2(os.O_CLOEXEC)
        try:
            self.slots = fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, _PIPE) // _PAGE
        except OSError:
            # The total pipe size per user is limited; the default is 16 pages.
            self.slots = fcntl.fcntl(self.into, fcntl.F_GETPIPE_SZ) // _PAGE

    def fill(self, header: bytes, span: Span) -> bool:
        """Write a reply into the empty pipe; return False if the pipe is too small.

        Raises OSError if the file cannot be spliced.
        """
        pages = (span.offset % _PAGE + span.size + _PAGE - 1) // _PAGE
        if pages + 1 > self.slots:
            # A direct read that is not page-aligned, or a pipe that could not be enlarged.
            return False
        os.write(self.into, header)
        offset, end = span.offset, span.offset + span.size
        while offset < end:
            n = os.splice(span.fd, self.into, end - offset, offset_src=offset, flags=_NONBLOCK)
            if n == 0:
                raise OSError(errno.EIO, "the file is shorter than it was")
            offset += n
        return True

    def close(self) -> None:
        """Close both ends, discarding the contents."""
        os.close(self.out)
        os.close(self.into)


class RawTransport:
    """One mounted connection.

    `start` mounts and serves in threads; `wait` reports when the mount is gone.
    """

    name = "raw"

    def __init__(
        self,
        service: Service,
        mountpoint: str,
        source: str,
        *,
        threads: int = 0,
        native: bool = True,
        allow_other: bool = False,
    ) -> None:
        self.service = service
        self.mountpoint = mountpoint
        self.source = source
        # A reply is one system call. Threads beyond half the processors would only wait for the interpreter and take
        # processors from the reader: with two processors a second thread slows the first read of a mapping
        # (docs/lazyfs.md).
        self.thread_count = threads or max(1, min(8, (os.cpu_count() or 2) // 2))
        self.native = native
        self.allow_other = allow_other
        self.passthrough = False
        self.unmounted = False
        self.fd = -1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._threads: list[threading.Thread] = []
        self._from_disk: queue.SimpleQueue[tuple[int, int, Span]] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[tuple[int, int, int, int, bytes]] = queue.SimpleQueue()
        self._handles: dict[int, tuple[OpenFile, bool]] = {}
        self._next_handle = 1
        self._lock = threading.Lock()
        self._local = threading.local()
        self._handlers: dict[int, Callable[[Node, memoryview], bytes]] = {
            _LOOKUP: self._lookup,
            _GETATTR: self._getattr,
            _READLINK: self._readlink,
            _OPEN: self._open,
            _STATFS_OP: self._statfs,
            _RELEASE: self._release,
            _OPENDIR: lambda node, body: _OPEN_OUT.pack(0, 0, 0),
            _READDIR: self._readdir,
            _RELEASEDIR: lambda node, body: b"",
            _GETXATTR: self._getxattr,
            _LISTXATTR: self._listxattr,
            _ACCESS: lambda node, body: b"",
            _DESTROY: lambda node, body: b"",
        }

    def start(self) -> None:
        """Mount, answer the kernel's INIT request and start serving.

        Raises HostLacks if the host does not allow it.
        """
        self.service.files.on_closed = self._on_closed
        self.fd = kernel.connect(self.mountpoint, self.source, allow_other=self.allow_other)
        self._handshake()
        kernel.set_read_ahead(self.mountpoint, min(kernel.READ_AHEAD_KIB, _MOST_PAGES * _PAGE >> 10))
        for number in range(self.thread_count):
            fd = self._clone() if number else self.fd
            thread = threading.Thread(target=self._serve, args=(fd,), name=f"fuse-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        for number in range(_DISK_THREADS):
            threading.Thread(target=self._serve_from_disk, name=f"disk-{number}", daemon=True).start()
        for number in range(_SLOW_THREADS):
            threading.Thread(target=self._serve_slow, name=f"open-{number}", daemon=True).start()

    def wait(self, limit_s: float) -> bool:
        """Wait up to `limit_s` seconds; return whether the mount is gone."""
        deadline = time.monotonic() + limit_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(t.is_alive() for t in self._threads)

    def _clone(self) -> int:
        """Return a descriptor of the same connection with a queue of its own, or the first one where the host gives none."""
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return self.fd
        try:
            fcntl.ioctl(fd, _CLONE, struct.pack("<I", self.fd))
        except OSError:
            os.close(fd)
            return self.fd
        return fd

    def _handshake(self) -> None:
        message = os.read(self.fd, _BUFFER)
        _, opcode, unique, *_ = _IN.unpack_from(message)
        major, minor, readahead, flags, flags2 = struct.unpack_from("<IIIII", message, _IN.size)
        if opcode != _INIT or major != 7 or minor < 36:
            raise HostLacks(f"the kernel speaks FUSE {major}.{minor}; 7.36 or later is needed (Linux 5.17)")
        offered = flags | flags2 << 32
        want = _ASYNC_READ | _PARALLEL_DIROPS | _MAX_PAGES | _INIT_EXT | _CACHE_SYMLINKS | _ABORT_ERROR
        if self.native:
            want |= _PASSTHROUGH
        want &= offered
        self.passthrough = bool(want & _PASSTHROUGH)
        body = _INIT_OUT.pack(
            7, min(minor, 45), readahead, want & 0xFFFFFFFF, 64, 48, 4096, 1, _MOST_PAGES, 0,
            want >> 32, 2 if self.passthrough else 0, 0,
        )  # fmt: skip
        os.write(self.fd, _OUT.pack(_OUT.size + len(body), 0, unique) + body)

    # -- the loop

    def _serve(self, fd: int) -> None:
        buffer = bytearray(_BUFFER)
        view = memoryview(buffer)
        while True:
            try:
                length = os.readv(fd, [buffer])
            except OSError as error:
                # ENODEV: unmounted. ECONNABORTED: connection aborted. EBADF, EPERM: not, or no longer, a connection.
                if error.errno in (errno.ENODEV, errno.ECONNABORTED, errno.EBADF, errno.EPERM):
                    self.unmounted = self.unmounted or error.errno == errno.ENODEV
                    return
                if error.errno not in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    # Out of memory, for example. Ending this thread would block its readers forever.
                    self.service.repeats.log(logging.ERROR, "read", f"cannot read a request: {error.strerror}")
                    time.sleep(_REFUSED_PAUSE_S)
                continue
            _, opcode, unique, nodeid, *_ = _IN.unpack_from(buffer)
            if opcode == _READ_OP:
                self._read(fd, unique, view)
            elif opcode in (_FORGET, _BATCH_FORGET):
                continue
            elif opcode == _INTERRUPT:
                self.service.interrupt(struct.unpack_from("<Q", buffer, _IN.size)[0])
            elif opcode in _SLOW:
                self._slow.put((fd, unique, opcode, nodeid, bytes(view[_IN.size : length])))
            else:
                self._reply(fd, unique, *self._handle(opcode, nodeid, view[_IN.size : length]))

    def _handle(self, opcode: int, nodeid: int, body: memoryview) -> tuple[int, bytes]:
        if opcode in _WRITES:
            return errno.EROFS, b""
        handler = self._handlers.get(opcode)
        if handler is None:
            return (errno.ENOTTY if opcode == _IOCTL else errno.ENOSYS), b""
        node = self.service.tree.get(nodeid) or self.service.tree.nodes[1]
        try:
            return 0, handler(node, body)
        except OSError as error:
            return error.errno or errno.EIO, b""
        except LazyfsError as error:
            name = node.name.decode(errors="replace")
            self.service.repeats.log(logging.ERROR, error.code, f"{name}: {error.code}: {error}")
            return to_errno(error), b""
        except Exception:
            # One bad request must not end the mount for all readers: this reader gets EIO, the log the reason.
            log.exception("cannot answer operation %d on inode %d", opcode, nodeid)
            return errno.EIO, b""

    def _reply(self, fd: int, unique: int, number: int, body: bytes | memoryview) -> None:
        try:
            os.writev(fd, [_OUT.pack(_OUT.size + len(body), -number, unique), body])
        except OSError as error:
            # ENOENT: the request was interrupted meanwhile. ENODEV: unmounted.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                log.error("the kernel refused a reply: %s", error.strerror)

    def _serve_slow(self) -> None:
        while True:
            fd, unique, opcode, nodeid, body = self._slow.get()
            self._reply(fd, unique, *self._handle(opcode, nodeid, memoryview(body)))

    def _serve_from_disk(self) -> None:
        while True:
            self._reply_span(*self._from_disk.get())

    def _reply_span(self, fd: int, unique: int, span: Span) -> None:
        pipe: Pipe | None = getattr(self._local, "pipe", None)
        try:
            if pipe is None:
                pipe = self._local.pipe = Pipe()
            if pipe.fill(_OUT.pack(_OUT.size + span.size, 0, unique), span):
                os.splice(pipe.out, fd, _OUT.size + span.size)
                return
        except OSError as error:
            if pipe is not None:
                del self._local.pipe
                pipe.close()
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED):
                return
            log.debug("cannot splice %d bytes at %d: %s", span.size, span.offset, error.strerror)
        # Copy what cannot be spliced; only a read error reaches the reader.
        try:
            self._reply(fd, unique, 0, read_span(span))
        except OSError as error:
            log.error("cannot read %d bytes at %d: %s", span.size, span.offset, error.strerror)
            self._reply(fd, unique, error.errno or errno.EIO, b"")

    # -- reading

    def _read(self, fd: int, unique: int, view: memoryview) -> None:
        handle, offset, size, *_ = _READ.unpack_from(view, _IN.size)

        def reply(data: Span | bytes | int) -> None:
            if isinstance(data, Span):
                if in_memory(data):
                    self._reply_span(fd, unique, data)
                else:
                    self._from_disk.put((fd, unique, data))
            elif isinstance(data, int):
                self._reply(fd, unique, data, b"")
            else:
                self._reply(fd, unique, 0, data)

        found = self._handles.get(handle)
        if found is None:
            reply(errno.EBADF)
            return
        try:
            self.service.read(found[0], offset, size, unique, reply)
        except Exception:
            # As in `_handle`: neither this thread nor this reader's reply may be lost.
            log.exception("cannot answer the read of %d bytes at %d", size, offset)
            reply(errno.EIO)

    def _open(self, node: Node, body: memoryview) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        if node.file is None:
            raise OSError(errno.EISDIR if node.is_dir else errno.EINVAL, "not a file")
        opened, native = self.service.files.open(node, may_pass=self.passthrough)
        if native:
            try:
                with self._lock:
                    if not opened.backing_id:
                        opened.backing_id = self._register(opened.backing.fd)
            except OSError as error:
                # A file system that does not support backing (stacked too deep): serve by reads from now on.
                log.warning("no passthrough for %s: %s", opened.file.path, error.strerror)
                self.passthrough = False
                self.service.files.release(opened, native=True)
                opened, native = self.service.files.open(node, may_pass=False)
        with self._lock:
            handle = self._next_handle
            self._next_handle += 1
            self._handles[handle] = (opened, native)
        if native:
            return _OPEN_OUT.pack(handle, _FOPEN_PASSTHROUGH | _NOFLUSH, opened.backing_id)
        return _OPEN_OUT.pack(handle, _KEEP_CACHE | _NOFLUSH, 0)

    def _register(self, fd: int) -> int:
        # struct fuse_backing_map {int32 fd; uint32 flags; uint64 padding}
        result = int(self._libc.ioctl(self.fd, ctypes.c_ulong(_BACKING_OPEN), struct.pack("<iIQ", fd, 0, 0)))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    def _release(self, node: Node, body: memoryview) -> bytes:
        (handle,) = struct.unpack_from("<Q", body)
        with self._lock:
            found = self._handles.pop(handle, None)
        if found is not None:
            opened, native = found
            self.service.files.release(opened, native=native)
        return b""

    def _on_closed(self, opened: OpenFile) -> None:
        if opened.backing_id:
            try:
                fcntl.ioctl(self.fd, _BACKING_CLOSE, struct.pack("<I", opened.backing_id))
            except OSError as error:
                # The connection is gone, and its backing files with it.
                log.debug("cannot close a backing file: %s", error.strerror)

    # -- names and attributes

    def _attr(self, node: Node) -> bytes:
        # A fixed time: content is named by digest, and a snapshot must find the same file after a remount.
        t, size = 1_000_000_000, node.size
        uid, gid = os.getuid(), os.getgid()
        return _ATTR.pack(
            node.ino, size, (size + 511) // 512, t, t, t, 0, 0, 0, node.mode, node.nlink, uid, gid, 0, 1 << 20, 0
        )

    def _lookup(self, node: Node, body: memoryview) -> bytes:
        name = bytes(body[:-1])
        if not node.is_dir:
            raise OSError(errno.ENOTDIR, "not a directory")
        child = node.children.get(name)
        if child is None:
            raise OSError(errno.ENAMETOOLONG if len(name) > 255 else errno.ENOENT, "no such name")
        return _ENTRY.pack(child.ino, 0, _FOREVER_S, _FOREVER_S, 0, 0) + self._attr(child)

    def _getattr(self, node: Node, body: memoryview) -> bytes:
        return struct.pack("<QII", _FOREVER_S, 0, 0) + self._attr(node)

    def _readlink(self, node: Node, body: memoryview) -> bytes:
        if not node.target:
            raise OSError(errno.EINVAL, "not a link")
        return node.target

    def _readdir(self, node: Node, body: memoryview) -> bytes:
        _, offset, size, *_ = _READ.unpack_from(body)
        out = bytearray()
        listing = self.service.tree.listing(node)
        for position in range(offset, len(listing)):
            name, child = listing[position]
            entry = _DIRENT.pack(child.ino, position + 1, len(name), child.mode >> 12) + name
            entry += b"\0" * (-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return bytes(out)

    def _statfs(self, node: Node, body: memoryview) -> bytes:
        blocks = -(-self.service.tree.size // 4096)
        return _STATFS.pack(blocks, 0, 0, len(self.service.tree.nodes) - 1, 0, 4096, 255, 4096, 0)

    def _getxattr(self, node: Node, body: memoryview) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        return _sized(get_xattr(self.service, node, bytes(body[8:-1])), size)

    def _listxattr(self, node: Node, body: memoryview) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        return _sized(list_xattrs(node), size)


def _sized(value: bytes, size: int) -> bytes:
    """Format the reply of getxattr and listxattr: `size` 0 asks for the length.

    Raises OSError (ERANGE) if the value is longer than `size`.
    """
    if size == 0:
        return struct.pack("<II", len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "too small a buffer")
    return value
