"""The digests of a read-through source, recorded when a chunk is first read and checked from then on."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lazyfs.chunkstore import digest_of
from lazyfs.manifest import File
from lazyfs.paths import private_dir

_DIGEST = 32


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

    def record(self, file: File, index: int, data: bytes | memoryview) -> None:
        """Remember the digest of a chunk that was read for the first time."""
        os.pwrite(self._fd(file), bytes.fromhex(digest_of(data)), index * _DIGEST)

    def _fd(self, file: File) -> int:
        with self._lock:
            fd = self._open.get(file.digest)
            if fd is None:
                path = private_dir(self.folder) / file.digest
                fd = self._open[file.digest] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            return fd
