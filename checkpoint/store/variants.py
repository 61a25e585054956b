"""One snapshot of a launch for each kind of host, in one store.

    refs/snapshots/NAME          the one pushed last: what an older quickthaw finds, and who asks by name
    refs/snapshots/NAME@CLASS    the one taken on a host of that class (checkpoint.compatibility.host_class)

A host takes the first that it may restore: of its own class, the one pushed last, any other one, the newest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import Incompatible
from checkpoint.store.archive import OpenedArchive

if TYPE_CHECKING:
    from lazyfs.content.chunk_store import ChunkStore

Accept = Callable[[bytes, bytes | None], object]
"""Receives a snapshot's manifest and its signature file, and raises Incompatible if this host may not restore it."""
MOST = 16
"""Most other classes' snapshots of one launch that are looked at: each costs round trips."""


def reference(name: str, host: str) -> str:
    """Return the store's name of the snapshot `name` of a host's class; `name` itself without one."""
    return f"{name}:{host}" if host else name


def split(reference: str) -> tuple[str, str]:
    """Return the snapshot's name and the host's class, "" if the store's name has none."""
    name, _, host = reference.partition(":")
    return name, host


def open_fitting(
    name: str, chunks: ChunkStore, host: str = "", accept: Accept | None = None, trust_keys: Sequence[Path] = ()
) -> OpenedArchive:
    """Open the archive of a snapshot that this host, of class `host`, may restore, as far as `accept` says.

    Raises what `accept` raised of the first one if it refuses all, what `OpenedArchive.of` raises, and the store's errors.
    """
    from lazyfs.errors import NotFound

    refused: Incompatible | None = None
    seen = set()
    for one in _references(name, chunks, host):
        try:
            digest = chunks.get_ref("snapshots", one)
        except NotFound:
            if one == name and refused is None:
                raise
            continue
        if digest in seen:
            continue
        seen.add(digest)
        opened = OpenedArchive.of(digest, chunks, trust_keys)
        opened.check_name(name)
        try:
            if accept:
                accept(opened.document, opened.signature)
        except Incompatible as error:
            refused = refused or error
            continue
        return opened
    assert refused is not None
    raise refused


def _references(name: str, chunks: ChunkStore, host: str) -> Iterator[str]:
    """Yield the names to look at, in this order. The store is listed only if the first two do not fit."""
    from lazyfs.errors import Permanent

    if host:
        yield reference(name, host)
    yield name
    try:
        listed = list(chunks.store.list("refs/snapshots/"))
    except Permanent:  # a web server cannot be listed
        return
    key = chunks.ref_key("snapshots", reference(name, "x")).removesuffix("x")
    others = sorted((info for info in listed if info.key.startswith(key)), key=lambda info: -info.modified)
    for info in others[:MOST]:
        yield reference(name, info.key.removeprefix(key))
