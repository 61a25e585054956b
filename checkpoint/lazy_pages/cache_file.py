"""The form of what is kept beside a snapshot for its next restore: a JSON head and numbers, nothing that reading it could run.

    32-bit length of the head, the head, then sections of raw bytes whose lengths the head's `sections` lists

Whoever reads one checks what it says as anything that comes from outside. Standard library only.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from checkpoint.criu.pagemap import BadImage

Bytes = bytes | memoryview
Run = tuple[int, int, int]


def packed(head: dict[str, Any], sections: Sequence[Bytes]) -> bytes:
    """A head and its sections as one document."""
    data = json.dumps({**head, "sections": [len(section) for section in sections]}).encode()
    return b"".join((struct.pack("<I", len(data)), data, *sections))


def unpacked(body: memoryview) -> tuple[dict[str, Any], list[memoryview]]:
    """What `packed` made. Raises ValueError for anything else."""
    try:
        (size,) = struct.unpack_from("<I", body, 0)
        head = json.loads(bytes(body[4 : 4 + size]))
        lengths = head["sections"]
    except (struct.error, ValueError, LookupError, TypeError) as error:
        raise ValueError("no document of ours") from error
    sections, at = [], 4 + size
    for length in lengths:
        if not isinstance(length, int) or not 0 <= length <= len(body) - at:
            raise ValueError("a section that is longer than the document")
        sections.append(body[at : at + length])
        at += length
    if at != len(body):
        raise ValueError("more than its sections")
    return head, sections


def numbers(section: memoryview) -> array[int]:
    """A section of 64-bit numbers. Raises ValueError."""
    found = array("Q")
    found.frombytes(section)
    return found


def flat(runs: Iterable[Sequence[int]]) -> bytes:
    """Tuples of numbers, one after the other."""
    return array("Q", [part for run in runs for part in run]).tobytes()


def triples(section: memoryview) -> list[Run]:
    """A section of tuples of three. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, found, strict=True))


def pairs(section: memoryview) -> list[tuple[int, int]]:
    """A section of tuples of two. Raises ValueError."""
    found = iter(numbers(section))
    return list(zip(found, found, strict=True))


def pages_file(name: object) -> str:
    """A page file's name as CRIU gives it, which is no path. Raises BadImage, a ValueError, for anything else."""
    if isinstance(name, str) and name.startswith("pages-") and name.endswith(".img") and name[6:-4].isdigit():
        return name
    raise BadImage(f"{name!r} is no page file")
