"""Room in the cache, asked for by several threads at once."""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import pytest

from lazyfs.cache import Cache

pytestmark = pytest.mark.t0
MB = 1 << 20


def image(cache, name, size, age):
    """What an image looks like to whoever makes room."""
    folder = cache.folder(SimpleNamespace(digest=name * 32))
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(os.urandom(size))
    (folder / "lock").touch()
    os.utime(folder / "lock", (age, age))
    return folder


def test_two_threads_that_need_room_at_once_both_get_it(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit=24 * MB)
    oldest, other = image(cache, "aa", 11 * MB, 100), image(cache, "bb", 11 * MB, 200)
    evict = Cache.evict

    def slowly(self, amount):
        time.sleep(0.1)  # the other thread has counted what is about to go
        return evict(self, amount)

    monkeypatch.setattr(Cache, "evict", slowly)
    granted = []
    threads = [threading.Thread(target=lambda n=n: granted.append(cache.reserve(n * MB))) for n in (6, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert granted == [True, True]
    assert not oldest.exists() and other.exists(), "room for 11 MB was there once the oldest 11 MB were gone"


def test_what_is_granted_and_not_written_yet_is_not_granted_twice(tmp_path):
    cache = Cache(tmp_path, limit=24 * MB)
    assert [cache.reserve(8 * MB) for _ in range(4)] == [True, True, True, False]
    cache.written(8 * MB)  # it failed, say: nothing of it is on the disk
    assert cache.reserve(8 * MB)
