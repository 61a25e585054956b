"""Readahead of the copier: within a window, following jobs are requested from the disk while the first one is awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from checkpoint.lazy_pages import readahead
from checkpoint.lazy_pages.readahead import Fetcher

pytestmark = pytest.mark.t0


class Disk:
    """A source without cached pages; `populate` blocks until `go_on` is set."""

    def __init__(self) -> None:
        self.requested: list[int] = []
        self.go_on = threading.Semaphore(0)

    def resident(self, offset: int, length: int) -> bool:
        return False

    def advise(self, offset: int, length: int) -> None:
        self.requested.append(offset)

    def populate(self, offset: int, length: int) -> int:
        assert self.go_on.acquire(timeout=10.0)
        return 5 if offset == 2 else 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.setattr(readahead, "_WINDOW", 200)
    yield Disk()


def until(disk: Disk, asked: list[int]) -> None:
    limit = time.monotonic() + 10.0
    while disk.requested != asked and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(0.02)  # and not more
    assert disk.requested == asked


def test_jobs_are_requested_within_the_window_and_finish_in_order(disk: Disk) -> None:
    notified = threading.Semaphore(0)
    fetcher = Fetcher("test", notified.release)
    for number in range(4):
        fetcher.submit(number, [(disk, number, 100)])  # type: ignore[list-item]
    fetcher.start()
    until(disk, [0, 1])
    disk.go_on.release()
    assert notified.acquire(timeout=10.0)
    until(disk, [0, 1, 2])
    for _ in range(3):
        disk.go_on.release()
        assert notified.acquire(timeout=10.0)
    assert list(fetcher._done) == [(0, 0, 100), (1, 0, 100), (2, 5, 100), (3, 0, 100)]


def test_a_job_larger_than_the_window_is_requested_at_once(disk: Disk) -> None:
    notified = threading.Semaphore(0)
    fetcher = Fetcher("test", notified.release)
    fetcher.start()
    fetcher.submit(7, [(disk, at, 300) for at in range(3)])  # type: ignore[misc]
    until(disk, [0, 1, 2])
    for _ in range(3):
        disk.go_on.release()
    assert notified.acquire(timeout=10.0) and fetcher._done[0] == (7, 5, 900)


def test_a_failing_thread_is_reported(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(offset: int, length: int) -> None:
        raise OSError(5, "the disk")

    monkeypatch.setattr(disk, "advise", broken)
    notified = threading.Semaphore(0)
    fetcher = Fetcher("test", notified.release)
    fetcher.start()
    fetcher.submit(0, [(disk, 0, 100)])  # type: ignore[list-item]
    assert notified.acquire(timeout=10.0)
    assert list(fetcher._done) == [(readahead.FAILED, 5, 0)]
    fetcher.stop()
