"""The fetcher process beside a mount's server: reads the network, hashes and decompresses.

The server requests chunks that a reader waits for (on-demand, first) and chunks needed soon (readahead); the fetcher
completes the rest in the background at a bounded rate (last). It answers when a chunk is stored and exits when the server's
end of the socket closes. Killing it at any moment loses only work; the server starts another.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lazyfs.cache.bound import UNBOUNDED
from lazyfs.cache.cache import Cache
from lazyfs.cache.open_sparse_files import OpenSparseFiles, raise_descriptor_limit
from lazyfs.cache.slots import SlotWriter
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.manifest import Manifest
from lazyfs.content.source_digests import DigestLog
from lazyfs.content.whole_file import has_digest
from lazyfs.errors import DiskFull, Integrity, LazyfsError, NotFound, Temporary, to_errno
from lazyfs.fetch import wire
from lazyfs.fetch.access_log import AccessLog, parse, shared_key
from lazyfs.fetch.chunk import ByteSource, ChunkFetcher, ReadThroughSource, StoreSource
from lazyfs.fetch.queue import Queue, RateLimit, Window
from lazyfs.logs import RepeatLimiter
from lazyfs.mount.config import MountConfig
from lazyfs.mount.manifest_source import origins_of
from lazyfs.peers.client import Peers
from lazyfs.peers.order import Members
from lazyfs.peers.source import PeerSource
from lazyfs.stores import open_store
from lazyfs.stores.retry import RetryPolicy, retrying

log = logging.getLogger("lazyfs.fetch.worker")
LOCAL_THREADS, REMOTE_THREADS = 4, 16
_IDLE_TICK_S = 5.0
# Ticks of 1 s between retries of chunks that the store could not deliver.
_POSTPONED_TICKS = 30
_FULL_S = 1.0
# Number of attempts to drop a cache file that another process has open, and the pause between them: a close may be on its way.
_DROP_TRIES, _DROP_PAUSE_S = 100, 0.05


class Fetcher:
    """Worker threads over one queue, and the loop that receives the server's requests."""

    def __init__(
        self,
        config: MountConfig,
        manifest: Manifest,
        chunk_fetcher: ChunkFetcher,
        channel: socket.socket,
        memory: SlotWriter,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.chunk_fetcher = chunk_fetcher
        self.channel = channel
        self.memory = memory
        self.slots: dict[tuple[int, int], int] = {}
        self.access_log_is_shared = False
        self.queue = Queue()
        self.sparse_files = OpenSparseFiles(chunk_fetcher.cache, manifest.files)
        self.dropping: dict[int, int] = {}
        self.dropping_lock = threading.Lock()
        # Readahead and background chunks that the store could not deliver; retried later.
        self.postponed: dict[tuple[int, int], int] = {}
        # Until then no room is looked for again: a manifest has thousands of chunks, and counting walks folders.
        self.full_until = 0.0
        self.sending = threading.Lock()
        self.threads = config.fetch_threads or (REMOTE_THREADS if chunk_fetcher.source.store.remote else LOCAL_THREADS)
        self.window = Window(self.threads)
        self.background = RateLimit(config.background_mb_s)
        self.repeats = RepeatLimiter(log)

    def run(self) -> None:
        """Serve until the server closes the channel."""
        workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        threading.Thread(target=self._report_forever, daemon=True).start()
        # Planning may read an access log from the store; requests must not wait for that.
        threading.Thread(target=self._guarded, args=(self._plan,), daemon=True).start()
        try:
            while True:
                message = self.channel.recv(wire.BUFFER)
                if len(message) < wire.REQUEST.size:
                    return
                kind, file, chunk, slot = wire.REQUEST.unpack(message)
                if kind == wire.SHARE_LOG:
                    threading.Thread(target=self.share_access_log, daemon=True).start()
                    continue
                if kind == wire.DROP:
                    self.drop(file)
                    continue
                if kind == wire.FILE:
                    for each in range(len(self.manifest.files[file].chunks)):
                        self.queue.put((file, each), wire.READAHEAD)
                    continue
                if slot >= 0:
                    self.slots[file, chunk] = slot
                self.queue.put((file, chunk), kind)
        except ConnectionError:
            return
        finally:
            self.queue.close()

    def _plan(self) -> None:
        """Queue the recorded access log in its order, then the remaining chunks in the background.

        Pin the files that the log names.
        """
        files = self.manifest.files
        absent = [i for i, f in enumerate(files) if f.path not in self.chunk_fetcher.origins]
        wanted = set(absent)
        known = self._known_accesses()
        logged = {files[file].digest for file, _ in known if file in wanted}
        if self.chunk_fetcher.cache.bound != UNBOUNDED and logged:
            self.chunk_fetcher.cache.pin_files(sorted(logged))
        # A fetcher that was killed may have left a file complete and not verified as a whole.
        for file in absent:
            if has_digest(files[file]) and self.chunk_fetcher.cache.present_bytes(files[file]) == files[file].size > 0:
                self.queue.put((file, 0), wire.FSYNC)
        if not self.config.prefetch:
            return
        for file, chunk in known:
            if file in wanted and chunk < len(files[file].chunks):
                self.queue.put((file, chunk), wire.READAHEAD)
        if self.config.background_mb_s > 0:
            for file in absent:
                for chunk in range(len(files[file].chunks)):
                    self.queue.put((file, chunk), wire.BACKGROUND)

    def _known_accesses(self) -> list[tuple[int, int]]:
        """Return this host's access log, else the one that another host shared in a remote store."""
        local = AccessLog(self.config.access_log, record="never").known
        store = self.chunk_fetcher.source.store
        if local or not (store.remote and self.config.prefetch) or self.manifest.kind == "source":
            return local
        try:
            policy = RetryPolicy(limit=self.config.fetch_limit_s)
            found = parse(bytes(retrying(lambda: store.get(shared_key(self.config.manifest)), policy)))
            self.access_log_is_shared = True
            return found
        except NotFound:
            return []
        except (LazyfsError, ValueError) as error:
            log.warning("no access log from %s: %s", store.url, error)
            return []

    def share_access_log(self) -> None:
        """Upload this host's access log to a remote store that had none, for the first start on other hosts."""
        store = self.chunk_fetcher.source.store
        path = self.config.access_log
        if not store.remote or self.manifest.kind == "source" or self.access_log_is_shared or not path.exists():
            return
        try:
            store.put(shared_key(self.config.manifest), path.read_bytes())
        except LazyfsError as error:
            # A read-only store is not an error of the mount.
            log.info("cannot share the access log: %s", error)

    def drop(self, index: int) -> None:
        """Close a file's cache file and remove it, once no worker fills or fsyncs it; not if another process has it open."""
        for key in self.queue.forget(index):
            slot = self.slots.pop(key, -1)
            if slot >= 0:
                # The fetch never began: waiters repeat their request.
                self._send(wire.FAILED, *key, errno.ECANCELED, slot)
        for key in [key for key in self.postponed if key[0] == index]:
            self.postponed.pop(key, None)
        with self.dropping_lock:
            idle = not self.dropping
            self.dropping[index] = _DROP_TRIES
        if idle:
            threading.Thread(target=self._drop_all, daemon=True).start()

    def _drop_all(self) -> None:
        while not self.queue.closed:
            for index in list(self.dropping):
                try:
                    ended = self._try_to_drop(index)
                except Exception as error:
                    log.exception("cannot drop %s: %s", self.manifest.files[index].path, error)
                    ended = True
                if ended:
                    with self.dropping_lock:
                        del self.dropping[index]
            with self.dropping_lock:
                if not self.dropping:
                    return
            time.sleep(_DROP_PAUSE_S)

    def _try_to_drop(self, index: int) -> bool:
        """Return whether the file is dropped, or no further attempt is due."""
        # Count only attempts that other processes block: an fsync on a busy disk may take any time.
        if self.queue.taken(index) or not self.sparse_files.close(index):
            return False
        file = self.manifest.files[index]
        self.dropping[index] -= 1
        try:
            freed = self.chunk_fetcher.cache.drop(file)
        except OSError as error:
            log.error("cannot drop %s: %s", file.path, error)
            return True
        if freed or not self.chunk_fetcher.cache.folder(file).exists():
            log.info("dropped %s: %d bytes freed", file.path, freed)
            return True
        if not self.dropping[index]:
            log.info("not dropped, because it is in use: %s", file.path)
        return not self.dropping[index]

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step of a thread that must survive an exception in it."""
        try:
            step()
        except Exception:
            log.exception("defect in a thread of the fetcher; the thread continues")

    def _work(self, number: int) -> None:
        def least_urgent() -> int:
            if number >= self.window.width:
                return wire.ON_DEMAND
            # Worker 0 never takes background chunks, so that a reader does not wait behind them.
            if (number == 0 and self.threads > 1) or self.background.wait_s() > 0:
                return wire.READAHEAD
            return wire.FSYNC

        while not self.queue.closed:
            # A worker must not sleep until the rate limit allows more: readers would wait for it.
            taken = self.queue.get(least_urgent, _IDLE_TICK_S, self.background.wait_s)
            if taken is None:
                continue
            (file, chunk), urgency = taken
            try:
                self._guarded(partial(self._do, file, chunk, urgency))
            finally:
                self.queue.done(file)

    def _do(self, file: int, chunk: int, urgency: int) -> None:
        if urgency == wire.FSYNC:
            self._fsync(file)
            return
        size = self.manifest.files[file].chunks[chunk].length
        if urgency == wire.BACKGROUND and not self.background.take(size):
            # Another worker took the allowance.
            self.queue.put((file, chunk), urgency)
            return
        self._fetch(file, chunk, urgency)
        if self.window.fetched(size):
            self.queue.wake()

    def report(self) -> None:
        """Send the counters to the server."""
        stats = self.chunk_fetcher.stats
        tiers = stats.tiers
        values = (
            tiers["store"], tiers["origin"], tiers["proven"], stats.fetches, int(stats.latency.total * 1000),
            stats.retries, stats.quarantined, len(self.queue), *stats.latency.counts,
            tiers["peer"],
        )  # fmt: skip
        for number, value in enumerate(values):
            self._send(wire.STATS, number, value >> 31, value & 0x7FFFFFFF)

    def _report_forever(self) -> None:
        beat = 0
        while not self.queue.closed:
            self._guarded(self.report)
            self._guarded(self.repeats.tick)
            self._guarded(self.chunk_fetcher.repeats.tick)
            beat += 1
            if beat % _POSTPONED_TICKS == 0:
                self._guarded(self._requeue_postponed)
            time.sleep(1.0)

    def _requeue_postponed(self) -> None:
        """Queue the postponed chunks again."""
        for key in list(self.postponed):
            self.queue.put(key, self.postponed.pop(key))

    def _fetch(self, file: int, chunk: int, urgency: int) -> None:
        slot = self.slots.pop((file, chunk), -1)
        began = time.monotonic()
        try:
            if slot < 0 and urgency != wire.ON_DEMAND and began < self.full_until:
                raise DiskFull("the cache has had no room a moment ago", code="cache-full")
            with self.sparse_files.use(file) as sparse_file:
                # Without a slot of memory the bytes can go to the disk only: fetch nothing that it has no room for.
                data = self.chunk_fetcher.fill(sparse_file, chunk, or_memory=slot >= 0)
                complete = data is None and sparse_file.complete() and not sparse_file.fsynced()
            source = wire.SOURCES.index(self.chunk_fetcher.source_of_last())
            if data is None:
                self._send(wire.STORED, file, chunk, source, slot, began)
                if complete:
                    self.queue.put((file, 0), wire.FSYNC)
            elif slot >= 0:
                self.memory.write(slot, data)
                self._send(wire.SLOT, file, chunk, source, slot, began)
            else:
                self._send(wire.FAILED, file, chunk, errno.ENOSPC, slot, began)
        except (LazyfsError, OSError) as error:
            code = error.code if isinstance(error, LazyfsError) else "io-error"
            message = f"{self.manifest.files[file].path} chunk {chunk}: {code}: {error}"
            # A full cache is a state that streaming serves, not a failure.
            self.repeats.log(logging.WARNING if isinstance(error, DiskFull) else logging.ERROR, code, message)
            if isinstance(error, (Temporary, DiskFull)) and urgency != wire.ON_DEMAND:
                self.postponed[file, chunk] = urgency
            if code == "cache-full" and began >= self.full_until:
                self.full_until = time.monotonic() + _FULL_S
            self._send(wire.FAILED, file, chunk, to_errno(error), slot, began)
        except Exception as error:
            # Answer after any exception: a reader waits for the answer, and the worker must continue.
            log.exception("cannot fetch chunk %d of %s", chunk, self.manifest.files[file].path)
            self._send(wire.FAILED, file, chunk, to_errno(error), slot, began)

    def _fsync(self, file: int) -> None:
        if not self.chunk_fetcher.cache.folder(self.manifest.files[file]).exists():
            # Dropped since; opening would create it again.
            return
        with self.sparse_files.use(file) as sparse_file:
            # It may have been dropped and started again; an incomplete file must not count as fsynced.
            if sparse_file.complete() and not sparse_file.fsynced():
                try:
                    self.chunk_fetcher.verify_whole(sparse_file)
                    sparse_file.fsync()
                except Integrity as error:
                    log.error("%s", error)
                except OSError as error:
                    # Without fsync the file is verified again after a power cut.
                    log.warning("cannot fsync the sparse cache file of %s: %s", sparse_file.file.path, error)
        self.sparse_files.close(file)

    def _send(self, kind: int, file: int, chunk: int, argument: int, slot: int = -1, began: float = 0.0) -> None:
        with self.sending:
            try:
                self.channel.send(wire.ANSWER.pack(kind, file, chunk, argument, slot, began))
            except ConnectionError:
                self.queue.close()


def build(config: MountConfig, manifest: Manifest) -> ChunkFetcher:
    """Build the fetch engine of a mount: its cache, its store, and the originals on this disk."""
    cache = Cache(Path(config.cache_dir), config.cache_limit)
    known = origins_of(config, manifest)
    if manifest.kind == "source":
        log_of_digests = DigestLog(cache.root / "digests")
        through = ReadThroughSource(open_store(manifest.source))
        return ChunkFetcher(cache, through, known, config.fetch_limit_s, log_of_digests)
    store = StoreSource(ChunkStore(open_store(config.store_url)))
    source: ByteSource = store
    if config.peers:
        source = PeerSource(
            store, Peers(Members(config.peers, config.peer_self), config.peer_token, limit_s=config.fetch_limit_s)
        )
    return ChunkFetcher(cache, source, known, config.fetch_limit_s)


def main() -> None:
    """Run the fetcher: `python -m lazyfs.fetch.worker CHANNEL-FD MEMORY-FD CONFIG-FD`, started by the server."""
    from lazyfs.logs import configure
    from lazyfs.mount.manifest_source import load_manifest

    channel = socket.socket(fileno=int(sys.argv[1]))
    memory = SlotWriter(int(sys.argv[2]))
    config = MountConfig.load_fd(int(sys.argv[3]))
    configure("fetcher")
    raise_descriptor_limit()
    manifest = load_manifest(config)
    Fetcher(config, manifest, build(config, manifest), channel, memory).run()
    # Worker threads may be in a network read with a limit; they hold nothing that needs cleanup.
    os._exit(0)


if __name__ == "__main__":
    main()
