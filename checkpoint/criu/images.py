"""Read and write CRIU's image files: framed protocol buffers, of which few fields are needed.

Only checkpoint.snapshot.file_backed writes images.

An image is 4 or 8 bytes of magic numbers, then messages, each preceded by its length in 32 bits little-endian. Field
numbers are those of CRIU's images/*.proto, which are its stable interface. Unknown fields are skipped, so images of
newer CRIU versions can be read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from checkpoint.errors import Integrity

Value = int | bytes
Message = dict[int, list[Value]]

# IMG_COMMON_MAGIC is followed by the image's own magic; the inventory and older images have only one magic
# (criu/include/magic.h).
_COMMON_MAGIC = 0x54564319


def payloads(data: bytes) -> Iterator[bytes]:
    """Yield the bytes of every message of an image.

    Raises ValueError, struct.error or IndexError for an invalid image.
    """
    at = head_size(data)
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise ValueError("it ends within a message")
        yield data[at : at + size]
        at += size


def head_size(data: bytes) -> int:
    """Return how many bytes of magic numbers an image begins with."""
    (magic,) = struct.unpack_from("<I", data, 0)
    return 8 if magic == _COMMON_MAGIC else 4


def framed(payload: bytes) -> bytes:
    """Frame a message for an image."""
    return struct.pack("<I", len(payload)) + payload


def messages(path: Path) -> Iterator[Message]:
    """Yield every decoded message of an image.

    Raises Integrity (image-unreadable), or Integrity (image-garbled) for invalid or truncated files.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Integrity("image-unreadable", f"{path}: {error.strerror}") from error
    try:
        for payload in payloads(data):
            yield decode(payload)
    except (struct.error, ValueError, IndexError) as error:
        raise Integrity("image-garbled", f"{path} is not a CRIU image: {error}") from error


def decode(data: bytes) -> Message:
    """Decode the fields of one message by number, repeated fields in order.

    Nested messages stay bytes. Raises ValueError if malformed.
    """
    found: Message = {}
    for field, value, _ in fields(data):
        found.setdefault(field, []).append(value)
    return found


def fields(data: bytes) -> Iterator[tuple[int, Value, bytes]]:
    """Yield every field of one message in order: number, value, and its raw bytes.

    Raises ValueError if malformed.
    """
    at, end = 0, len(data)
    while at < end:
        start = at
        key, at = _varint(data, at)
        kind = key & 7
        value: Value
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            value = data[at : at + size]
            at += size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
            at += size
        else:
            raise ValueError(f"wire type {kind}")
        if at > end:
            raise ValueError("a field runs over the end of its message")
        yield key >> 3, value, data[start:at]


def encode(message: Message) -> bytes:
    """Encode a message whose numbers are all varints, with fields in ascending order."""
    parts = []
    for field in sorted(message):
        for value in message[field]:
            if isinstance(value, bytes):
                parts.append(encoded(field, value))
            else:
                parts.append(_to_varint(field << 3) + _to_varint(value))
    return b"".join(parts)


def encoded(field: int, value: bytes) -> bytes:
    """Encode one field that is a message or a string."""
    return _to_varint(field << 3 | 2) + _to_varint(len(value)) + value


def _to_varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + 1
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def number(message: Message, field: int, default: int = 0) -> int:
    """Return a numeric field, or `default` if it is missing."""
    value = message.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is no number")
    return value


def nested(message: Message, field: int) -> list[Message]:
    """Return a field that is a message, as a list of all its occurrences."""
    return [decode(value) for value in message.get(field, []) if isinstance(value, bytes)]


def text(message: Message, field: int) -> str:
    """Return a string field; empty if it is missing."""
    value = message.get(field, [b""])[-1]
    return value.rstrip(b"\0").decode("utf-8", "replace") if isinstance(value, bytes) else ""
