"""The threads that fill address spaces: what the kernel cannot place yet is tried again, and what it refuses fails by name."""

import ctypes
import errno
import threading
import time
from types import SimpleNamespace

import pytest

from checkpoint.lazy_pages import filler, uffd
from checkpoint.lazy_pages.copy_plan import PendingPages
from checkpoint.lazy_pages.filler import Filler

pytestmark = pytest.mark.t0
PAGE, START, SIZE = 4096, 1 << 30, 9 << 20
LIMIT_S = 10.0


class Source:
    """A pages file at address 0 whose pages are read without a disk."""

    path, size, address = "pages-1.img", SIZE, 0

    def __init__(self, code=0):
        self.code, self.advised = code, []

    def resident(self, offset, length):
        return offset >= SIZE // 2

    def advise(self, offset, length):
        self.advised.append((offset, length))

    def populate(self, offset, length):
        return self.code


RUNS = [(START, START + 5 * PAGE, 0), (START + 5 * PAGE, START + SIZE, 5 * PAGE)]


def space(number=1, settled=True, source=None, runs=RUNS):
    pending = PendingPages(runs)
    return SimpleNamespace(
        number=number, pid=number + 6, fd=number, pending=pending, source=source or Source(), settled=settled
    )


class Kernel:
    """Places pages as UFFDIO_COPY does. `answers`: what to return once for an address, instead of placing it."""

    def __init__(self, monkeypatch, **answers):
        self.placed, self.lock, self.answers = {}, threading.Lock(), answers
        monkeypatch.setattr(uffd, "copy", self.copy)
        monkeypatch.setattr(uffd, "request", self.request)

    def request(self, fd, address):
        fields = (ctypes.c_int64 * 5).from_address(address)
        target, source, length, mode, _ = fields
        assert mode == 0
        done, code = self.copy(fd, target, source, length)
        fields[4] = -code if code else done
        return code or (0 if done == length else errno.EAGAIN)

    def copy(self, fd, target, source, length):
        with self.lock:
            for name, answer in list(self.answers.items()):
                address = START + int(name.removeprefix("page")) * PAGE
                if target <= address < target + length:
                    if target < address:  # up to it
                        length = address - target
                        break
                    self.answers.pop(name)
                    if answer[1] == errno.EEXIST:
                        self.placed[fd, target] = None
                    return answer
            for offset in range(0, length, PAGE):
                assert (fd, target + offset) not in self.placed, "a page was overwritten"
                self.placed[fd, target + offset] = source + offset
            return length, 0


@pytest.fixture
def fill():
    made = []

    def run(*spaces):
        woken = threading.Event()
        one = Filler(woken.set)
        made.append(one)
        for each in spaces:
            one.add(each)
        found, limit = [], time.monotonic() + LIMIT_S
        while len(found) < len(spaces):
            assert woken.wait(max(0.0, limit - time.monotonic()))
            woken.clear()
            found += one.collect()
        assert not any(map(one.fills, spaces))
        return found

    yield run
    for one in made:
        one.stop()
        for thread in one._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def test_every_page_of_every_space_is_placed_once(fill, monkeypatch):
    kernel = Kernel(monkeypatch)
    one, other = space(1), space(2)
    assert sorted((each.number, size) for each, size in fill(one, other)) == [(1, SIZE), (2, SIZE)]
    assert kernel.placed == {(fd, START + offset): offset for fd in (1, 2) for offset in range(0, SIZE, PAGE)}
    assert one.source.advised, "what is not in the page cache is requested ahead"
    assert all(offset + length <= SIZE for offset, length in one.source.advised)


def test_what_lies_between_two_pieces_of_a_file_is_not_read(fill, monkeypatch):
    """Mapped weights do, which need no copy."""
    Kernel(monkeypatch)
    source, read = Source(), []
    source.populate = lambda offset, length: read.append((offset, length)) or 0
    far = SIZE - 4 * PAGE
    fill(space(source=source, runs=[(START, START + PAGE, 0), (START + 2 * PAGE, START + 3 * PAGE, far)]))
    assert sorted(read) == [(0, PAGE), (far, PAGE)]


def test_many_small_pieces_are_one_batch(fill, monkeypatch):
    Kernel(monkeypatch)
    source, read = Source(), []
    source.populate = lambda offset, length: read.append((offset, length)) or 0
    fill(space(source=source, runs=[(START + 2 * n * PAGE, START + (2 * n + 1) * PAGE, n * PAGE) for n in range(100)]))
    assert read == [(0, 100 * PAGE)]


def test_a_space_without_pages_is_filled_at_once(fill):
    empty = space()
    empty.pending = PendingPages()
    assert fill(empty) == [(empty, 0)]


def test_what_cannot_be_placed_yet_is_tried_again(fill, monkeypatch):
    """An unread event (EAGAIN), a page that a fault brought (EEXIST), memory that CRIU has not registered (ENOENT)."""
    kernel = Kernel(monkeypatch, page3=(0, errno.EAGAIN), page700=(0, errno.EEXIST), page1500=(0, errno.ENOENT))
    fill(space(settled=False))
    assert not kernel.answers
    assert [fd_page for fd_page, source in kernel.placed.items() if source is None] == [(1, START + 700 * PAGE)]
    assert len(kernel.placed) == SIZE // PAGE


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOMEM, "UFFDIO_COPY in process 7: Cannot allocate memory"),
        (errno.ENOENT, "UFFDIO_COPY in process 7: No such file"),
        (errno.ESRCH, "process 7 ended while its pages were filled"),
    ],
)
def test_a_refusal_of_the_kernel_fails_by_name(fill, monkeypatch, code, words):
    Kernel(monkeypatch, page1000=(0, code))
    with pytest.raises((OSError, RuntimeError), match=words):
        fill(space(1), space(2))


def test_an_image_that_cannot_be_read_fails_by_name(fill, monkeypatch):
    Kernel(monkeypatch)
    with pytest.raises(OSError, match=r"Input/output error, while pages-1\.img was read"):
        fill(space(source=Source(errno.EIO)))


def test_there_are_as_many_threads_as_processors_up_to_a_limit(fill, monkeypatch):
    Kernel(monkeypatch)
    for processors, threads in ((1, 1), (3, 3), (64, filler._MOST_THREADS)):
        monkeypatch.setattr(filler.os, "sched_getaffinity", lambda _, n=processors: range(n))
        one = Filler(lambda: None)
        one.add(space())
        assert len(one._threads) == threads
        one.stop()


@pytest.fixture
def expecting(monkeypatch):
    """A filler that knows a process, which CRIU has not made yet, once it has mapped ahead what it can."""
    made = []

    def run(source, processors=2):
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(processors))
        one = Filler(threading.Event().set)
        made.append(one)
        one.expect(7, RUNS, source)
        limit = time.monotonic() + LIMIT_S
        while processors > 1 and (one._jobs[0].unmapped or one._mapping):
            assert time.monotonic() < limit
            time.sleep(0.001)
        return one

    yield run
    for one in made:
        one.stop()
        for thread in one._threads:
            thread.join(LIMIT_S)


def fill_up(one, *spaces):
    for each in spaces:
        one.add(each)
    found, limit = [], time.monotonic() + LIMIT_S
    while len(found) < len(spaces):
        assert time.monotonic() < limit
        found += one.collect()
        time.sleep(0.001)
    return found


class CountingSource(Source):
    def __init__(self, memory=SIZE, code=0):
        super().__init__(code)
        self.memory, self.mapped = memory, []

    def resident(self, offset, length):
        return offset < self.memory

    def populate(self, offset, length):
        self.mapped.append((offset, length))
        return self.code


def test_pages_are_mapped_before_the_process_is_there_and_once(expecting, monkeypatch):
    kernel, source = Kernel(monkeypatch), CountingSource()
    one = expecting(source)
    ahead = list(source.mapped)
    assert sum(length for _, length in ahead) == SIZE
    assert not kernel.placed and not one.collect()
    assert [size for _, size in fill_up(one, space(source=source))] == [SIZE]
    assert source.mapped == ahead
    assert len(kernel.placed) == SIZE // PAGE


def test_what_needs_a_disk_is_only_requested_ahead(expecting, monkeypatch):
    kernel, source = Kernel(monkeypatch), CountingSource(memory=SIZE // 2)
    one = expecting(source)
    assert source.mapped and all(offset < source.memory for offset, _ in source.mapped)
    assert source.advised
    fill_up(one, space(source=source))
    assert sum(length for _, length in source.mapped) == SIZE
    assert len(kernel.placed) == SIZE // PAGE


def test_one_processor_is_left_to_criu(expecting, monkeypatch):
    kernel, source = Kernel(monkeypatch), CountingSource()
    one = expecting(source, processors=1)
    time.sleep(0.05)
    assert not source.mapped
    fill_up(one, space(source=source))
    assert len(kernel.placed) == SIZE // PAGE


def test_a_damaged_image_is_found_before_the_process_is_there(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    woken = threading.Event()
    one = Filler(woken.set)
    one.expect(7, RUNS, CountingSource(code=errno.EIO))
    assert woken.wait(LIMIT_S)
    with pytest.raises(OSError, match="while pages-1.img was read"):
        one.collect()


def test_another_process_than_the_expected_one_is_filled(expecting, monkeypatch):
    """A fork has pages of its own, and a process that never comes is waited for by nobody."""
    kernel = Kernel(monkeypatch)
    one = expecting(CountingSource())
    assert [each.pid for each, _ in fill_up(one, space(2))] == [8]
    assert len(kernel.placed) == SIZE // PAGE
