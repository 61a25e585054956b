"""Giving memory back before a dump, so that a snapshot does not carry what is empty or garbage.

The KV cache of an idle engine is as large as its memory and means nothing. Its pages are dropped where they are
(madvise MADV_DONTNEED): the addresses stay valid and read as zeros, so the engine goes on as if the cache had just been allocated,
and CRIU finds no pages to write.
"""

import ctypes
import gc
import mmap
import os
import sys

MADV_DONTNEED = 4
SMALLEST_DISCARD = 1 << 20  # bytes; below it the calls cost more than the pages

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def tensors_in(holder):
    """Every tensor that an object holds directly or in a list, tuple or dict of its own attributes."""
    import torch

    stack = list(vars(holder).values())
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.extend(value.values())


def discard(tensors):
    """Drop the pages of CPU tensors whose contents mean nothing; they read as zeros from then on. Returns the bytes dropped.

    Whole pages inside a storage only: what shares its first and last page stays. Storages are dropped once, however many views there are.
    Shared memory is left alone, since the call would not empty it.
    """
    page, dropped, seen = mmap.PAGESIZE, 0, set()
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.is_shared() or tensor.is_pinned():
            continue
        storage = tensor.untyped_storage()
        start, length = storage.data_ptr(), storage.nbytes()
        if length < SMALLEST_DISCARD or start in seen:
            continue
        seen.add(start)
        first = -(-start // page) * page
        whole = (start + length) // page * page - first
        if whole > 0:
            if _libc.madvise(first, whole, MADV_DONTNEED):
                raise OSError(ctypes.get_errno(), "madvise")
            dropped += whole
    return dropped


def drop_weights(model):
    """Drop the pages of a model's parameters, which the engine will read again from disk (a thin snapshot). Returns the bytes dropped.

    Buffers stay: what is computed at start, such as rotary tables, is in no checkpoint.
    """
    return discard(parameter.data for parameter in model.parameters())


def areas(tensors, others=()):
    """Where CPU tensors lie: (address, bytes) of each storage and of `others`, in order, neighbours put together."""
    spans = set(others)
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            spans.add((storage.data_ptr(), storage.nbytes()))
    found: list[list[int]] = []
    for start, size in sorted(spans):
        if found and start <= sum(found[-1]):
            found[-1][1] = max(found[-1][1], start + size - found[-1][0])
        else:
            found.append([start, size])
    return found


def close_nvml():
    """Shut NVML down in this process, as often as it was initialised: an open /dev/nvidiactl is what CRIU refuses to dump.

    Whoever asks NVML again initialises it again. Seen to take six calls in vLLM's API server (docs/measurements.md).
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return  # never loaded here
    for _ in range(64):
        if nvml.nvmlShutdown():
            return


def trim():
    """Collect garbage and give free pages back: the allocator's to the kernel, the CUDA caching allocator's to the driver.

    What is left is kept out of later collections: one that comes just after a restore would walk the whole heap, and every page of it
    would have to be brought before the first token (seen: 435 of vLLM's 535 MB of API server instead of 22).
    """
    gc.collect()
    gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
