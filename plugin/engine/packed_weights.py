"""Find the weights that oneDNN has repacked for vLLM without giving an address (on CPUs with AVX-512: every linear layer).

vLLM keeps only the handle of each layer's product (a C++ object that leads to the packed bytes over a few pointers) and
their size. The search follows pointers from that object, over some hundred objects at most, until it finds a glibc malloc
chunk of just that size. Memory is read through /proc/self/mem, where a wrong pointer is an error instead of a crash.
Another chunk of that size would be mistaken for weights, which is harmless (checkpoint.snapshot.file_backed): its bytes
are the snapshot's, and later writes to it stay private to the process.
"""

import bisect
import collections
import math
import os
import struct
import time

SEARCH_S = 5.0
"""Maximum seconds to search for a model's packed weights."""

_MOST_OBJECTS = 4000
_MOST_STEPS = 8
_OBJECT_BYTES = 1024
_SLACK = 3 * 4096  # rounding and alignment; checkpoint.snapshot.file_backed allows the same
_LARGE = 1 << 20


def find(handle, size, limit=math.inf):
    """Return the address of a malloc chunk for `size` bytes that `handle` leads to, or None if not found by `limit` (monotonic seconds)."""
    memory = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _find(memory, _writable(), handle, size, limit)
    finally:
        os.close(memory)


def _find(memory, ranges, handle, size, limit):
    seen, todo = {handle}, collections.deque([(handle, 0)])
    looked = 0
    while todo and looked < _MOST_OBJECTS and time.monotonic() < limit:
        at, steps = todo.popleft()
        looked += 1
        try:
            (word,) = struct.unpack("<Q", os.pread(memory, 8, at - 8))
            chunk = word & ~7
            if size <= chunk <= size + _SLACK:
                return at
            if steps == _MOST_STEPS:
                continue
            data = os.pread(memory, min(chunk, _OBJECT_BYTES) if 16 <= chunk < _LARGE else 128, at)
        except (OSError, struct.error):
            continue
        for (pointer,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8]):
            if pointer and not pointer % 16 and pointer not in seen and _inside(ranges, pointer):
                seen.add(pointer)
                todo.append((pointer, steps + 1))
    return None


def _inside(ranges, address):
    at = bisect.bisect_right(ranges, (address, 1 << 64)) - 1
    return at >= 0 and address < ranges[at][1]


def _writable():
    """Return this process's anonymous mappings and heap as ascending (start, end)."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            words = line.split()
            if "w" in words[1] and (len(words) < 6 or words[5] == "[heap]"):
                start, _, end = words[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def weights(model):
    """Return (address, bytes) of the packed weights of a model's linear layers, and the tensors that replace their weights.

    Weights not found within SEARCH_S are copied like all other memory.
    """
    spans, tensors, limit = [], [], time.monotonic() + SEARCH_S
    for module in model.modules():
        for cell in getattr(getattr(module, "cpu_linear", None), "__closure__", None) or ():
            try:
                value = cell.cell_contents
            except ValueError:
                continue  # an empty cell
            if hasattr(value, "untyped_storage"):
                tensors.append(value)
            elif getattr(value, "handler_tensor", None) is not None:
                size = value.n * value.k * module.weight.element_size()
                at = find(value.handler_tensor.item(), size, limit)
                if at is not None:
                    spans.append((at, size))
    return spans, tensors
