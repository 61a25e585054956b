"""Record the chunk digests of a read-through source at first read, and look them up afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from lazyfs.content.chunk_store import digest_of
from lazyfs.content.manifest import File
from lazyfs.paths import open_fd, private_dir

_DIGEST = 32


class DigestLog:
    """Known digests: one file of 32-byte records per source file. A record of zeros is unknown."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def expected(self, file: File, index: int) -> str:
        """Return the digest recorded for the chunk, or ""."""
        try:
            with open_fd(self.folder / file.digest, os.O_RDONLY) as fd:
                raw = os.pread(fd, _DIGEST, index * _DIGEST)
        except FileNotFoundError:
            return ""
        return raw.hex() if any(raw) and len(raw) == _DIGEST else ""

    def record(self, file: File, index: int, data: bytes | memoryview) -> None:
        """Record the digest of a chunk at its first read."""
        with open_fd(private_dir(self.folder) / file.digest, os.O_WRONLY | os.O_CREAT) as fd:
            os.pwrite(fd, bytes.fromhex(digest_of(data)), index * _DIGEST)

    def forget(self, file: File) -> None:
        """Remove what is recorded of the file."""
        (self.folder / file.digest).unlink(missing_ok=True)
