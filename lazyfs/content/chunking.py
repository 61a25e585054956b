"""Choose the chunk boundaries of a file: at tensor boundaries in safetensors, every 8 MiB elsewhere.

Guarantee: boundaries depend only on the tensor sizes, so two checkpoints of one architecture share every chunk whose
tensors are equal. A tensor of 4 MiB or more always starts a chunk, so an inserted tensor shifts no boundary beyond the next
large tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

MIN_CHUNK = 4 << 20
MAX_CHUNK = 8 << 20
# The safetensors format limits its header to 100 MB; a larger number means that the file is not safetensors.
_MAX_HEADER = 100_000_000

ReadAt = Callable[[int, int], bytes]


def chunk_lengths(name: str, size: int, read_at: ReadAt) -> list[int]:
    """Return the chunk lengths in bytes, in file order; they add up to `size`.

    Calls `read_at(offset, length)` only for the header.
    """
    if size == 0:
        return []
    if name.endswith(".safetensors"):
        starts = _tensor_starts(size, read_at)
        if starts is not None:
            return _group(starts, size)
    return _even(size)


def _even(size: int) -> list[int]:
    full, rest = divmod(size, MAX_CHUNK)
    return [MAX_CHUNK] * full + ([rest] if rest else [])


def _split(size: int) -> list[int]:
    """Split one large extent into the fewest parts of at most MAX_CHUNK; all but the last are page-aligned."""
    if size <= MAX_CHUNK:
        return [size] if size else []
    parts = -(-size // MAX_CHUNK)
    step = (-(-size // parts) + 4095) & ~4095
    lengths = []
    while size > 0:
        lengths.append(min(step, size))
        size -= step
    return lengths


def _tensor_starts(size: int, read_at: ReadAt) -> list[int] | None:
    """Return the sorted file offsets where tensors begin, the end of the header first; None if the header is malformed."""
    if size < 8:
        return None
    (length,) = struct.unpack("<Q", read_at(0, 8))
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        return None
    try:
        header = json.loads(read_at(8, length))
        base = 8 + length
        starts = {base}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end <= size - base:
                    return None
                starts.add(base + begin)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return sorted(starts - {size})


def _group(starts: list[int], size: int) -> list[int]:
    """Return chunk lengths: the header alone, then whole tensors gathered up to 4 MiB.

    A tensor of 4 MiB or more starts its own chunk.
    """
    lengths = _split(starts[0]) if starts else []
    if not starts:
        return _split(size)
    gathered = 0
    for begin, end in zip(starts, [*starts[1:], size], strict=True):
        tensor = end - begin
        if gathered and (tensor >= MIN_CHUNK or gathered + tensor > MAX_CHUNK):
            lengths.append(gathered)
            gathered = 0
        if tensor >= MIN_CHUNK:
            lengths.extend(_split(tensor))
            continue
        gathered += tensor
        if gathered >= MIN_CHUNK:
            lengths.append(gathered)
            gathered = 0
    if gathered:
        lengths.append(gathered)
    return lengths
