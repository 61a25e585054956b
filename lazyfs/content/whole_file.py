"""Verify a whole file by the digest that its source gives for it: the hub, or a registry. It is the file's version.

A chunk of such a file has no digest of its own. It is served before the file is complete; once the last chunk is there,
the file is hashed, and forgotten if it is not what the source says.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lazyfs.content.manifest import File

_BLOCK = 8 << 20


def hasher(version: str, size: int) -> tuple[Any, str] | None:
    """Return a hash object and the digest (hex) that a file of this version must have; None if the version has no digest."""
    kind, _, expected = version.partition(":")
    if kind == "sha256":
        return hashlib.sha256(), expected
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), expected
    return None


def has_digest(file: File) -> bool:
    """Return whether the source gives a digest of the whole file."""
    return hasher(file.version, file.size) is not None


def hash_of(path: Path) -> str:
    """Return `sha256:HEX` of a file. Raises OSError."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def mismatch_of(file: File, fd: int) -> str:
    """Return why the file's bytes behind a descriptor are not what the source says, or "". Reads them all."""
    found = hasher(file.version, file.size)
    if found is None:
        return ""
    digest, expected = found
    for start in range(0, file.size, _BLOCK):
        digest.update(os.pread(fd, min(_BLOCK, file.size - start), start))
    return _reason(digest.hexdigest(), expected)


def mismatch_in_memory(file: File, data: bytes | memoryview) -> str:
    """Return the same of a file whose bytes are all in `data`."""
    found = hasher(file.version, file.size)
    if found is None:
        return ""
    found[0].update(data)
    return _reason(found[0].hexdigest(), found[1])


def _reason(found: str, expected: str) -> str:
    return "" if found == expected else f"hashes to {found[:12]}, and the source says {expected[:12]}"
