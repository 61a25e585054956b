"""Looking after a store and a cache: listing, verifying, removing. (Collecting garbage: `lazyfs.collection`.)"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from lazyfs.cache import PRESENT, UNPROVEN, Cache
from lazyfs.chunkstore import HEADS, ChunkStore, chunk_key, digest_of, mismatch
from lazyfs.errors import Busy, DiskFull, Integrity, LazyfsError, NotFound, Permanent, Usage, from_os_error
from lazyfs.manifest import RAW, ZSTD, Chunk, File, Manifest, decode, is_digest
from lazyfs.paths import private_dir
from lazyfs.retry import RetryPolicy, certain, retrying
from lazyfs.stores.local import LocalStore

_WORKERS = 4


@contextlib.contextmanager
def store_lock(chunks: ChunkStore, *, exclusive: bool) -> Iterator[None]:
    """Imports share it, collection has it alone (local stores only). Busy instead of waiting."""
    if not isinstance(chunks.store, LocalStore):
        yield
        return
    path = private_dir(chunks.store.root) / ".lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_os_error(error, f"cannot lock {path}") from error
    try:
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            other = "an import is" if exclusive else "a garbage collection is"
            raise Busy(f"{other} running on {chunks.store.url}; try again after it", code="store-busy") from None
        yield
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Entry:
    """One manifest of a store. `names` are its tags and snapshot names; `unshared` bytes are in no other manifest. `damage`
    says why nothing more is known of a damaged one, or of a name that leads to none (`manifest` is then empty)."""

    manifest: str
    kind: str
    names: tuple[str, ...]
    files: int = 0
    size: int = 0
    unshared: int = 0
    damage: str = ""


def listing(chunks: ChunkStore) -> list[Entry]:
    """All manifests, named ones first; the damaged ones at the end."""
    stored = list(chunks.manifests())
    good, broken = named_manifests(chunks, set(stored))
    names: dict[str, list[str]] = {}
    for (_, name), digest in good.items():
        names.setdefault(digest, []).append(name)
    manifests: dict[str, Manifest] = {}
    damaged = [Entry("", "damaged", (name,), damage=why) for (_, name), why in broken.items()]
    for digest in stored:
        try:
            manifests[digest] = chunks.get_manifest(digest)
        except Integrity as error:
            damaged.append(Entry(digest, "damaged", tuple(sorted(names.get(digest, ()))), damage=str(error)))
    users: dict[str, int] = {}
    for manifest in manifests.values():
        for digest in manifest.chunk_digests():
            users[digest] = users.get(digest, 0) + 1
    entries = []
    for digest, manifest in manifests.items():
        lengths = {c.digest: c.length for f in manifest.files for c in f.chunks}
        unshared = sum(length for d, length in lengths.items() if users.get(d) == 1)
        called = tuple(sorted(names.get(digest, ())))
        entries.append(Entry(digest, manifest.kind, called, len(manifest.files), manifest.size, unshared))
    return sorted(entries, key=lambda e: (not e.names, e.names, e.manifest)) + damaged


def unnamed(chunks: ChunkStore) -> tuple[int, int]:
    """Of a store without manifests: how many chunks lie in it all the same, and their bytes."""
    sizes = [info.size for info in chunks.store.list("chunks/")]
    return len(sizes), sum(sizes)


def named_manifests(
    chunks: ChunkStore, manifests: set[str] | None = None
) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]:
    """Of all tags and snapshots, by (kind, name): what the sound ones name, and why the others name nothing. Of `manifests`, if
    they are given, a sound one names one."""
    good, broken = {}, {}
    for kind in ("tags", "snapshots"):
        for name in chunks.ref_names(kind):
            try:
                digest = chunks.get_ref(kind, name)
            except Integrity as error:
                broken[kind, name] = str(error)
                continue
            except Usage:
                broken[kind, name] = f"nothing can be called so; `quickthaw weights rm {name}` removes it"
                continue
            # One that was imported since they were listed is not among them.
            if manifests is None or digest in manifests or chunks.has_manifest(digest):
                good[kind, name] = digest
            else:
                lost = f"names manifest {digest[:12]}, which is not there"
                broken[kind, name] = f"{lost}; bring it back, or `quickthaw weights rm {name}`"
    return good, broken


def complete(chunks: ChunkStore, digest: str) -> bool:
    """Whether the store has the manifest, sound, and each of its chunks in a size that can be right. No chunk is read."""
    try:
        manifest = certain(lambda: retrying(lambda: chunks.get_manifest(digest), RetryPolicy()))
    except (Integrity, NotFound):
        return False
    lengths = {c.digest: c.length for f in manifest.files for c in f.chunks}
    if not chunks.store.remote:
        return all(chunks.has(*item) for item in lengths.items())
    with ThreadPoolExecutor(HEADS) as pool:
        return all(pool.map(lambda item: retrying(lambda: chunks.has(*item), RetryPolicy()), lengths.items()))


@dataclass
class Damage:
    """What `verify` found. `bad` chunks are damaged, `missing` ones are not there; both by digest, with a path. `broken_names`:
    tags and snapshots that lead to no manifest, and why. `cache_skipped`: images that a full disk keeps from being opened."""

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


def verify(
    chunks: ChunkStore,
    digests: list[str] | None = None,
    *,
    repair: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Damage:
    """Read and hash every chunk that the manifests (default: all, and then all names too) mention; what does not match is read
    once more before it counts as damaged. `repair` deletes damaged ones, so that the next import writes them again. Errors
    other than damage (a store that cannot be reached) are raised."""
    report = Damage()
    wanted: dict[str, tuple[Chunk, str]] = {}
    if digests is None:
        digests = list(chunks.manifests())
        _, broken = named_manifests(chunks, set(digests))
        report.broken_names = {f"{kind.removesuffix('s')} {name}": why for (kind, name), why in broken.items()}
    for digest in digests:
        try:
            manifest = certain(partial(retrying, partial(chunks.get_manifest, digest), RetryPolicy()))
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
            certain(lambda: retrying(lambda: chunks.get(chunk.digest, chunk.length, chunk.encoding), RetryPolicy()))
        except (Integrity, Permanent) as error:
            # A disk that cannot read it has damaged it; missing rights are about the whole store.
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
        if progress is not None:
            progress(report.chunks, len(wanted))

    with ThreadPoolExecutor(_WORKERS) as pool:
        for _ in pool.map(one, wanted.values()):
            pass
    return report


def verify_cache(cache: Cache, chunks: ChunkStore | None, report: Damage, digests: list[str] | None = None) -> None:
    """Hash every present chunk of every image whose manifest is known (see `known_manifests`); damaged ones become absent,
    to be fetched again.
    """
    seen: set[str] = set()
    for manifest in known_manifests(cache, chunks, digests):
        for file in manifest.files:
            if file.digest in seen or file.version or not (cache.folder(file) / "have").exists():
                continue
            seen.add(file.digest)
            _verify_image(cache, file, report)


def _verify_image(cache: Cache, file: File, report: Damage) -> None:
    try:
        image = cache.open(file)
    except DiskFull:
        report.cache_skipped += 1
        return
    try:
        for index, chunk in enumerate(file.chunks):
            if image.state(index) not in (PRESENT, UNPROVEN):
                continue
            report.cache_chunks += 1
            data = image.read(index)
            if digest_of(data) == chunk.digest:
                image.mark(index, PRESENT)
            else:
                report.cache_bad += 1
                image.mark(index, 0)
                why = f"chunk {index} of {file.path}, in the cache of this host: {mismatch(data, chunk.digest, chunk.length)}"
                cache.quarantine(chunk.digest, data, why)
    finally:
        image.close()


def known_manifests(cache: Cache, chunks: ChunkStore | None, digests: list[str] | None = None) -> Iterator[Manifest]:
    """Manifests copied beside the cache, then those of the store (`digests`, or all that it lists); damaged ones are passed
    over (`verify` names them).
    """
    for copy in sorted((cache.root / "manifests").glob("*")):
        if is_digest(copy.name):
            with contextlib.suppress(Integrity):
                yield decode(copy.read_bytes(), copy.name)
    if chunks is not None:
        for digest in digests if digests is not None else chunks.manifests():
            with contextlib.suppress(LazyfsError):
                yield chunks.get_manifest(digest)


def remove(chunks: ChunkStore, name: str) -> list[str]:
    """Remove a tag or snapshot name, and the manifest when no name is left; by digest: all its names and the manifest.

    A damaged name goes alone. Chunks stay until garbage is collected. Returns what was removed. NotFound.
    """
    good, broken = named_manifests(chunks)
    full = name if ":" in name else f"{name}:latest"
    for kind, ref in broken:
        if ref in (name, full):
            # Not delete_ref: it may be damaged in that nobody can be called so.
            chunks.store.delete(chunks.ref_key(kind, ref))
            return [f"{kind[:-1]} {ref}"]
    digest = chunks.resolve(name)
    removed = []
    by_digest = digest.startswith(name)
    # A damaged name may have meant this manifest: then only who names it by its digest removes it.
    others = 0 if by_digest else len(broken)
    for (kind, ref), target in good.items():
        if target != digest:
            continue
        if by_digest or ref in (name, full):
            chunks.delete_ref(kind, ref)
            removed.append(f"{kind[:-1]} {ref}")
        else:
            others += 1
    there = chunks.has_manifest(digest)
    if not there and not removed:
        raise NotFound(f"no manifest {digest[:12]} in {chunks.store.url}; `quickthaw weights ls` shows what is there")
    if there and not others:
        chunks.store.delete(f"manifests/{digest}")
        removed.append(f"manifest {digest}")
    return removed
