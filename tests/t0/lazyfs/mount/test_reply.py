"""Answers to a read of a file that cannot be spliced or not be read: copied, or the file's own error."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

import pytest

from lazyfs.mount.open_files import Span
from lazyfs.mount.transports.raw import RawTransport, in_memory

pytestmark = pytest.mark.t0


@pytest.fixture
def answer():
    """Return what the kernel would get: (error number, bytes)."""
    transport = RawTransport(None, "/nowhere", "test", native=False)
    out, into = os.pipe()

    def ask(span):
        transport._reply_span(into, 7, span)
        data = os.read(out, 1 << 16)
        length, number, unique = struct.unpack_from("<IiQ", data)
        assert (length, unique) == (len(data), 7)
        return -number, data[16:]

    yield ask
    os.close(out)
    os.close(into)
    if hasattr(transport._local, "pipe"):
        transport._local.pipe.close()


def test_a_file_that_cannot_be_spliced_is_copied(answer):
    memory = mmap.mmap(-1, 1 << 16)
    memory[:] = os.urandom(1 << 16)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    out, into = os.pipe()
    try:
        with pytest.raises(OSError):
            os.splice(fd, into, 4096, offset_src=at)
        assert answer(Span(fd, at + 5, 20_000)) == (0, memory[5:20_005])
    finally:
        for one in (fd, out, into):
            os.close(one)


def test_a_failed_read_is_an_error_and_the_next_read_succeeds(answer, tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 5000)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        assert answer(Span(fd, 10_000, 9000)) == (errno.EIO, b"")
        assert answer(Span(folder, 0, 10)) == (errno.EISDIR, b"")
        assert answer(Span(fd, 1, 9000)) == (0, (b"abc" * 5000)[1:9001])
    finally:
        os.close(fd)
        os.close(folder)


def test_cached_pages_are_distinguished_from_uncached_ones(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, bytes(1 << 16))
        assert in_memory(Span(fd, 100, 60_000))
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cold = Span(fd, 0, 4096)
        if in_memory(cold):
            pytest.skip("a file system that keeps its pages, or cannot tell")
        os.pread(fd, 1, 0)
        assert in_memory(cold)
    finally:
        os.close(fd)


def test_a_host_that_clones_no_connection_serves_all_threads_over_the_first(monkeypatch):
    transport = RawTransport(None, "/nowhere", "test", native=False)
    transport.fd, opened, real = 1 << 20, [], os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(real("/dev/null", flags)) or opened[-1])
    assert transport._clone() == transport.fd, "/dev/null is no connection"
    with pytest.raises(OSError):
        os.fstat(opened[0])
