"""Collect a store's garbage in two phases: mark unreferenced chunks, then check again and delete.

A lock keeps imports out of a local store meanwhile. A remote store has no lock; three measures protect the chunks of a
concurrent import:
- Chunks younger than the grace period are spared, and an import touches chunks that it finds.
- Each batch begins by reading new manifests, and each chunk's age is read once more just before it is deleted.
- The collection writes a mark (`gc/last`), so that `ChunkStore.put_manifest` checks whether its chunks still exist.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lazyfs.admin.listing import named_manifests, store_lock
from lazyfs.content.chunk_store import GC_MARK, GRACE_S, ChunkStore
from lazyfs.content.manifest import Manifest
from lazyfs.errors import Integrity, NotFound
from lazyfs.stores.base import ObjectInfo

# A batch is deleted within seconds, even where each object costs a round trip.
_BATCH, _REMOTE_WORKERS = 256, 32


@dataclass
class Collected:
    """Counts and bytes of what a collection deleted (or would delete)."""

    chunks: int = 0
    bytes: int = 0
    kept: int = 0
    young: int = 0
    manifests: int = 0


def collect(
    chunks: ChunkStore,
    *,
    grace_s: float = GRACE_S,
    untagged: bool = False,
    doomed: Collection[str] = (),
    dry_run: bool = False,
) -> Collected:
    """Delete chunks that no manifest mentions.

    `untagged` first deletes weights without a tag (never snapshots); `doomed`: manifests to delete first, unless they have a name by
    then (a dry run takes them for nameless). Raises Integrity for an unreadable manifest or a ref
    without one, since needed chunks would count as garbage; Busy (store-busy) during an import into a local store.
    """
    with contextlib.nullcontext() if dry_run else store_lock(chunks, exclusive=True):
        job = _Collection(chunks, grace_s, untagged, frozenset(doomed), dry_run)
        job.mark()
        if dry_run:
            job.result.manifests = len(job.to_delete)
            job.result.chunks = len(job.garbage)
            job.result.bytes = sum(info.size for info in job.garbage)
        else:
            job.sweep()
        return job.result


class _Collection:
    def __init__(
        self, chunks: ChunkStore, grace_s: float, untagged: bool, doomed: frozenset[str], dry_run: bool
    ) -> None:
        self.chunks = chunks
        self.grace_s = grace_s
        self.untagged = untagged
        self.doomed, self.dry_run = doomed, dry_run
        self.result = Collected()
        self.known: set[str] = set()
        self.used: set[str] = set()
        self.to_delete: dict[str, Manifest] = {}
        self.garbage: list[ObjectInfo] = []

    def mark(self) -> None:
        """First phase: find unreferenced chunks that are old enough to delete."""
        named = self._named()
        for digest, manifest in self._new_manifests():
            if self._goes(digest, manifest, named):
                self.to_delete[digest] = manifest
            else:
                self.used |= manifest.chunk_digests()
        for info in self.chunks.store.list("chunks/"):
            if _digest(info) in self.used:
                self.result.kept += 1
            elif time.time() - info.modified < self.grace_s:
                self.result.young += 1
            else:
                self.garbage.append(info)

    def _goes(self, digest: str, manifest: Manifest, named: set[str]) -> bool:
        if digest in self.doomed:
            return self.dry_run or (digest not in named and self._old(f"manifests/{digest}"))
        return self.untagged and digest not in named and manifest.kind == "weights" and self._old(f"manifests/{digest}")

    def sweep(self) -> None:
        """Second phase: batch by batch, check again and delete chunks that are still garbage."""
        workers = _REMOTE_WORKERS if self.chunks.store.remote else 1
        batches = range(0, max(1, len(self.garbage)), _BATCH)
        with ThreadPoolExecutor(workers, thread_name_prefix="collect") as pool:
            for number, at in enumerate(batches):
                self._write_mark(number, running=True)
                self._recheck()
                for info, gone in pool.map(self._delete, self.garbage[at : at + _BATCH]):
                    self.result.chunks += gone
                    self.result.bytes += info.size if gone else 0
                    self.result.kept += not gone
        self._write_mark(len(batches), running=False)

    def _recheck(self) -> None:
        for _, manifest in self._new_manifests():
            self.used |= manifest.chunk_digests()
        named = self._named() if self.to_delete else set()
        for digest, manifest in self.to_delete.items():
            # Tagged since, or imported again.
            if digest in named or not self._old(f"manifests/{digest}"):
                self.used |= manifest.chunk_digests()
            else:
                self.chunks.delete_manifest(digest)
                self.result.manifests += 1
        self.to_delete = {}

    def _delete(self, info: ObjectInfo) -> tuple[ObjectInfo, bool]:
        if _digest(info) in self.used or not self._old(info.key):
            return info, False
        self.chunks.store.delete(info.key)
        return info, True

    def _old(self, key: str) -> bool:
        info = self.chunks.store.head(key)
        return info is not None and time.time() - info.modified >= self.grace_s

    def _named(self) -> set[str]:
        good, broken = named_manifests(self.chunks, set(self.chunks.manifests()))
        if broken:
            (_, name), why = next(iter(broken.items()))
            raise Integrity(f"{name}: {why}")
        return set(good.values())

    def _new_manifests(self) -> Iterator[tuple[str, Manifest]]:
        for digest in self.chunks.manifests():
            if digest not in self.known:
                self.known.add(digest)
                with contextlib.suppress(NotFound):  # removed since it was listed
                    yield digest, self.chunks.get_manifest(digest)

    def _write_mark(self, batch: int, *, running: bool) -> None:
        if self.chunks.store.remote:
            self.chunks.store.put(GC_MARK, msgspec.json.encode({"batch": batch, "running": running}))


def _digest(info: ObjectInfo) -> str:
    return Path(info.key).name.removesuffix(".zst")
