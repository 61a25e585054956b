"""List a store's contents and remove names from it; also the lock shared with imports and collections."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lazyfs.content.chunk_store import HEADS, ChunkStore
from lazyfs.content.manifest import Manifest
from lazyfs.errors import Busy, Integrity, NotFound, Usage, os_errors
from lazyfs.paths import open_fd, private_dir
from lazyfs.stores.local import LocalStore
from lazyfs.stores.retry import RetryPolicy, retry_damaged, retrying


@contextlib.contextmanager
def store_lock(chunks: ChunkStore, *, exclusive: bool) -> Iterator[None]:
    """Lock a local store: shared for imports, exclusive for garbage collection. No effect on remote stores.

    Raises Busy (store-busy) instead of waiting.
    """
    if not isinstance(chunks.store, LocalStore):
        yield
        return
    path = private_dir(chunks.store.root) / ".lock"
    with contextlib.ExitStack() as held:
        with os_errors(f"cannot lock {path}"):
            fd = held.enter_context(open_fd(path, os.O_RDWR | os.O_CREAT))
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            other = "an import is" if exclusive else "a garbage collection is"
            raise Busy(f"{other} running on {chunks.store.url}; try again later", code="store-busy") from None
        yield


@dataclass(frozen=True)
class Entry:
    """One manifest of a store.

    `names`: its tags and snapshot names. `unshared`: bytes that no other manifest uses. `damage`: why a damaged manifest
    could not be read, or why a name has no manifest (`manifest` is then empty).
    """

    manifest: str
    kind: str
    names: tuple[str, ...]
    files: int = 0
    size: int = 0
    unshared: int = 0
    damage: str = ""


def listing(chunks: ChunkStore) -> list[Entry]:
    """List all manifests: named ones first, damaged ones last."""
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


def unreferenced_chunks(chunks: ChunkStore) -> tuple[int, int]:
    """Return the number of chunks and their bytes in a store without manifests."""
    sizes = [info.size for info in chunks.store.list("chunks/")]
    return len(sizes), sum(sizes)


def named_manifests(
    chunks: ChunkStore, manifests: set[str] | None = None
) -> tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]]:
    """Resolve all tags and snapshot names by (kind, name), without those that others remove meanwhile.

    Return the digests of intact ones, and the reasons why others are broken. A name is intact if it points at one of
    `manifests` (if given), or at a manifest that exists by now.
    """
    good, broken = {}, {}
    for kind in ("tags", "snapshots"):
        for name in chunks.ref_names(kind):
            try:
                digest = _digest_of(chunks, kind, name, manifests)
            except NotFound:
                continue
            except Integrity as error:
                broken[kind, name] = str(error)
                continue
            except Usage:
                broken[kind, name] = f"not a valid name; `quickthaw weights rm {shlex.quote(name)}` removes it"
                continue
            good[kind, name] = digest
    return good, broken


def _digest_of(chunks: ChunkStore, kind: str, name: str, manifests: set[str] | None) -> str:
    """Return the manifest of a name, which is one of `manifests` (if given) or exists by now.

    Raises NotFound if the name is removed meanwhile, Integrity if it is damaged or has no manifest.
    """
    before = ""
    while True:
        digest = chunks.get_ref(kind, name)
        # A manifest imported after the listing is not in `manifests`.
        if manifests is None or digest in manifests or chunks.has_manifest(digest):
            return digest
        if digest == before:
            lost = f"names manifest {digest[:12]}, which does not exist"
            raise Integrity(f"{lost}; import it again, or `quickthaw weights rm {name}`")
        before = digest  # it may have gone together with its name, or been replaced: read the name once more


def complete(chunks: ChunkStore, digest: str) -> bool:
    """Return whether the store has the intact manifest and all its chunks, in plausible sizes.

    Reads no chunk.
    """
    try:
        manifest = retry_damaged(lambda: retrying(lambda: chunks.get_manifest(digest), RetryPolicy()))
    except (Integrity, NotFound):
        return False
    lengths = {c.digest: c.length for f in manifest.files for c in f.chunks}
    if not chunks.store.remote:
        return all(chunks.has(*item) for item in lengths.items())
    with ThreadPoolExecutor(HEADS) as pool:
        return all(pool.map(lambda item: retrying(lambda: chunks.has(*item), RetryPolicy()), lengths.items()))


def remove(chunks: ChunkStore, name: str) -> list[str]:
    """Remove a tag or snapshot name, and the manifest if no name is left; given a digest, all its names and the manifest.

    A snapshot's name also stands for the names NAME:HOST, one for each kind of host that has made it (checkpoint.store.variants),
    unless there is a tag of that name: it comes first, as in `ChunkStore.resolve`.
    A damaged name is removed alone. Chunks stay until garbage is collected. Returns what was removed. Raises NotFound.
    """
    good, broken = named_manifests(chunks)
    full = name if ":" in name else f"{name}:latest"
    for kind, ref in broken:
        if ref in (name, full):
            # Not delete_ref, which rejects an invalid name.
            chunks.store.delete(chunks.ref_key(kind, ref))
            return [f"{kind[:-1]} {ref}"]
    removed = []
    digest = "" if ("tags", full) in good else good.get(("snapshots", name), "")
    if ("tags", full) not in good:
        for ref in [ref for kind, ref in good if kind == "snapshots" and ref.startswith(f"{name}:")]:
            removed += remove(chunks, ref)
            del good["snapshots", ref]
        if removed and not digest:  # its own name went before, for example a damaged one
            return removed
    digest = digest or chunks.resolve(name)
    by_digest = digest.startswith(name)
    # A damaged name may have pointed at this manifest: then only its digest removes it.
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
        raise NotFound(f"no manifest {digest[:12]} in {chunks.store.url}; `quickthaw weights ls` lists its manifests")
    if there and not others:
        chunks.delete_manifest(digest)
        removed.append(f"manifest {digest}")
    return removed
