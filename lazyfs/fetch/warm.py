"""Fetch whole models into the cache without mounting them: `quickthaw cache warm`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lazyfs.cache.open_sparse_files import OpenSparseFiles
from lazyfs.cache.sparse_file import ABSENT
from lazyfs.content.manifest import Manifest
from lazyfs.fetch.worker import LOCAL_THREADS, REMOTE_THREADS, build
from lazyfs.mount.config import MountConfig
from lazyfs.stores.rate import Limiter


@dataclass(frozen=True)
class Warmed:
    """Result of `warm`, in bytes: `fetched` now, `present` before, `in_place` read where the original is."""

    fetched: int
    present: int
    in_place: int


def warm(
    config: MountConfig,
    manifest: Manifest,
    progress: Callable[[int, int], None] | None = None,
    limiter: Limiter | None = None,
) -> Warmed:
    """Fetch every absent chunk, at the rate of `limiter`. Pins the model until it ends.

    Raises DiskFull before anything is fetched if the model has no room under the cache's bound, or what a chunk's fetch
    raises: what was fetched until then stays.
    """
    fetcher = build(config, manifest)
    cached = [f for f in manifest.files if f.path not in fetcher.origins]
    sparse_files = OpenSparseFiles(fetcher.cache, cached)
    done, lock = 0, threading.Lock()

    def one(job: tuple[int, int]) -> None:
        nonlocal done
        with sparse_files.use(job[0]) as sparse_file:
            if limiter and sparse_file.state(job[1]) == ABSENT:
                limiter.wait()
                limiter.spend(cached[job[0]].chunks[job[1]].length)
            fetcher.fill(sparse_file, job[1], or_memory=False)
        with lock:
            done += cached[job[0]].chunks[job[1]].length
            if progress is not None:
                progress(done, total)

    try:
        fetcher.cache.pin_files(f.digest for f in cached)
        present = {f.digest: fetcher.cache.present_bytes(f) for f in cached}
        absent = sum(f.size for f in cached) - sum(present[f.digest] for f in cached)
        fetcher.cache.need_room(absent, sum(f.size for f in cached))
        jobs = [(n, c) for n, f in enumerate(cached) if present[f.digest] < f.size for c in range(len(f.chunks))]
        # With the chunks of an incomplete file that are present: `one` counts them, too.
        total = sum(f.size for f in cached if present[f.digest] < f.size)
        threads = config.fetch_threads or (REMOTE_THREADS if fetcher.source.store.remote else LOCAL_THREADS)
        with ThreadPoolExecutor(threads) as pool:
            try:
                for _ in pool.map(one, jobs):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        for number, file in enumerate(cached):
            if file.size:
                with sparse_files.use(number) as sparse_file:
                    if sparse_file.complete() and not sparse_file.fsynced():
                        fetcher.verify_whole(sparse_file)
                        sparse_file.fsync()
    finally:
        sparse_files.close_all()
        fetcher.close()
    in_place = manifest.size - sum(f.size for f in cached)
    return Warmed(absent, sum(present.values()), in_place)
