"""File format of the caches beside a snapshot: a JSON head and numbers, so that reading one cannot run code.

    32-bit length of the head, the head, then sections of raw bytes whose lengths the head's `sections` lists

Readers must check the values as untrusted input. Standard library only.
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
    """Encode a head and its sections as one document."""
    data = json.dumps({**head, "sections": [len(section) for section in sections]}).encode()
    return b"".join((struct.pack("<I", len(data)), data, *sections))


def unpacked(body: memoryview) -> tuple[dict[str, Any], list[memoryview]]:
    """Decode the result of `packed`. Raises ValueError for invalid input."""
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
    """Return a valid CRIU page file name, which contains no path.

    Raises BadImage, a ValueError, otherwise.
    """
    if isinstance(name, str) and name.startswith("pages-") and name.endswith(".img") and name[6:-4].isdigit():
        return name
    raise BadImage(f"{name!r} is no page file")
