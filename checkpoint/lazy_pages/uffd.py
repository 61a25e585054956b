"""The kernel's userfaultfd interface, as needed to serve another process's faults.

The source is include/uapi/linux/userfaultfd.h. Standard library only. Every call releases the interpreter lock while
the kernel works.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Sequence

PAGE = 4096
PAGEFAULT, FORK, REMAP, REMOVE, UNMAP = 0x12, 0x13, 0x14, 0x15, 0x16
_COPY, _ZEROPAGE, _WAKE = 0xC028AA03, 0xC020AA04, 0x8010AA02
_MESSAGE = struct.Struct("<B7x3Q")
_MESSAGES_AT_ONCE = 64

_PROT_READ, _MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS = 1, 1, 2, 0x20
_MADV_RANDOM, _MADV_HUGEPAGE, _MADV_POPULATE_READ = 1, 14, 22

_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mincore = _libc.mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_syscall = _libc["syscall"]  # a private object, because other modules call it with other argument types
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_long, ctypes.c_ulong)
_PROCESS_MADVISE = 440  # the same on every architecture


class _Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class _Copy(ctypes.Structure):
    _fields_ = [
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    ]


class _Zero(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),
    ]


def read_events(fd: int) -> list[tuple[int, int, int, int]]:
    """Read a process's pending events without waiting; return an empty list if there are none.

    Each event is (kind, a, b, c): PAGEFAULT: flags, address, 0. FORK: descriptor of the child's userfaultfd, 0, 0.
    REMAP: from, to, length. REMOVE, UNMAP: start, end, 0.
    """
    try:
        data = os.read(fd, _MESSAGE.size * _MESSAGES_AT_ONCE)
    except BlockingIOError:
        return []
    return list(_MESSAGE.iter_unpack(data))


def copy(fd: int, target: int, source: int, length: int) -> tuple[int, int]:
    """Copy `length` bytes from our `source` to `target`, and wake threads that wait for them.

    No page may exist at `target` yet. Returns (bytes placed, errno); errno is 0 when all bytes were placed. An existing
    page is never overwritten (EEXIST). EAGAIN: the process is changing its mappings and an event is unread. ENOENT: the
    range is not (or no longer) one registered mapping. ESRCH: the process is gone.
    """
    request = _Copy(target, source, length, 0, 0)
    if _ioctl(fd, _COPY, ctypes.byref(request)) == 0:
        return length, 0
    number = ctypes.get_errno()
    return max(request.copy, 0), number


REQUEST_BYTES = 40
"""Size of a UFFDIO_COPY request: five 64-bit numbers (target, source, length, mode (0), space for the result)."""


def request(fd: int, address: int) -> int:
    """Issue UFFDIO_COPY with the request stored at `address`.

    Return 0 if all was placed, else an errno (EAGAIN: part or nothing).
    """
    return ctypes.get_errno() if _ioctl(fd, _COPY, address) else 0


def zero(fd: int, target: int, length: int) -> tuple[int, int]:
    """Map `target` as zeros where no page exists yet. Returns the same as `copy`."""
    request = _Zero(target, length, 0, 0)
    if _ioctl(fd, _ZEROPAGE, ctypes.byref(request)) == 0:
        return length, 0
    number = ctypes.get_errno()
    return max(request.zeropage, 0), number


def wake(fd: int, target: int, length: int) -> None:
    """Wake threads that wait for a page of [target, target + length), so that they retry."""
    request = _Range(target, length)
    if _ioctl(fd, _WAKE, ctypes.byref(request)) and ctypes.get_errno() not in (errno.ESRCH, errno.ENOENT):
        raise OSError(ctypes.get_errno(), "UFFDIO_WAKE")


def map_file(path: str) -> tuple[int, int]:
    """Map a whole file, shared and read-only; return (address, length).

    All replicas read the same page cache.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return 0, 0
        address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return int(address), size
    finally:
        os.close(fd)


def unmap(address: int, length: int) -> None:
    """munmap. Raises OSError."""
    if _munmap(address, length):
        raise OSError(ctypes.get_errno(), "munmap")


def populate(address: int, length: int) -> int:
    """Read [address, address + length) of our mapping in and map it.

    Return an errno (EIO, EFAULT: the file cannot be read) or 0.
    """
    return ctypes.get_errno() if _madvise(address, length, _MADV_POPULATE_READ) else 0


def populate_all(ranges: Sequence[tuple[int, int]]) -> None:
    """Read ranges (address, length) of our mappings in, at most 1,024, in order; skip those that cannot be read.

    Uses one system call where the kernel supports it (6.13), because this thread would wait for the interpreter lock
    between calls.
    """
    done = -1
    with contextlib.suppress(OSError):
        process = os.pidfd_open(os.getpid())
        try:
            vector = (_Range * len(ranges))(*[_Range(*each) for each in ranges])
            done = _syscall(_PROCESS_MADVISE, process, ctypes.byref(vector), len(ranges), _MADV_POPULATE_READ, 0)
        finally:
            os.close(process)
    if done != sum(length for _, length in ranges):
        for address, length in ranges:
            populate(address, length)  # returns at once for ranges already read


def prefer_large(address: int, length: int) -> bool:
    """Request large pages for reads of [address, address + length) of our mapping, and no readahead beyond them.

    Returns False if this kernel lacks them: before 5.18 it would read page by page.
    """
    return (
        _kernel() >= (5, 18)
        and _madvise(address, length, _MADV_HUGEPAGE) == 0
        and _madvise(address, length, _MADV_RANDOM) == 0
    )


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.partition("-")[0].rstrip("+"))


def cached(address: int, length: int) -> bytes:
    """Return one byte per page of our mapping; its lowest bit is set if the page is in the page cache.

    Raises OSError.
    """
    vector = (ctypes.c_ubyte * -(-length // PAGE))()
    if _mincore(address, length, vector):
        raise OSError(ctypes.get_errno(), "mincore")
    return bytes(vector)


def resident(address: int, length: int) -> bool:
    """Return whether every page of our mapping is in the page cache, so a copy from it does not wait for a disk."""
    try:
        return b"\0" not in cached(address, length)
    except OSError:
        return False  # a copy will raise the reason


def zero_pages(length: int) -> int:
    """Map `length` zero bytes of our own and return their address."""
    address = _libc.mmap(None, length, _PROT_READ, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap of zeros")
    populate(address, length)
    return int(address)
