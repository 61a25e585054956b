"""Verify the contents of a store and a cache: every chunk against its digest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from lazyfs.admin.listing import named_manifests
from lazyfs.cache.cache import Cache
from lazyfs.cache.sparse_file import ABSENT, PRESENT, UNVERIFIED
from lazyfs.content.chunk_store import ChunkStore, chunk_key, digest_of, mismatch
from lazyfs.content.manifest import RAW, ZSTD, Chunk, File, Manifest, decode, is_digest
from lazyfs.errors import DiskFull, Integrity, LazyfsError, NotFound, Permanent
from lazyfs.stores.retry import RetryPolicy, retry_damaged, retrying

_WORKERS = 4


@dataclass
class VerifyReport:
    """Result of `verify`.

    `bad` chunks are damaged, `missing` ones do not exist; both map digest to path. `broken_names`: tags and snapshots
    without a manifest, and the reason. `cache_skipped`: cache files that a full disk keeps from being opened.
    """

    manifests: int = 0
    chunks: int = 0
    bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    broken_manifests: dict[str, str] = field(default_factory=dict)
    broken_names: dict[str, str] = field(default_factory=dict)
    cache_bad: int = 0
    cache_chunks: int = 0
    cache_skipped: int = 0

    @property
    def clean(self) -> bool:
        return not (self.bad or self.missing or self.broken_manifests or self.broken_names or self.cache_bad)


def verify(chunks: ChunkStore, digests: list[str] | None = None, *, repair: bool = False) -> VerifyReport:
    """Read and hash every chunk that the manifests mention (default: all manifests, and then all names too).

    A mismatch is read once more before it counts as damage. `repair` deletes damaged chunks and manifests, so that the next
    import writes them again. Raises errors other than damage (an unreachable store).
    """
    report = VerifyReport()
    wanted: dict[str, tuple[Chunk, str]] = {}
    if digests is None:
        digests = list(chunks.manifests())
        _, broken = named_manifests(chunks, set(digests))
        report.broken_names = {f"{kind.removesuffix('s')} {name}": why for (kind, name), why in broken.items()}
    for digest in digests:
        try:
            manifest = retry_damaged(partial(retrying, partial(chunks.get_manifest, digest), RetryPolicy()))
        except (Integrity, NotFound) as error:
            report.broken_manifests[digest] = str(error)
            if repair and isinstance(error, Integrity):
                chunks.store.delete(f"manifests/{digest}")
            continue
        report.manifests += 1
        for file in manifest.files:
            for chunk in file.chunks:
                wanted.setdefault(chunk.digest, (chunk, file.path))

    def one(item: tuple[Chunk, str]) -> None:
        chunk, path = item
        try:
            retry_damaged(
                lambda: retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), RetryPolicy())
            )
        except (Integrity, Permanent) as error:
            # An I/O error counts as damage of this chunk; a permission error concerns the whole store.
            if not isinstance(error, Integrity) and error.code != "io-error":
                raise
            report.bad[chunk.digest] = path
            if repair:
                for encoding in (RAW, ZSTD):
                    chunks.store.delete(chunk_key(chunk.digest, encoding))
        except NotFound:
            report.missing[chunk.digest] = path
        report.chunks += 1
        report.bytes += chunk.length

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(one, wanted.values()):
            pass
    return report


def verify_cache(
    cache: Cache, chunks: ChunkStore | None, report: VerifyReport, digests: list[str] | None = None
) -> None:
    """Hash every present chunk of every cache file whose manifest is known (see `known_manifests`).

    Damaged chunks become absent, so that they are fetched again.
    """
    seen: set[str] = set()
    for manifest in known_manifests(cache, chunks, digests):
        for file in manifest.files:
            if file.digest in seen or file.version or not (cache.folder(file) / "have").exists():
                continue
            seen.add(file.digest)
            _verify_file(cache, file, report)


def _verify_file(cache: Cache, file: File, report: VerifyReport) -> None:
    try:
        sparse_file = cache.open(file)
    except DiskFull:
        report.cache_skipped += 1
        return
    try:
        for index, chunk in enumerate(file.chunks):
            if sparse_file.state(index) not in (PRESENT, UNVERIFIED):
                continue
            report.cache_chunks += 1
            data = sparse_file.read(index)
            if digest_of(data) == chunk.digest:
                sparse_file.mark(index, PRESENT)
            else:
                report.cache_bad += 1
                sparse_file.mark(index, ABSENT)
                why = f"chunk {index} of {file.path}, in the cache of this host: {mismatch(data, chunk.digest, chunk.length)}"
                cache.quarantine(chunk.digest, data, why)
    finally:
        sparse_file.close()


def known_manifests(cache: Cache, chunks: ChunkStore | None, digests: list[str] | None = None) -> Iterator[Manifest]:
    """Yield the manifests copied beside the cache, then those of the store (`digests`, or all that it lists).

    Skips damaged manifests; `verify` reports them.
    """
    for copy in sorted((cache.root / "manifests").glob("*")):
        if is_digest(copy.name):
            with contextlib.suppress(Integrity):
                yield decode(copy.read_bytes(), copy.name)
    if chunks is not None:
        for digest in digests if digests is not None else chunks.manifests():
            with contextlib.suppress(LazyfsError):
                yield chunks.get_manifest(digest)
