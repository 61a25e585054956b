"""Read and write CRIU's image files: framed protocol buffers, of which few fields are needed.

An image is 4 or 8 bytes of magic numbers, then messages, each preceded by its length in 32 bits little-endian. Field
numbers are those of CRIU's images/*.proto, which are its stable interface. Unknown fields are skipped, so images of
newer CRIU versions can be read. Only checkpoint.snapshot.file_backed and
checkpoint.criu.host_state write images.

Standard library only, and fast: the page server reads page maps with it while CRIU itself starts.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False  # importing typing would delay a restore by 3 ms
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Value = int | bytes
Message = dict[int, list[Value]]

# IMG_COMMON_MAGIC is followed by the image's own magic; the inventory and older images have only one magic
# (criu/include/magic.h).
_COMMON_MAGIC = 0x54564319


def head_size(data: bytes) -> int:
    """Return how many bytes of magic numbers an image begins with."""
    (magic,) = struct.unpack_from("<I", data, 0)
    return 8 if magic == _COMMON_MAGIC else 4


def payloads(data: bytes) -> list[bytes]:
    """Return the bytes of every message of an image. Raises ValueError or struct.error for an invalid image."""
    at, found = head_size(data), []
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + size > len(data):
            raise ValueError("it ends within a message")
        found.append(data[at : at + size])
        at += size
    return found


def messages(path: Path) -> Iterator[Message]:
    """Yield every decoded message of an image.

    Raises Integrity (image-unreadable), or Integrity (image-garbled) for invalid or truncated files.
    """
    try:
        for payload in payloads(path.read_bytes()):
            yield decode(payload)
    except (OSError, struct.error, ValueError, IndexError) as error:
        from checkpoint.errors import Integrity

        if isinstance(error, OSError):
            raise Integrity("image-unreadable", f"{path}: {error.strerror}") from error
        raise Integrity("image-garbled", f"{path} is not a CRIU image: {error}") from error


def decode(data: bytes) -> Message:
    """Decode the fields of one message by number, repeated fields in order.

    Nested messages stay bytes. Raises ValueError or IndexError if malformed.
    """
    found: Message = {}
    for field, value in fields(data):
        found.setdefault(field, []).append(value)
    return found


def fields(data: bytes) -> list[tuple[int, Value]]:
    """Return number and value of every field of one message, in order. Raises ValueError or IndexError if malformed."""
    at, end, found = 0, len(data), []
    value: Value
    while at < end:
        key = data[at]
        at += 1
        if key & 0x80:
            key, at = _varint(data, at - 1)
        kind = key & 7
        if kind == 0 or kind == 2:
            size = data[at]
            at += 1
            if size & 0x80:
                size, at = _varint(data, at - 1)
            value = size
            if kind == 2:
                value = data[at : at + size]
                at += size
        elif kind == 1 or kind == 5:
            size = 8 if kind == 1 else 4
            value = int.from_bytes(data[at : at + size], "little")
            at += size
        else:
            raise ValueError(f"wire type {kind}")
        found.append((key >> 3, value))
    if at > end:
        raise ValueError("a field runs over the end of its message")
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def number(message: Message, field: int, default: int = 0) -> int:
    """Return a numeric field, or `default` if it is missing."""
    value = message.get(field, [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {field} is not a number")
    return value


def nested(message: Message, field: int) -> list[Message]:
    """Return a field that is a message, as a list of all its occurrences."""
    return [decode(value) for value in message.get(field, []) if isinstance(value, bytes)]


def text(message: Message, field: int) -> str:
    """Return a string field; empty if it is missing."""
    value = message.get(field, [b""])[-1]
    return value.rstrip(b"\0").decode("utf-8", "replace") if isinstance(value, bytes) else ""


def framed(payload: bytes) -> bytes:
    """Frame a message for an image."""
    return struct.pack("<I", len(payload)) + payload


def encode(message: Message) -> bytes:
    """Encode a message whose numbers are all varints, with fields in ascending order."""
    parts = []
    for field in sorted(message):
        for value in message[field]:
            if isinstance(value, bytes):
                parts += [_to_varint(field << 3 | 2), _to_varint(len(value)), value]
            else:
                parts += [_to_varint(field << 3), _to_varint(value)]
    return b"".join(parts)


def _to_varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
