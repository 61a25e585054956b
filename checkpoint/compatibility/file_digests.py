"""Digests of files, cached between starts, so that a large file is read only once until it changes.

A file counts as unchanged while its fingerprint is the one it had when it was hashed, at least RACY_NS after its last
change (checkpoint.files). The cache is one file in the state folder. If it is lost, files are read again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import blake3
import msgspec

from checkpoint.files import RACY_NS, Fingerprint, fingerprint, private_folder, write_private
from lazyfs.content.records import ready

SMALL = 64 << 10
"""Files up to this many bytes are read each time, which takes no longer than a cache look-up."""
FILES_LIMIT = 10_000
"""Most files read in one folder; a larger folder is not a model, tokenizer or adapter."""
_KEPT = 4096
_DEPTH = 32

_Entries = dict[str, tuple[Fingerprint, str]]
"""By device and inode: the fingerprint when hashed, and the digest."""


class FileDigests:
    """Digests of files and folders.

    `cache` is the cache file for large files, None for no cache. Call `save` at the end.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache
        self._entries: _Entries | None = None
        self._new: _Entries = {}

    def of_file(self, path: Path) -> str:
        """Return the digest of a file's content; links are followed. Raises OSError."""
        info = path.stat()
        if info.st_size <= SMALL:
            return blake3.blake3(path.read_bytes()).hexdigest()[:32]
        key, before = f"{info.st_dev}-{info.st_ino}", fingerprint(info)
        known = self._new.get(key) or self._known().get(key)
        if known and known[0] == before:
            return known[1]
        from checkpoint.snapshot.digests import digest_file

        began = time.time_ns()
        digest = digest_file(path.resolve(), info.st_size)[:32]
        if fingerprint(path.stat()) == before and info.st_ctime_ns + RACY_NS <= began:
            self._new[key] = (before, digest)
        return digest

    def of_folder(self, path: Path, endings: tuple[str, ...] = ("",)) -> str | None:
        """Return the digest of all files below a folder whose names end so, by relative name; links are followed.

        Return "" for none, and None above FILES_LIMIT files of any name.
        """
        digest, empty = blake3.blake3(), True
        for count, (name, file) in enumerate(sorted(_walk(path))):
            if count >= FILES_LIMIT:
                return None
            if not name.endswith(endings):
                continue
            try:
                found = self.of_file(file)
            except OSError as error:
                found = f"unreadable {error.errno}"  # unreadable for the engine, too
            digest.update(f"{name}\0{found}\n".encode(errors="surrogateescape"))
            empty = False
        return "" if empty else digest.hexdigest()[:32]

    def _known(self) -> _Entries:
        if self._entries is None:
            self._entries = {}
            if self.cache is not None:
                # If it is missing or garbled, hash everything.
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    self._entries = msgspec.json.decode(self.cache.read_bytes(), type=ready(_Entries))
        return self._entries

    def save(self) -> None:
        """Write the cache. Errors are ignored, because a missing cache only costs time."""
        if self.cache is None or not self._new:
            return
        entries = {**self._known(), **self._new}
        entries = dict(list(entries.items())[-_KEPT:])
        with contextlib.suppress(OSError):
            private_folder(self.cache.parent)
            write_private(self.cache, msgspec.json.encode(entries))
            self._entries, self._new = entries, {}


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield regular files below a folder with their relative names, at most FILES_LIMIT + 1.

    `__pycache__` is skipped.
    """
    todo = [(root, "", 0)]
    seen = 0
    while todo:
        folder, prefix, depth = todo.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError:
            yield f"{prefix}unreadable", folder
            continue
        for entry in entries:
            name = f"{prefix}{entry.name}"
            try:
                kind = entry.stat().st_mode
            except OSError:
                yield name, Path(entry.path)  # a dangling link
                continue
            if stat.S_ISDIR(kind) and depth < _DEPTH and entry.name != "__pycache__":
                todo.append((Path(entry.path), f"{name}/", depth + 1))
            elif stat.S_ISREG(kind):
                seen += 1
                yield name, Path(entry.path)
            if seen > FILES_LIMIT:
                return
