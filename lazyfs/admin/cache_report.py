"""What this host's cache and state folder hold, and what of it may go: for `quickthaw cache`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lazyfs.admin.records import unneeded
from lazyfs.cache.bound import AUTO, UNBOUNDED, blocks_below, kept_free
from lazyfs.cache.cache import COUNTED, Cache
from lazyfs.cache.reservations import reserved_by_others
from lazyfs.content.manifest import Manifest, decode, is_digest
from lazyfs.content.stat_index import source_folder
from lazyfs.errors import Integrity
from lazyfs.paths import state_folder
from lazyfs.stores.urls import shown_url

NAMES = {"snapshots": "snapshots", "compile": "compile caches", "traces": "access logs"}


@dataclass(frozen=True)
class Share:
    """Bytes of disk of one kind of content. `counts`: under a limit of the cache."""

    name: str
    bytes: int
    counts: bool


@dataclass
class CachedModel:
    """A manifest whose files are in the cache, or files of no known manifest (`manifest` is then empty).

    `bytes` of disk, `used`: last use in seconds since the epoch, `pinned`: a living mount keeps some of it.
    """

    manifest: str
    source: str
    bytes: int = 0
    files: int = 0
    used: float = 0.0
    pinned: bool = False
    locks: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The whole of `quickthaw cache ls`. Sizes in bytes of disk; `room`: what may still be cached, after evicting what may go."""

    bound: int
    free: int
    total: int
    kept_free: int
    counted: int
    room: int
    evictable: int
    shares: tuple[Share, ...]
    models: tuple[CachedModel, ...]


def report(cache: Cache) -> Report:
    """Count everything. Reads no file but the manifests beside the cache."""
    disk, bound = shutil.disk_usage(cache.root), cache.bound
    counted, evictable = cache.counted(), cache.evictable()
    kept = kept_free(disk.total) if bound == AUTO else 0
    room = disk.free - kept if bound in (AUTO, UNBOUNDED) else min(disk.free, bound - counted)
    return Report(
        bound,
        disk.free,
        disk.total,
        kept,
        counted,
        max(0, room + evictable),
        evictable,
        tuple(shares(cache)),
        tuple(models(cache)),
    )


def shares(cache: Cache) -> Iterator[Share]:
    """Yield what each kind of content occupies: what counts under a limit first, the largest first."""
    found = [
        Share("chunks", cache.usage(), True),
        Share("quarantine", blocks_below(cache.root / "quarantine"), True),
    ]
    if cache.root == state_folder() / "cache":
        home = cache.root.parent
        found += [Share(NAMES[name], blocks_below(home / name), True) for name in COUNTED]
        found.append(Share("store", blocks_below(home / "store"), False))
    yield from sorted(found, key=lambda share: (not share.counts, -share.bytes))


def models(cache: Cache) -> list[CachedModel]:
    """List what is cached by model, least recently used first. A file that several models share counts for the first only."""
    pinned = reserved_by_others(cache.root)[1]
    left = {lock.parent.name: lock for lock in cache.root.glob("images/*/*/lock")}
    found = []
    for digest, manifest in local_manifests(cache):
        own = dict.fromkeys(file.digest for file in manifest.files if file.digest in left)
        model = CachedModel(digest, shown_url(manifest.source))
        for name in own:
            _count(model, left.pop(name), name in pinned)
        if model.files:
            found.append(model)
    others = CachedModel("", "")
    for name, lock in left.items():
        _count(others, lock, name in pinned)
    return sorted([*found, others] if others.files else found, key=lambda model: model.used)


def _count(model: CachedModel, lock: Path, pinned: bool) -> None:
    with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
        model.bytes += (lock.parent / "data").stat().st_blocks * 512
        model.used = max(model.used, lock.stat().st_mtime)
        model.files += 1
        model.pinned |= pinned
        model.locks.append(lock)


def local_manifests(cache: Cache) -> Iterator[tuple[str, Manifest]]:
    """Yield the intact manifests beside the cache: copies from stores, and those of sources that are read in place."""
    for folder, local in ((cache.root / "manifests", False), (source_folder(cache.root), True)):
        for file in sorted(folder.glob("*")):
            if is_digest(file.name):
                with contextlib.suppress(Integrity, FileNotFoundError):
                    yield file.name, decode(file.read_bytes(), file.name, local=local)


@dataclass(frozen=True)
class Pruned:
    """Result of `prune`, in bytes of disk; `left`: what chunks still occupy; `records`: how many records of manifests went."""

    chunks: int
    quarantine: int
    left: int
    records: int


def prune(cache: Cache, to: int, *, older_than: float = 0.0, dry_run: bool = False) -> Pruned:
    """Remove quarantined bodies, then cached files that no living mount uses, least recently used first, down to `to` bytes, then
    records that nothing needs (`lazyfs.admin.records`).

    `older_than`: only files last used before that time (seconds since the epoch; 0: any). `dry_run` only counts.
    """
    quarantine = blocks_below(cache.root / "quarantine")
    usage = cache.usage()
    chunks = cache.evict(max(0, usage - to), older_than=older_than, dry_run=dry_run)
    if not dry_run:
        cache.clear_quarantine()
    records = 0
    for record in unneeded(cache):
        records += 1
        if not dry_run:
            record.unlink(missing_ok=True)
    return Pruned(chunks, quarantine, usage - chunks, records)


def prune_target(cache: Cache) -> int:
    """Return the bytes of chunks that the bound of the cache allows now."""
    usage, bound, disk = cache.usage(), cache.bound, shutil.disk_usage(cache.root)
    if bound == UNBOUNDED:
        return usage
    over = kept_free(disk.total) - disk.free if bound == AUTO else cache.counted() - bound
    return max(0, usage - max(0, over))
