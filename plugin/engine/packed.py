"""Where weights lie that vLLM has handed to oneDNN, which repacks them (on processors with AMX: every linear layer) and gives no address.

What is known is the handle of each layer's product, an object of C++ that leads to the packed bytes over a few pointers, and how many
bytes these are. So the objects that it points to are looked through until a chunk of glibc's malloc of just that size is found, some
hundred at most. Memory is read through /proc/self/mem, where a wrong pointer is an error and no crash. A chunk of that size that were
something else would be taken for weights, which is harmless (checkpoint.snapshot.file_backed): its bytes are the snapshot's, and what is
written to it
later stays this process's own.
"""

import bisect
import collections
import math
import os
import struct
import time

SEARCH_S = 5.0
"""How long a model's packed weights are looked for."""

_MOST_OBJECTS = 4000
_MOST_STEPS = 8
_OBJECT_BYTES = 1024
_SLACK = 3 * 4096  # rounding and alignment; checkpoint.snapshot.file_backed allows as much
_LARGE = 1 << 20


def find(handle, size, limit=math.inf):
    """The address of a malloc chunk for `size` bytes that `handle` leads to; None where none was found until `limit` (monotonic)."""
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
    """The anonymous mappings and the heap of this process, as ascending (start, end)."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            words = line.split()
            if "w" in words[1] and (len(words) < 6 or words[5] == "[heap]"):
                start, _, end = words[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def weights(model):
    """(address, bytes) of what a model's linear layers have had packed, and tensors that they keep instead of their weights.

    What is not found within SEARCH_S is carried like all other memory.
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
