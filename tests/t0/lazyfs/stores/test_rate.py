"""A rate bounds what all threads fetch together."""

import threading
import time

import pytest

from lazyfs.stores.rate import Limited, Limiter

pytestmark = pytest.mark.t0


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Store:
    remote = True

    def get(self, key, start=0, length=None, version="", into=None, *, limit=0):
        return b"x" * int(key)


def test_what_was_fetched_is_waited_for_before_the_next(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lazyfs.stores.rate.time", clock)
    store = Limited(Store(), Limiter(100))
    assert store.remote and len(store.get("200", 0, 5)) == 200 and clock.now == 100
    store.get("50")
    assert clock.now == 102
    clock.now += 60  # idle: nothing is saved up for a burst
    store.get("100")
    store.get("1")
    assert clock.now == pytest.approx(163)


def test_no_rate_is_no_wait(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lazyfs.stores.rate.time", clock)
    store = Limited(Store(), Limiter(0))
    for _ in range(3):
        store.get("1000000")
    assert clock.now == 100


def test_threads_share_it():
    limiter, store = Limiter(100_000), Store()
    threads = [
        threading.Thread(target=lambda: [Limited(store, limiter).get("2500") for _ in range(2)]) for _ in range(4)
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first of each thread pass at once; what they fetched is waited for by the second ones.
    assert time.monotonic() - began > 0.09
