"""Cache space under concurrent demand by threads and processes: reservations and pins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lazyfs.cache.cache import Cache
from lazyfs.cache.slots import SlotMemory, tier_mb
from lazyfs.errors import DiskFull

pytestmark = pytest.mark.t0
MB = 1 << 20


def sparse_file(cache, name, size, age):
    """Return a sparse cache file with the attributes that eviction reads."""
    folder = cache.folder(SimpleNamespace(digest=name * 32))
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(os.urandom(size))
    (folder / "lock").touch()
    os.utime(folder / "lock", (age, age))
    return folder


def test_two_threads_needing_room_at_once_both_get_it(tmp_path, monkeypatch):
    cache = Cache(tmp_path, limit=24 * MB)
    oldest, other = sparse_file(cache, "aa", 11 * MB, 100), sparse_file(cache, "bb", 11 * MB, 200)
    evict = Cache.evict

    def slowly(self, amount):
        time.sleep(0.1)  # the other thread has counted what is about to be evicted
        return evict(self, amount)

    monkeypatch.setattr(Cache, "evict", slowly)
    granted = []
    threads = [threading.Thread(target=lambda n=n: granted.append(cache.reserve_room(n * MB))) for n in (6, 5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert granted == [True, True]
    assert not oldest.exists() and other.exists(), "11 MB are free once the oldest 11 MB are evicted"


def test_granted_room_is_not_granted_again_before_it_is_written(tmp_path):
    cache = Cache(tmp_path, limit=24 * MB)
    assert [cache.reserve_room(8 * MB) for _ in range(4)] == [True, True, True, False]
    cache.release_room(8 * MB)  # as after a failure: nothing of it is on the disk
    assert cache.reserve_room(8 * MB)


HOLDER = """
import sys, time
from pathlib import Path
from lazyfs.cache.cache import Cache
cache = Cache(Path(sys.argv[1]), limit=int(sys.argv[2]))
cache.reserve_memory(int(sys.argv[3]))
cache.pin_files(sys.argv[4:])
print("claimed", flush=True)
time.sleep(60)
"""


def test_memory_and_disk_share_one_limit_until_the_owner_is_killed(tmp_path):
    """Another process's memory reduces the disk's limit; its SIGKILL restores it."""
    cache = Cache(tmp_path, limit=100 * MB)
    pinned, other = sparse_file(cache, "aa", 6 * MB, 100), sparse_file(cache, "bb", 6 * MB, 200)
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path), "0", str(64 * MB), pinned.name]
    holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4])
    try:
        assert holder.stdout.readline() == "claimed\n"
        assert not cache.reserve_room(31 * MB), "64 MB of memory and 6 MB pinned leave 30"
        assert pinned.exists() and not other.exists(), "the older file is pinned"
        assert cache.reserve_room(29 * MB)
        cache.release_room(29 * MB)
    finally:
        holder.kill()
        holder.wait(30)
        holder.stdout.close()
    assert cache.reserve_room(93 * MB) and pinned.exists()
    assert cache.reserve_room(6 * MB) and not pinned.exists(), "the process that pinned it has ended"
    assert len(list((tmp_path / "claims").glob("[!.]*"))) == 1, "files of ended processes are removed"


def test_two_processes_are_not_granted_the_same_room(tmp_path):
    one, two = Cache(tmp_path, limit=24 * MB), Cache(tmp_path, limit=24 * MB)
    granted = [[cache.reserve_room(8 * MB) for _ in range(2)] for cache in (one, two)]
    assert granted == [[True, True], [True, False]]
    for _ in range(2):
        one.release_room(8 * MB)
    assert two.reserve_room(8 * MB), "as after a failure: nothing of it is on the disk"


def test_pins_are_replaced_by_the_next_ones(tmp_path):
    cache = Cache(tmp_path, limit=10 * MB)
    first, second = sparse_file(cache, "aa", 4 * MB, 100), sparse_file(cache, "bb", 4 * MB, 200)
    cache.pin_files([first.name])
    cache.pin_files([second.name])
    assert cache.evict(8 * MB) < 8 * MB
    assert second.exists() and not first.exists()


@pytest.mark.parametrize(
    ("memory_mb", "limit", "tier"),
    [(128, 0, 128), (128, 100 << 30, 128), (512, 2 << 30, 256), (128, 1, 64), (64, 100 << 30, 64)],
)
def test_the_memory_tier_of_a_bounded_cache(memory_mb, limit, tier):
    assert tier_mb(memory_mb, limit) == tier


def test_a_file_that_does_not_fit_is_refused_before_fetching(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    Cache(tmp_path / "c").need_room(0, 1 << 60)
    with pytest.raises(DiskFull, match="bytes to fetch"):
        Cache(tmp_path / "c").need_room(free + (1 << 30), 0)
    Cache(tmp_path / "c", 1 << 20).need_room(10, 1 << 20)
    with pytest.raises(DiskFull, match="limit"):
        Cache(tmp_path / "c", 1 << 20).need_room(10, (1 << 20) + 1)


def test_memory_is_reserved_at_its_first_use():
    claimed = []
    memory = SlotMemory(64, lambda: claimed.append(True))
    try:
        assert not claimed
        assert memory.allocate((0, 0)) >= 0 and memory.allocate((0, 1)) >= 0
        assert claimed == [True]
    finally:
        os.close(memory.fd)
