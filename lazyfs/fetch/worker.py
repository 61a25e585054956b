"""The fetcher: the process beside a mount's server that reads the network, hashes and decompresses.

It is told what a reader waits for (first), what one will want soon, and completes the rest at a bounded rate (last),
and answers when a chunk is there. It ends when the server's end of the socket closes. Killed at any moment it loses
nothing but work; the server starts another.
"""

from __future__ import annotations

import errno
import heapq
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lazyfs.cache.cache import Cache
from lazyfs.cache.open_files import OpenImages, raise_descriptor_limit
from lazyfs.cache.slots import SlotWriter
from lazyfs.content.chunk_store import ChunkStore
from lazyfs.content.chunking import MAX_CHUNK
from lazyfs.content.manifest import Manifest
from lazyfs.content.source_digests import DigestLog
from lazyfs.errors import LazyfsError, NotFound, Temporary, to_errno
from lazyfs.fetch import wire
from lazyfs.fetch.access_log import Trace, parse, shared_key
from lazyfs.fetch.chunk import ChunkFetcher, ReadThroughSource, StoreSource
from lazyfs.logs import Repeats
from lazyfs.mount.config import MountConfig
from lazyfs.mount.manifest_source import origins_of
from lazyfs.stores import open_store
from lazyfs.stores.retry import RetryPolicy, retrying

log = logging.getLogger("lazyfs.fetch.worker")
_LOCAL_THREADS, _REMOTE_THREADS = 4, 16
_IDLE_TICK_S = 5.0
# What the store could not give is asked for again after so many seconds.
_POSTPONED_TICKS = 30
# How often, and how far apart, an image that another process has open is tried to be dropped: a close may be on its way.
_DROP_TRIES, _DROP_PAUSE_S = 100, 0.05


class Queue:
    """Chunks to fetch, most urgent first; a chunk asked for again with more urgency moves up. Thread-safe."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, tuple[int, int]]] = []
        self._urgency: dict[tuple[int, int], int] = {}
        self._taken: dict[int, int] = {}
        self._order = 0
        lock = threading.Lock()
        self._ready = threading.Condition(lock)
        # Those that may take demanded chunks only wait apart: waking them for anything else would be for nothing.
        self._demanded = threading.Condition(lock)
        self.closed = False

    def put(self, key: tuple[int, int], urgency: int) -> None:
        """Add, or move up."""
        with self._ready:
            if self._urgency.get(key, 99) <= urgency:
                return
            self._urgency[key] = urgency
            self._order += 1
            heapq.heappush(self._heap, (urgency, self._order, key))
            self._ready.notify()
            if urgency == wire.DEMAND:
                self._demanded.notify()

    def get(
        self, worst: Callable[[], int], limit_s: float, pause: Callable[[], float] = lambda: 0.0
    ) -> tuple[tuple[int, int], int] | None:
        """The most urgent one, if at least as urgent as `worst()`; None after `limit_s` or when closed. To be ended with `done`.

        `pause()`: after how long `worst()` may have changed by itself; 0: it does not.
        """
        with self._ready:
            deadline = time.monotonic() + limit_s
            while not self.closed:
                while self._heap and self._urgency.get(self._heap[0][2]) != self._heap[0][0]:
                    heapq.heappop(self._heap)
                if self._heap and self._heap[0][0] <= worst():
                    urgency, _, key = heapq.heappop(self._heap)
                    del self._urgency[key]
                    self._taken[key[0]] = self._taken.get(key[0], 0) + 1
                    return key, urgency
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                (self._demanded if worst() == wire.DEMAND else self._ready).wait(min(left, pause() or left))
            return None

    def done(self, file: int) -> None:
        """What was taken of the file has been dealt with."""
        with self._ready:
            self._taken[file] -= 1

    def taken(self, file: int) -> int:
        """How many things of the file were taken and are not done."""
        return self._taken.get(file, 0)

    def forget(self, file: int) -> list[tuple[int, int]]:
        """Take out what nobody waits for of a file; what that was."""
        with self._ready:
            keys = [k for k, u in self._urgency.items() if k[0] == file and u != wire.DEMAND]
            for key in keys:
                del self._urgency[key]
            return keys

    def wake(self) -> None:
        """Let waiters look again: what they may take has changed."""
        with self._ready:
            self._ready.notify_all()
            self._demanded.notify_all()

    def close(self) -> None:
        """Let every waiter go."""
        with self._ready:
            self.closed = True
            self._ready.notify_all()
            self._demanded.notify_all()

    def __len__(self) -> int:
        return len(self._urgency)


class Window:
    """How many fetches that nobody waits for run at once: doubled as long as that makes the whole faster.

    Every chunk in flight takes bandwidth from the one that a reader will want first, so more than fills the link costs
    latency at the start and at the end; a store that is slow per connection needs many. Two batches are measured at
    each width (the first one fills the pipe), and the widening ends when the second gains less than a fifth.
    """

    START, GAIN = 4, 1.2

    def __init__(self, most: int) -> None:
        self.most = most
        self.width = min(self.START, most)
        self._best = 0.0
        self._batch = 0
        self._bytes = 0
        self._since = time.monotonic()
        self._settled = self.width == most
        self._lock = threading.Lock()

    def fetched(self, size: int) -> bool:
        """A fetch ended; whether the width has changed."""
        with self._lock:
            if self._settled:
                return False
            self._bytes += size
            if self._bytes < self.width * MAX_CHUNK:
                return False
            now = time.monotonic()
            rate = self._bytes / max(1e-6, now - self._since)
            self._bytes, self._since, self._batch = 0, now, self._batch + 1
            if self._batch % 2:
                return False
            if rate < self.GAIN * self._best:
                self.width = max(self.START, self.width // 2)
                self._settled = True
            else:
                self._best = rate
                self.width = min(self.most, self.width * 2)
                self._settled = self.width == self.most
            return True


class Rate:
    """A bound in bytes per second on what nobody waits for; 0: no bound. Thread-safe."""

    def __init__(self, megabytes_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_s = megabytes_s * 1e6
        self.clock = clock
        self._next = 0.0
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """How long until more may be taken."""
        return max(0.0, self._next - self.clock())

    def take(self, size: int) -> bool:
        """Take so many bytes now; False where it is too early."""
        with self._lock:
            now = self.clock()
            if now < self._next:
                return False
            if self.bytes_s > 0:
                self._next = now + size / self.bytes_s
            return True


class Fetcher:
    """Worker threads over one queue, and the loop that hears the server."""

    def __init__(
        self,
        config: MountConfig,
        manifest: Manifest,
        engine: ChunkFetcher,
        channel: socket.socket,
        memory: SlotWriter,
    ) -> None:
        self.config = config
        self.manifest = manifest
        self.engine = engine
        self.channel = channel
        self.memory = memory
        self.slots: dict[tuple[int, int], int] = {}
        self.trace_was_shared = False
        self.queue = Queue()
        self.images = OpenImages(engine.cache, manifest.files)
        self.dropping: dict[int, int] = {}
        self.dropping_lock = threading.Lock()
        # What was to be fetched although nobody waits for it, and could not be: tried again when the store may be back.
        self.postponed: dict[tuple[int, int], int] = {}
        self.sending = threading.Lock()
        self.threads = config.fetch_threads or (_REMOTE_THREADS if engine.source.store.remote else _LOCAL_THREADS)
        self.window = Window(self.threads)
        self.background = Rate(config.background_mb_s)
        self.repeats = Repeats(log)

    def run(self) -> None:
        """Serve until the server closes the channel or says stop."""
        workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        threading.Thread(target=self._report_forever, daemon=True).start()
        # It may ask the store for a trace, and readers must not wait for that.
        threading.Thread(target=self._guarded, args=(self._plan,), daemon=True).start()
        try:
            while True:
                message = self.channel.recv(wire.BUFFER)
                if len(message) < wire.REQUEST.size:
                    return
                kind, file, chunk, slot = wire.REQUEST.unpack(message)
                if kind == wire.PUBLISH:
                    threading.Thread(target=self.publish_trace, daemon=True).start()
                    continue
                if kind == wire.DROP:
                    self.drop(file)
                    continue
                if kind == wire.FILE:
                    for each in range(len(self.manifest.files[file].chunks)):
                        self.queue.put((file, each), wire.AHEAD)
                    continue
                if slot >= 0:
                    self.slots[file, chunk] = slot
                self.queue.put((file, chunk), kind)
        except ConnectionError:
            return
        finally:
            self.queue.close()

    def _plan(self) -> None:
        """The recorded trace first, in its order; then everything else, at the bounded rate. What a trace names is pinned."""
        files = self.manifest.files
        absent = [i for i, f in enumerate(files) if f.path not in self.engine.origins]
        wanted = set(absent)
        known = self._known_trace()
        traced = {files[file].digest for file, _ in known if file in wanted}
        if self.config.cache_limit and traced:
            self.engine.cache.pin_files(sorted(traced))
        if not self.config.prefetch:
            return
        for file, chunk in known:
            if file in wanted and chunk < len(files[file].chunks):
                self.queue.put((file, chunk), wire.AHEAD)
        if self.config.background_mb_s > 0:
            for file in absent:
                for chunk in range(len(files[file].chunks)):
                    self.queue.put((file, chunk), wire.COMPLETE)

    def _known_trace(self) -> list[tuple[int, int]]:
        """This host's recording, else the one that another host left in a remote store."""
        local = Trace(Path(self.config.home) / "traces" / f"{self.config.manifest}.json", record="never").known
        store = self.engine.source.store
        if local or not (store.remote and self.config.prefetch) or self.manifest.kind == "source":
            return local
        try:
            policy = RetryPolicy(limit=self.config.fetch_limit_s)
            found = parse(bytes(retrying(lambda: store.get(shared_key(self.config.manifest)), policy)))
            self.trace_was_shared = True
            return found
        except NotFound:
            return []
        except (LazyfsError, ValueError) as error:
            log.warning("no trace from %s: %s", store.url, error)
            return []

    def publish_trace(self) -> None:
        """Leave this host's recording in a remote store that had none, for other hosts' first starts."""
        store = self.engine.source.store
        path = Path(self.config.home) / "traces" / f"{self.config.manifest}.json"
        if not store.remote or self.manifest.kind == "source" or self.trace_was_shared or not path.exists():
            return
        try:
            store.put(shared_key(self.config.manifest), path.read_bytes())
        except LazyfsError as error:
            # A read-only store is no fault of the mount's.
            log.info("the trace was not shared: %s", error)

    def drop(self, index: int) -> None:
        """Let go of a file's image and remove it, once nothing fills or flushes it; not if somebody has it open."""
        for key in self.queue.forget(index):
            slot = self.slots.pop(key, -1)
            if slot >= 0:
                # Begun never, so that whoever has come to wait for the chunk asks again.
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
        """Whether the file is dropped, or is not to be tried any more."""
        # However long a flush takes on a busy disk: only what others hold counts as a try.
        if self.queue.taken(index) or not self.images.close(index):
            return False
        file = self.manifest.files[index]
        self.dropping[index] -= 1
        try:
            freed = self.engine.cache.drop(file)
        except OSError as error:
            log.error("cannot drop %s: %s", file.path, error)
            return True
        if freed or not self.engine.cache.folder(file).exists():
            log.info("dropped %s: %d bytes freed", file.path, freed)
            return True
        if not self.dropping[index]:
            log.info("%s is in use and was not dropped", file.path)
        return not self.dropping[index]

    def _guarded(self, step: Callable[[], None]) -> None:
        """Take a step of a thread that must outlive what goes wrong in it."""
        try:
            step()
        except Exception:
            log.exception("a thread of the fetcher met a defect, and goes on")

    def _work(self, number: int) -> None:
        def worst() -> int:
            if number >= self.window.width:
                return wire.DEMAND
            # One thread never takes what is not urgent, so that a reader does not wait behind the background.
            if (number == 0 and self.threads > 1) or self.background.wait_s() > 0:
                return wire.AHEAD
            return wire.SEAL

        while not self.queue.closed:
            # No worker sleeps out the bound on the background: a reader would miss it.
            taken = self.queue.get(worst, _IDLE_TICK_S, self.background.wait_s)
            if taken is None:
                continue
            (file, chunk), urgency = taken
            try:
                self._guarded(partial(self._do, file, chunk, urgency))
            finally:
                self.queue.done(file)

    def _do(self, file: int, chunk: int, urgency: int) -> None:
        if urgency == wire.SEAL:
            self._seal(file)
            return
        size = self.manifest.files[file].chunks[chunk].length
        if urgency == wire.COMPLETE and not self.background.take(size):
            # Another worker took the turn.
            self.queue.put((file, chunk), urgency)
            return
        self._answer(file, chunk, urgency)
        if self.window.fetched(size):
            self.queue.wake()

    def report(self) -> None:
        """Send the counters to the server."""
        stats = self.engine.stats
        tiers = stats.tiers
        values = (
            tiers["store"], tiers["origin"], tiers["proven"], stats.fetches, int(stats.latency.total * 1000),
            stats.retries, stats.quarantined, len(self.queue), *stats.latency.counts,
        )  # fmt: skip
        for number, value in enumerate(values):
            self._send(wire.STATS, number, value >> 31, value & 0x7FFFFFFF)

    def _report_forever(self) -> None:
        beat = 0
        while not self.queue.closed:
            self._guarded(self.report)
            self._guarded(self.repeats.tick)
            self._guarded(self.engine.repeats.tick)
            beat += 1
            if beat % _POSTPONED_TICKS == 0:
                self._guarded(self._again)
            time.sleep(1.0)

    def _again(self) -> None:
        """Queue once more what the store could not give."""
        for key in list(self.postponed):
            self.queue.put(key, self.postponed.pop(key))

    def _answer(self, file: int, chunk: int, urgency: int) -> None:
        slot = self.slots.pop((file, chunk), -1)
        began = time.monotonic()
        try:
            with self.images.use(file) as image:
                data = self.engine.fill(image, chunk)
                complete = data is None and image.complete() and not image.sealed()
            source = wire.SOURCES.index(self.engine.source_of_last())
            if data is None:
                self._send(wire.STORED, file, chunk, source, slot, began)
                if complete:
                    self.queue.put((file, 0), wire.SEAL)
            elif slot >= 0:
                self.memory.write(slot, data)
                self._send(wire.SLOT, file, chunk, source, slot, began)
            else:
                self._send(wire.FAILED, file, chunk, errno.ENOSPC, slot, began)
        except (LazyfsError, OSError) as error:
            code = error.code if isinstance(error, LazyfsError) else "io-error"
            message = f"{self.manifest.files[file].path} chunk {chunk}: {code}: {error}"
            self.repeats.say(logging.ERROR, code, message)
            if isinstance(error, Temporary) and urgency != wire.DEMAND:
                self.postponed[file, chunk] = urgency
            self._send(wire.FAILED, file, chunk, to_errno(error), slot, began)
        except Exception as error:
            # Whatever it is, a reader waits for an answer, and others for this worker.
            log.exception("%s chunk %d failed", self.manifest.files[file].path, chunk)
            self._send(wire.FAILED, file, chunk, to_errno(error), slot, began)

    def _seal(self, file: int) -> None:
        if not self.engine.cache.folder(self.manifest.files[file]).exists():
            # Dropped since; it would be made again.
            return
        with self.images.use(file) as image:
            # It may have been dropped and begun again, and an image that is not whole must not pass for flushed.
            if image.complete() and not image.sealed():
                try:
                    image.seal()
                except OSError as error:
                    # Unsealed means proven again after a power cut, which is right for a disk that fails to flush.
                    log.warning("cannot flush the image of %s: %s", image.file.path, error)
        self.images.close(file)

    def _send(self, kind: int, file: int, chunk: int, argument: int, slot: int = -1, began: float = 0.0) -> None:
        with self.sending:
            try:
                self.channel.send(wire.ANSWER.pack(kind, file, chunk, argument, slot, began))
            except ConnectionError:
                self.queue.close()


def build(config: MountConfig, manifest: Manifest) -> ChunkFetcher:
    """The fetching engine of a mount: its cache, its store, and the originals on this disk."""
    cache = Cache(Path(config.cache_dir), config.cache_limit or None)
    known = origins_of(config, manifest)
    if manifest.kind == "source":
        log_of_digests = DigestLog(cache.root / "digests")
        through = ReadThroughSource(open_store(manifest.source))
        return ChunkFetcher(cache, through, known, config.fetch_limit_s, log_of_digests)
    source = StoreSource(ChunkStore(open_store(config.store_url)))
    return ChunkFetcher(cache, source, known, config.fetch_limit_s)


def main() -> None:
    """`python -m lazyfs.fetch.worker CHANNEL-FD MEMORY-FD CONFIG-FD`; the server starts it."""
    from lazyfs.logs import configure
    from lazyfs.mount.manifest_source import load_manifest

    channel = socket.socket(fileno=int(sys.argv[1]))
    memory = SlotWriter(int(sys.argv[2]))
    config = MountConfig.load_fd(int(sys.argv[3]))
    configure("fetcher")
    raise_descriptor_limit()
    manifest = load_manifest(config)
    Fetcher(config, manifest, build(config, manifest), channel, memory).run()
    # Worker threads may sit in a network read with a limit; nothing they hold needs tidying.
    os._exit(0)


if __name__ == "__main__":
    main()
