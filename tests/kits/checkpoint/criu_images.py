"""Writes CRIU's image files field by field, for tests of their readers."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

PAGE = 4096
HEAP, FILE_PRIVATE, ANON_SHARED, ANON_PRIVATE = 1 | 1 << 5 | 1 << 9, 1 | 1 << 6, 1 | 1 << 8, 1 | 1 << 9
Field = tuple[int, "int | bytes | str"]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message(*fields: Field) -> bytes:
    out = b""
    for name, value in fields:
        if isinstance(value, int):
            out += varint(name << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(name << 3 | 2) + varint(len(data)) + data
    return out


def image(path: Path, entries: Iterable[bytes]) -> None:
    path.write_bytes(
        struct.pack("<II", 0x54564319, 0x50273030) + b"".join(struct.pack("<I", len(e)) + e for e in entries)
    )


def vma(
    start: int, pages: int, status: int, file: int = 0, access: int = 3, flags: int = 0x22, advice: int = 0
) -> Field:
    end = start + pages * PAGE
    return 14, message(
        (1, start), (2, end), (3, 0), (4, file), (5, access), (6, flags), (7, status), (8, 1), (9, advice)
    )


def process(
    images: Path,
    pid: int,
    name: str,
    areas: list[Field],
    runs: list[tuple[int, list[bytes]]],
    old: bool = False,
    flags: int = 4,
) -> None:
    image(images / f"core-{pid}.img", [message((1, 1), (3, message((1, 1), (6, name))))])
    image(images / f"mm-{pid}.img", [message((1, 0x1000), (5, 0x7FFF_0000_0010), *areas)])
    count = (lambda n: [(2, n)]) if old else (lambda n: [(2, 0), (5, n)])
    entries = [message((1, start), *count(len(pages)), (4, flags)) for start, pages in runs]
    image(images / f"pagemap-{pid}.img", [message((1, pid)), *entries])
    (images / f"pages-{pid}.img").write_bytes(b"".join(page for _, pages in runs for page in pages))
