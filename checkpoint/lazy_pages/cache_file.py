"""The caches beside a snapshot's images: files `.verified-NAME`, each a JSON head and numbers; reading one runs no code.

    BLAKE2b of what follows, 32-bit length of the head, the head, then the sections of raw bytes whose lengths the head
    lists

The name shares the prefix of the verification ledger: such files belong to this host, and archives neither include nor
provide them. The head holds fingerprints of the images, because a wrong offset would put wrong bytes into memory. The
digest finds damage, not malice: readers must check the values as untrusted input. Standard library only.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from threading import get_ident

try:
    from _blake2 import blake2b as blake2b
except ImportError:
    from hashlib import blake2b as blake2b  # identical, but also loads OpenSSL, which delays a restore by 4 ms

TYPE_CHECKING = False  # importing typing would delay a restore by 3 ms
if TYPE_CHECKING:
    from typing import Any

_DIGEST_BYTES = 64

Bytes = bytes | memoryview
Run = tuple[int, int, int]
Stamps = list[list[str | int]]
"""Fingerprints of files: name, device, inode, size, mtime and ctime in ns; a JSON document of itself."""


def path(images: str, name: str) -> str:
    """Return the path of a file beside a folder of images."""
    return os.path.join(os.path.dirname(images.rstrip("/")), name)


def stamps(images: str, prefixes: tuple[str, ...] = ("pagemap-", "mm-")) -> Stamps:
    """Return fingerprints of the files that define where pages lie."""
    with os.scandir(images) as entries:
        return sorted([entry.name, *stamp(entry.stat())] for entry in entries if entry.name.startswith(prefixes))


def stamp(info: os.stat_result) -> list[int]:
    """Return a file's fingerprint, without its name."""
    return [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def write(images: str, name: str, version: int, head: dict[str, Any], sections: Sequence[Bytes]) -> OSError | None:
    """Write a cache atomically. Return the error if that failed: the next restore does without it."""
    lengths = [len(section) for section in sections]
    data = json.dumps({**head, "version": version, "sections": lengths}).encode()
    body = b"".join((struct.pack("<I", len(data)), data, *sections))
    target = path(images, name)
    new = f"{target}.{os.getpid()}.{get_ident()}"  # one process may serve several trees
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(blake2b(body).digest() + body)
            os.replace(new, target)
        except OSError:
            os.unlink(new)
            raise
    except OSError as error:
        return error
    return None


def read(images: str, name: str, version: int) -> tuple[dict[str, Any], list[memoryview]]:
    """Return the head and the sections of a cache.

    Raises OSError if it is missing, ValueError if it is damaged or of another version.
    """
    with open(path(images, name), "rb") as file:
        data = file.read()
    body = memoryview(data)[_DIGEST_BYTES:]
    if blake2b(body).digest() != data[:_DIGEST_BYTES]:
        raise ValueError(f"{name} is damaged")
    try:
        (size,) = struct.unpack_from("<I", body, 0)
        head = json.loads(bytes(body[4 : 4 + size]))
        if head["version"] != version:
            raise ValueError(f"{name} is of another version")
        lengths = head["sections"]
    except (struct.error, LookupError, TypeError) as error:
        raise ValueError(f"{name} is no cache file") from error
    sections, at = [], 4 + size
    for length in lengths:
        if not isinstance(length, int) or not 0 <= length <= len(body) - at:
            raise ValueError("a section that is longer than the file")
        sections.append(body[at : at + length])
        at += length
    if at != len(body):
        raise ValueError("more than its sections")
    return head, sections


def numbers(section: memoryview) -> array[int]:
    """Decode a section of 64-bit numbers. Raises ValueError."""
    found = array("Q")
    found.frombytes(section)
    return found


def flat(runs: Iterable[Sequence[int]]) -> bytes:
    """Encode tuples of numbers, one after the other."""
    return array("Q", [part for run in runs for part in run]).tobytes()


def triples(section: memoryview) -> list[Run]:
    """Decode a section of triples. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, found, strict=True))


def pairs(section: memoryview) -> list[tuple[int, int]]:
    """Decode a section of pairs. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, strict=True))


def pages_file(name: object) -> str:
    """Return a valid CRIU page file name, which contains no path. Raises ValueError otherwise."""
    if isinstance(name, str) and name.startswith("pages-") and name.endswith(".img") and name[6:-4].isdigit():
        return name
    raise ValueError(f"{name!r} is no page file")
