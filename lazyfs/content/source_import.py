"""Import a model of the hub, or an object prefix, into a chunk store without a copy on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from lazyfs.admin.listing import store_lock
from lazyfs.content.chunk_store import ChunkStore, PutResult
from lazyfs.content.importer import REMOTE_WORKERS, Progress
from lazyfs.content.manifest import VERSION, Chunk, File, Manifest
from lazyfs.content.read_through import describe
from lazyfs.content.whole_file import hasher
from lazyfs.errors import Integrity, Permanent
from lazyfs.stores import Store, opened
from lazyfs.stores.retry import RetryPolicy, retrying


def import_source(
    url: str, chunks: ChunkStore, progress: Callable[[Progress], None] | None = None
) -> tuple[str, Manifest]:
    """Store every file of a source as chunks; return the manifest's digest and the manifest.

    Each file is checked against the digest that the source gives of it, if it gives one. Raises Integrity if it differs,
    Permanent (source-changed) if a file became shorter, what `describe` raises, or what either store raises.
    """
    source = describe(url)
    with opened(source.source) as store, store_lock(chunks, exclusive=False):
        job = _Import(chunks, store, source.size, progress)
        with ThreadPoolExecutor(REMOTE_WORKERS) as pool:
            files = tuple(job.file(pool, file) for file in source.files)
        manifest = Manifest(VERSION, "weights", source.directories, files, source.symlinks, {"source": source.source})
        return retrying(lambda: chunks.put_manifest(manifest), RetryPolicy()), manifest


class _Import:
    def __init__(
        self, chunks: ChunkStore, store: Store, total: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self.chunks, self.store, self.total, self.progress = chunks, store, total, progress
        self.done = self.skipped = self.stored = 0

    def file(self, pool: ThreadPoolExecutor, file: File) -> File:
        """Store one file: chunks are fetched and stored by many threads, and hashed in order by this one."""
        whole = hasher(file.version, file.size)
        window: deque[Future[tuple[bytes, PutResult]]] = deque()
        found: list[Chunk] = []

        def take() -> None:
            data, result = window.popleft().result()
            if whole is not None:
                whole[0].update(data)
            found.append(result.chunk)
            self._count(result, file.path)

        for index in range(len(file.chunks)):
            # At most this many chunks are in memory at a time.
            if len(window) == REMOTE_WORKERS:
                take()
            window.append(pool.submit(self._copy, file, index))
        while window:
            take()
        if whole is not None and whole[0].hexdigest() != whole[1]:
            raise Integrity(
                f"{file.path} of {self.store.url} hashes to {whole[0].hexdigest()[:12]}, and the source says {whole[1][:12]}; "
                "nothing of it is named in the store; import it again"
            )
        return File(file.path, file.mode, file.size, tuple(found))

    def _copy(self, file: File, index: int) -> tuple[bytes, PutResult]:
        length = file.chunks[index].length
        data = bytes(
            retrying(lambda: self.store.get(file.path, file.offsets[index], length, file.version), RetryPolicy())
        )
        if len(data) != length:
            raise Permanent(f"{file.path} of {self.store.url} became shorter; import it again", code="source-changed")
        return data, retrying(lambda: self.chunks.put_chunk(data), RetryPolicy())

    def _count(self, result: PutResult, path: str) -> None:
        self.done += result.chunk.length
        self.stored += result.stored
        self.skipped += 0 if result.stored else result.chunk.length
        if self.progress is not None:
            self.progress(Progress(self.total, self.done, self.skipped, self.stored, path))
