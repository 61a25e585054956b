"""Reading an unconverted model directory or object prefix in place: a manifest without digests, and digests as they
are met.

The manifest names each file's version (an etag, or the stat fields that change with any write), so a changed source is
a different manifest. The digest of a chunk is recorded when it is first read, and every later read of it must match.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lazyfs.chunking import ReadAt, chunk_lengths
from lazyfs.chunkstore import digest_of
from lazyfs.errors import NotFound, Permanent
from lazyfs.importer import walk
from lazyfs.manifest import VERSION, Chunk, Directory, File, Manifest
from lazyfs.paths import private_dir
from lazyfs.retry import RetryPolicy, retrying
from lazyfs.stores import Store, open_store
from lazyfs.urls import local_path, normal_url

_DIGEST = 32


def describe(url: str) -> Manifest:
    """The manifest of the directory or prefix at `url`, read no further than safetensors headers. NotFound,
    Permanent…
    """
    url = normal_url(url)
    folder = local_path(url)
    if folder is not None:
        return _describe_folder(folder, url)
    return _describe_prefix(open_store(url), url)


def _describe_folder(folder: Path, url: str) -> Manifest:
    listing = walk(folder)
    files = []
    for path, source, st in listing.files:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lengths = chunk_lengths(path, st.st_size, _reader(fd))
        finally:
            os.close(fd)
        version = f"{st.st_size}-{st.st_mtime_ns}-{st.st_ctime_ns}-{st.st_ino}"
        chunks = tuple(Chunk("", n) for n in lengths)
        files.append(File(path, st.st_mode & 0o7777, st.st_size, chunks, version))
    directories, links = tuple(listing.directories), tuple(listing.symlinks)
    return Manifest(VERSION, "source", directories, tuple(files), links, {}, url)


def _describe_prefix(store: Store, url: str) -> Manifest:
    files, folders = [], set()
    for info in store.list(""):
        if info.key.endswith("/") or not info.key:
            continue
        if not info.version:
            raise Permanent(f"{url}: the store gives no version for {info.key}; import it instead", code="no-version")
        lengths = chunk_lengths(info.key, info.size, _object_reader(store, info.key))
        files.append(File(info.key, 0o644, info.size, tuple(Chunk("", n) for n in lengths), info.version))
        parts = info.key.split("/")[:-1]
        folders |= {"/".join(parts[: i + 1]) for i in range(len(parts))}
    if not files:
        raise NotFound(f"nothing lies under {url}")
    directories = tuple(Directory(p, 0o755) for p in sorted(folders))
    return Manifest(VERSION, "source", directories, tuple(sorted(files, key=lambda f: f.path)), (), {}, url)


def _reader(fd: int) -> ReadAt:
    return lambda at, n: os.pread(fd, n, at)


def _object_reader(store: Store, key: str) -> ReadAt:
    return lambda at, n: bytes(retrying(lambda: store.get(key, at, n), RetryPolicy()))


def source_origins(manifest: Manifest) -> dict[str, tuple[str, list[int]]]:
    """Where the files of a local source lie, for reading them in place; empty for a remote one."""
    folder = local_path(manifest.source) if manifest.source else None
    if folder is None:
        return {}
    return {f.path: (str(folder / f.path), [int(x) for x in f.version.split("-")]) for f in manifest.files}


class ReadThroughSource:
    """Plain bytes by range from the source, pinned to the version in the manifest."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def fetch(self, file: File, index: int, *, fresh: bool = False) -> bytes:
        """The chunk. Permanent("source-changed") when the source is not the one the manifest describes."""
        length = file.chunks[index].length
        data = self.store.get(file.path, file.offsets[index], length, file.version)
        if len(data) != length:
            raise Permanent(f"{file.path} ends early; the source has changed, mount it again", code="source-changed")
        return data


class DigestLog:
    """The digests met so far, one file of 32-byte records per source file; a record of zeros is not known yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def expected(self, file: File, index: int) -> str:
        """The digest recorded for the chunk, or ""."""
        raw = os.pread(self._fd(file), _DIGEST, index * _DIGEST)
        return raw.hex() if any(raw) and len(raw) == _DIGEST else ""

    def record(self, file: File, index: int, data: bytes) -> None:
        """Remember the digest of a chunk that was read for the first time."""
        os.pwrite(self._fd(file), bytes.fromhex(digest_of(data)), index * _DIGEST)

    def _fd(self, file: File) -> int:
        with self._lock:
            fd = self._open.get(file.digest)
            if fd is None:
                path = private_dir(self.folder) / file.digest
                fd = self._open[file.digest] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return fd
