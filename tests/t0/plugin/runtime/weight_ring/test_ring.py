"""The ring carries the stream byte by byte, in any cut, keeps to its memory, and reports what it cannot read."""

import ctypes
import mmap
import os
import random
import threading
import time

import pytest

from checkpoint.errors import Failed
from plugin.runtime.weight_ring.layout import ZEROS
from plugin.runtime.weight_ring.ring import Ring, Source

pytestmark = pytest.mark.t0


@pytest.fixture
def stream(tmp_path):
    """Return (sources, segments, expected bytes) of a stream with every kind of segment."""
    draw = random.Random(3)
    files = []
    for number in range(3):
        path = tmp_path / f"file{number}"
        path.write_bytes(draw.randbytes(50_000 + number))
        files.append(path)
    segments, expected = [], b""
    for _ in range(40):
        file = draw.choice([0, 1, 2, ZEROS])
        size = draw.choice([1, 7, 4096, 9_999])
        offset = 0 if file == ZEROS else draw.randrange(50_000 - size)
        segments.append((file, offset, size))
        expected += bytes(size) if file == ZEROS else files[file].read_bytes()[offset : offset + size]
    return files, segments, expected


def sources(files):
    return {number: Source(path, path.stat().st_size) for number, path in enumerate(files)}


def read_all(ring):
    found = b""
    for number in range(ring.count):
        size = ring.wait_filled(number, 5.0)
        assert size, ring.error
        with ring.view(number) as view:
            found += bytes(view)
        ring.free(number)
    return found


@pytest.mark.parametrize(("slots", "slot_bytes", "threads"), [(2, 1000, 1), (3, 7777, 4), (8, 1 << 20, 8)])
def test_the_stream_comes_out_as_it_is(stream, slots, slot_bytes, threads):
    files, segments, expected = stream
    ring = Ring(sources(files), segments, slots, slot_bytes, threads)
    ring.start()
    assert read_all(ring) == expected and ring.ended >= ring.ahead[1] > 0
    ring.close()


def test_no_more_is_read_ahead_than_the_ring_holds(stream):
    files, segments, expected = stream
    ring = Ring(sources(files), segments, 3, 1000, 4)
    ring.start()
    assert ring.wait_ahead(5.0)
    assert ring.ahead[0] == 3000 and not ring.wait_filled(3, 0.05) and not ring.ended
    assert os.fstat(ring.fd).st_size == 3000
    ring.free(0)
    assert ring.wait_filled(3, 5.0) == 1000
    ring.close()


def test_a_file_of_another_length_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(OSError, match="5 bytes"):
        Source(tmp_path / "file", 6)


def test_a_file_that_becomes_shorter_ends_the_ring_with_its_name(stream):
    files, segments, _ = stream
    ring = Ring(sources(files), segments, 2, 1000, 2)
    for file in files:
        os.truncate(file, 0)
    ring.start()
    limit = next(number for number in range(ring.count) if not ring.wait_filled(number, 5.0) or ring.free(number))
    assert limit < 5 and "weights-unreadable" in ring.error and "became shorter" in ring.error
    ring.close()


def test_a_closed_ring_leaves_no_descriptor_and_no_thread(stream):
    files, segments, _ = stream
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        ring = Ring(sources(files), segments, 2, 1000, 4)
        ring.start()
        ring.wait_ahead(5.0)
        ring.close()
        ring.close()
        for thread in ring._threads:
            thread.join(5.0)
    assert len(os.listdir("/proc/self/fd")) == before and threading.active_count() == threads


def test_a_stalled_read_keeps_its_files_until_it_ends(stream, monkeypatch):
    files, segments, _ = stream
    """Beside the files, the mapping has a descriptor."""
    go_on, read = threading.Event(), Ring._read

    def slow(self, source, into, offset):
        go_on.wait(5.0)
        read(self, source, into, offset)

    monkeypatch.setattr(Ring, "_read", slow)
    before = len(os.listdir("/proc/self/fd"))
    ring = Ring(sources(files), segments, 2, 1000, 1)
    ring.start()
    assert not ring.wait_filled(0, 0.05)
    ring.close()
    assert len(os.listdir("/proc/self/fd")) == before + len(files) + 1, "a number that is used again would be read"
    go_on.set()
    ring._threads[0].join(5.0)
    assert len(os.listdir("/proc/self/fd")) == before


def cached(path):
    """Return how many bytes of a file are in the page cache."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    with open(path, "rb") as file:
        at = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_size_t(0))
        pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
        assert not libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), pages)
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def test_what_follows_a_full_ring_comes_into_the_page_cache(tmp_path):
    path, size = tmp_path / "file", 8 << 20
    path.write_bytes(random.Random(1).randbytes(size))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
    if cached(path):
        pytest.skip("this file system keeps its files in memory")
    ring = Ring({0: Source(path, size)}, [(0, 0, 5), (ZEROS, 0, 1 << 20), (0, 5, size - 5)], 2, 1 << 20, 1)
    ring.start()
    limit = time.monotonic() + 10
    while cached(path) < size:
        assert time.monotonic() < limit, cached(path)
        time.sleep(0.01)
    assert not ring.ended, "it was not read"
    ring.close()


@pytest.mark.parametrize("startable", [0, 1])
def test_with_too_few_threads_it_reads_with_those_there_are_or_says_so(stream, monkeypatch, startable):
    files, segments, expected = stream
    begin, begun = threading.Thread.start, []

    def start(thread):
        if len(begun) == startable:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = len(os.listdir("/proc/self/fd"))
    ring = Ring(sources(files), segments, 3, 7777, 4)
    if startable:
        ring.start()
        assert read_all(ring) == expected
        ring.close()
        begun[0].join(5.0)
    else:
        with pytest.raises(Failed, match="no thread to read them"):
            ring.start()
    assert len(os.listdir("/proc/self/fd")) == before
