"""The second copier on memory of this process: it places what is large and its own, and leaves alone what it must not touch."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from checkpoint.criu.pagemap import ProcessImage
from checkpoint.lazy_pages import uffd
from checkpoint.lazy_pages.address_space import PendingPages, Space
from checkpoint.lazy_pages.copy_plan import CLAIMED, OPEN, Plan
from checkpoint.lazy_pages.copy_worker import LARGE, SecondCopier

pytestmark = pytest.mark.t1
SIZE = 4 * LARGE
_libc = uffd._libc
_USERFAULTFD, _API, _REGISTER = 323, 0xC018AA3F, 0xC020AA00


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@pytest.fixture
def space() -> Iterator[Space]:
    """Registered memory of this process with nothing in it."""
    fd = _libc.syscall(_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        pytest.skip("userfaultfd is not permitted here")
    target = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = address_of(target)
    api = ctypes.create_string_buffer(struct.pack("<3Q", 0xAA, 0, 0))
    assert _libc.ioctl(fd, ctypes.c_ulong(_API), api) == 0
    register = ctypes.create_string_buffer(struct.pack("<4Q", address, SIZE, 1, 0))
    assert _libc.ioctl(fd, ctypes.c_ulong(_REGISTER), register) == 0
    image = ProcessImage(1, "pages-1.img")
    made = Space(1, 1, fd, PendingPages([(address, address + SIZE, 0)]), image, None)  # type: ignore[arg-type]
    yield made
    os.close(fd)


@pytest.fixture
def source() -> mmap.mmap:
    memory = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes(range(256)) * (SIZE // 256)
    return memory


def plan_of(space: Space, source: mmap.mmap, pieces: list[tuple[int, int]]) -> Plan:
    start, plan = space.map.at_or_after(0)[0], Plan()  # type: ignore[index]
    for offset, length in pieces:
        plan.add(start + offset, start + offset + length, address_of(source) + offset, False, 1)
    plan.seal()
    return plan


def until(what: object, limit_s: float = 10.0) -> None:
    limit = time.monotonic() + limit_s
    while not what():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_it_places_large_pieces_from_the_end_and_tells(space: Space, source: mmap.mmap) -> None:
    told = threading.Event()
    copier = SecondCopier(told.set)
    plan = plan_of(space, source, [(0, LARGE), (LARGE, 4096), (2 * LARGE, LARGE)])
    copier.start()
    copier.submit(space, plan)
    until(lambda: len(copier.done) == 2)
    assert told.is_set()
    assert [(index, placed) for _, _, index, placed in copier.done] == [(2, True), (0, True)]
    assert plan.done[1] == OPEN and plan.done[0] == CLAIMED
    start = plan.starts[0]
    assert ctypes.string_at(start, LARGE) == source[:LARGE]
    assert ctypes.string_at(start + 2 * LARGE, LARGE) == source[2 * LARGE : 3 * LARGE]
    # What it placed is placed already for everybody else: the kernel refuses to overwrite it.
    assert uffd.copy(space.fd, start, address_of(source), 4096)[0] == 0


@pytest.mark.parametrize("why", ["changed", "closed"])
def test_it_leaves_a_space_alone_that_changed_or_is_gone(space: Space, source: mmap.mmap, why: str) -> None:
    copier = SecondCopier(lambda: None)
    plan = plan_of(space, source, [(0, LARGE)])
    with space.placing:
        copier.start()
        copier.submit(space, plan)
        time.sleep(0.02)  # it waits for the lock that whoever reads events holds
        assert not copier.done
        space.changed, space.open = why == "changed", why != "closed"
    other = plan_of(space, source, [])
    copier.submit(space, other)
    until(lambda: not copier._jobs)
    time.sleep(0.02)
    assert not copier.done and plan.done[0] == OPEN


def test_what_the_kernel_refuses_is_given_back(space: Space, source: mmap.mmap) -> None:
    copier = SecondCopier(lambda: None)
    plan = plan_of(space, source, [(0, LARGE)])
    assert uffd.copy(space.fd, plan.starts[0], address_of(source), 4096)[0] == 4096  # a page is there already
    copier.start()
    copier.submit(space, plan)
    until(lambda: copier.done)
    _, _, index, placed = copier.done[0]
    assert not placed
    plan.give_back(index)
    assert plan.next() == 0
    space.open = False  # so that it does not try for ever


class Watched:
    """A space's lock that looks, whenever it is given up, at what the copier has told until then."""

    def __init__(self, copier: SecondCopier) -> None:
        self.copier, self.seen, self.lock = copier, list[int](), threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.seen.append(len(self.copier.done))
        self.lock.release()


def test_a_piece_is_told_before_its_mapping_can_change(space: Space, source: mmap.mmap) -> None:
    """Who reads an event holds the lock: a piece placed and not told by then would be counted against a mapping that has changed."""
    copier = SecondCopier(lambda: None)
    watched = Watched(copier)
    space.placing = watched  # type: ignore[assignment]
    copier.start()
    copier.submit(space, plan_of(space, source, [(0, LARGE), (LARGE, LARGE)]))
    until(lambda: len(watched.seen) == 2)
    assert watched.seen == [1, 2]
    copier.stop()


def test_a_copier_that_fails_says_why(space: Space, source: mmap.mmap) -> None:
    rung = threading.Event()
    copier = SecondCopier(rung.set)
    copier.start()
    copier.submit(space, None)  # type: ignore[arg-type]
    assert rung.wait(10)
    assert "AttributeError" in copier.failure
