"""Remove old snapshots from a store that many hosts use, while they pull from it and push to it.

Two steps, an hour (`grace_s`) apart:

1. Names go: those that are neither among the newest of their group nor young. Whoever looks now does not find them.
2. Archives without a name go, once a mark (`gc/nameless/DIGEST`) has said so for that long, and with them every chunk that no
   other archive or model uses. A pull that had begun before step 1 ends meanwhile; one that takes longer finds a chunk missing.

A group is what is made anew when something changes: the snapshots of one model for one kind of host, `vllm-llama-…` of `x86_64-6.8-…`.
A push in progress loses nothing: its chunks are young, or touched (lazyfs.admin.gc), its name is looked at again just before it would
go, an archive that gets a name again loses its mark, and what a launch has claimed (checkpoint.store.claim) stays.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from checkpoint.store import claim, variants
from checkpoint.store.upload import NAMELESS, translate_errors
from lazyfs.admin import gc
from lazyfs.admin.listing import named_manifests, store_lock
from lazyfs.content.chunk_store import GRACE_S as YOUNG_S
from lazyfs.errors import Integrity, NotFound
from lazyfs.stores.urls import shown_url

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore

GRACE_S = 3600.0
_REFS = "refs/snapshots/"
_KEY = re.compile(r"-[0-9a-f]{10}$")
_COMPILED = re.compile(r"compile-\w+-[0-9a-f]{16}")
_DEAD_CLAIM_S = 3600.0


@dataclass
class Retired:
    """What was removed, or would be: names; `archives` with their `chunks` and `bytes` as stored. `waiting`: archives with grace left."""

    names: list[str] = field(default_factory=list)
    archives: int = 0
    chunks: int = 0
    bytes: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class _Name:
    """A name of the store, its archive, and when it was set: seconds of the store's clock, and the object's version."""

    name: str
    digest: str
    key: str
    modified: float
    version: str


def retire(
    chunks: ChunkStore,
    *,
    keep: int = 1,
    older_than_s: float = 0.0,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    young_s: float = YOUNG_S,
) -> Retired:
    """Remove what is neither among the `keep` newest of its group nor younger than `older_than_s`; see the module's docstring.

    Compile caches go by age alone, and only with `older_than_s`. `young_s`: chunks and archives younger than this stay. `dry_run`:
    nothing is changed, and archives and bytes are what both steps would free. Raises Busy (archive-store-busy) during a push
    to a local store, Integrity for a damaged name or archive, NotFound or Failed for what is no store that can be listed and written.
    """
    with translate_errors(f"cannot clean up {shown_url(chunks.store.url)}"):
        now = time.time()
        with store_lock(chunks, exclusive=not dry_run):
            names = _names(chunks)
            doomed = _doomed(names, _claimed(chunks, now, dry_run), keep, now - older_than_s, bool(older_than_s))
            gone = [one for one in doomed if dry_run or _remove(chunks, one, names)]
            done = Retired(sorted(one.name for one in gone))
            left = {one.digest for one in names} - {one.digest for one in gone}
            ready, done.waiting = _nameless(chunks, now, grace_s, left, dry_run)
        collected = gc.collect(chunks, grace_s=young_s, doomed=ready, dry_run=dry_run)
        if not dry_run:
            for digest in ready:
                if not chunks.has_manifest(digest):
                    chunks.store.delete(NAMELESS + digest)
        done.archives, done.chunks, done.bytes = collected.manifests, collected.chunks, collected.bytes
        return done


def _names(chunks: ChunkStore) -> list[_Name]:
    """Return the names of all snapshots and compile caches. Raises Integrity for a damaged one: its archive would count as nameless."""
    good, broken = named_manifests(chunks)
    for (_, name), why in broken.items():
        raise Integrity(f"{name}: {why}")
    found = []
    for info in chunks.store.list(_REFS):
        name = info.key.removeprefix(_REFS).replace("@", ":")
        if digest := good.get(("snapshots", name)):  # one that was pushed since the listing above is young
            found.append(_Name(name, digest, info.key, info.modified, info.version))
    return found


def _claimed(chunks: ChunkStore, now: float, dry_run: bool) -> set[str]:
    """Return the names that launches are making now. Remove claims whose holders ended long ago."""
    found = set()
    for info in chunks.store.list(claim.PREFIX):
        age = abs(now - info.modified)
        if age < claim.EXPIRES_S:
            found.add(info.key.removeprefix(claim.PREFIX).replace("@", ":"))
        elif age > _DEAD_CLAIM_S and not dry_run:
            chunks.store.delete(info.key)
    return found


def _doomed(names: Iterable[_Name], claimed: set[str], keep: int, before: float, by_age: bool) -> list[_Name]:
    names = list(names)
    of_hosts = {variants.split(one.name)[0] for one in names if variants.split(one.name)[1]}
    groups: dict[tuple[str, str], list[_Name]] = {}
    doomed = []
    for one in names:
        name, host = variants.split(one.name)
        if name in of_hosts and not host:
            continue  # follows those of its hosts
        if _COMPILED.fullmatch(name):
            doomed += [one] if by_age else []
        else:
            groups.setdefault((_KEY.sub("", name), host), []).append(one)
    for group in groups.values():
        doomed += sorted(group, key=lambda one: (-one.modified, one.name))[keep:]
    return [one for one in doomed if one.modified <= before and not {one.name, variants.split(one.name)[0]} & claimed]


def _remove(chunks: ChunkStore, one: _Name, names: list[_Name]) -> bool:
    """Remove a name that was not set anew since it was listed. The plain name then means the newest kind of host that is left, or goes."""
    now = chunks.store.head(one.key)
    if now is None or now.version != one.version:
        return False
    chunks.store.delete(one.key)
    names.remove(one)
    name, host = variants.split(one.name)
    plain = next((other for other in names if other.name == name), None)
    if not host or plain is None or plain.digest != one.digest:
        return True
    now = chunks.store.head(plain.key)
    if now is not None and now.version == plain.version:
        others = [other for other in names if variants.split(other.name)[0] == name and other is not plain]
        if others:
            newest = max(others, key=lambda other: other.modified)
            chunks.set_ref("snapshots", name, newest.digest)
        else:
            chunks.store.delete(plain.key)
        names.remove(plain)
    return True


def _nameless(chunks: ChunkStore, now: float, grace_s: float, named: set[str], dry_run: bool) -> tuple[set[str], int]:
    """Return the archives whose grace is over, and the number of those that still have some. Mark those found nameless for the first time.

    `named`: what keeps a name, for a dry run; else the names are read again.
    """
    if not dry_run:
        named = set(named_manifests(chunks)[0].values())
    marks = {info.key.removeprefix(NAMELESS): info for info in chunks.store.list(NAMELESS)}
    ready, waiting = set(), 0
    for digest in chunks.manifests():
        mark = marks.pop(digest, None)
        if digest in named or not _is_archive(chunks, digest):
            if mark is not None and not dry_run:
                chunks.store.delete(mark.key)
            continue
        if mark is None and not dry_run:
            chunks.store.put(NAMELESS + digest, msgspec.json.encode({"at": int(now)}))
        if dry_run or grace_s == 0 or (mark is not None and now - mark.modified >= grace_s):
            ready.add(digest)
        else:
            waiting += 1
    for mark in marks.values() if not dry_run else ():
        chunks.store.delete(mark.key)
    return ready, waiting


def _is_archive(chunks: ChunkStore, digest: str) -> bool:
    try:
        return chunks.get_manifest(digest).kind not in ("weights", "source")
    except NotFound:  # removed since it was listed
        return False
