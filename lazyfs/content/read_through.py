"""Describe an unconverted model directory or object prefix so that it can be read in place.

The manifest has no chunk digests. It names each file's version (an etag, or the stat fields that change with any write), so
a changed source gives a different manifest. The digest of a chunk is recorded at its first read, and every later read must
match it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lazyfs.content.chunk_store import HEADS
from lazyfs.content.chunking import ReadAt, chunk_lengths
from lazyfs.content.importer import walk
from lazyfs.content.manifest import VERSION, Chunk, Directory, File, Manifest
from lazyfs.errors import NotFound, Permanent, os_errors
from lazyfs.paths import fingerprint, open_fd
from lazyfs.stores import ObjectInfo, Store, opened
from lazyfs.stores.retry import RetryPolicy, retrying
from lazyfs.stores.urls import local_path, normal_url

# Most safetensors headers fit in one request of this size.
_HEADER = 256 << 10
# Largest sum of sizes, in bytes. A list entry of each 8 MiB is kept in memory, and a server may name any size.
_MOST = 16 << 40


def describe(url: str, known: Manifest | None = None) -> Manifest:
    """Return the manifest of the directory or prefix at `url`. Reads only listings and safetensors headers.

    `known`: an earlier manifest of the same URL; headers of files that have not changed since are not read again. Raises
    NotFound, Permanent (name-clash, no-version, too-large), what `walk` raises, or what the store raises.
    """
    url = normal_url(url)
    folder = local_path(url)
    if folder is not None:
        return _describe_folder(folder, url)
    with opened(url) as store:
        return _describe_objects(store, url, known)


def _describe_objects(store: Store, url: str, known: Manifest | None) -> Manifest:
    found = {info.key.rstrip("/"): info for info in retrying(lambda: list(store.list("")), RetryPolicy())}
    # The URL of this very commit or artifact, where the store has such.
    url = str(getattr(store, "pinned", url))
    if url.startswith("hf://"):
        from lazyfs.stores.hub import read_by_engines

        found = {key: found[key] for key in read_by_engines(found)}
    return _describe_prefix(store, url, found, known)


def _describe_folder(folder: Path, url: str) -> Manifest:
    listing = walk(folder)
    files = []
    for path, source, st in listing.files:
        with os_errors(f"cannot read {source}"), open_fd(source, os.O_RDONLY) as fd:
            lengths = chunk_lengths(path, st.st_size, _reader(fd))
        version = "-".join(map(str, fingerprint(st)))
        chunks = tuple(Chunk("", n) for n in lengths)
        files.append(File(path, st.st_mode & 0o7777, st.st_size, chunks, version))
    directories, links = tuple(listing.directories), tuple(listing.symlinks)
    return Manifest(VERSION, "source", directories, tuple(files), links, {}, url)


def _describe_prefix(store: Store, url: str, found: dict[str, ObjectInfo], known: Manifest | None) -> Manifest:
    folders = {key[:at] for key in found for at, letter in enumerate(key) if letter == "/"}
    folders |= {
        key for key, info in found.items() if key and info.size == 0 and _is_marker(store, info.key, key in folders)
    }
    objects = []
    for key, info in found.items():
        if not key or (key in folders and info.size == 0):
            continue
        if key in folders:
            raise Permanent(f"{url}: {key} is both an object and a folder; rename one of them", code="name-clash")
        if not info.version:
            raise Permanent(f"{url}: the store has no version for {key}; import the model instead", code="no-version")
        objects.append((key, info))
    if not objects:
        raise NotFound(f"no objects under {url}; check the URL")
    if min(info.size for _, info in objects) < 0 or sum(info.size for _, info in objects) > _MOST:
        raise Permanent(
            f"{url}: the sizes of its files are no model's (at most {_MOST} bytes in all)", code="too-large"
        )
    files = _described(store, objects, known)
    directories = tuple(Directory(p, 0o755) for p in sorted(folders))
    return Manifest(VERSION, "source", directories, tuple(sorted(files, key=lambda f: f.path)), (), {}, url)


def _described(store: Store, objects: Iterable[tuple[str, ObjectInfo]], known: Manifest | None) -> list[File]:
    """Return the objects as files, reading the headers that are not known yet, many at once: each is all round trip."""
    before = {(f.path, f.size, f.version): f.chunks for f in known.files} if known is not None else {}

    def one(item: tuple[str, ObjectInfo]) -> File:
        key, info = item
        chunks = before.get((key, info.size, info.version))
        if chunks is None:
            lengths = chunk_lengths(key, info.size, _object_reader(store, info.key, info.size))
            chunks = tuple(Chunk("", n) for n in lengths)
        return File(key, 0o644, info.size, chunks, info.version)

    with ThreadPoolExecutor(HEADS) as pool:
        return list(pool.map(one, objects))


def _is_marker(store: Store, key: str, is_folder: bool) -> bool:
    """Return whether an empty object stands for a folder, as cloud consoles create them ("name/").

    Listings may drop the trailing slash.
    """
    return is_folder or key.endswith("/") or retrying(lambda: store.head(key), RetryPolicy()) is None


def _reader(fd: int) -> ReadAt:
    return lambda at, n: os.pread(fd, n, at)


def _object_reader(store: Store, key: str, size: int) -> ReadAt:
    """Return a function that reads the header of an object, with one request unless the header is long."""
    head = b""

    def read(at: int, n: int) -> bytes:
        nonlocal head
        if not head:
            head = bytes(retrying(lambda: store.get(key, 0, min(size, _HEADER)), RetryPolicy()))
        if at + n > len(head):
            return bytes(retrying(lambda: store.get(key, at, n), RetryPolicy()))
        return head[at : at + n]

    return read
