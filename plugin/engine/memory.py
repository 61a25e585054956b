"""Release memory before a dump, so that a snapshot does not contain empty or garbage pages.

An idle engine's KV cache takes much memory and holds nothing of use. Its pages are dropped in place (madvise
MADV_DONTNEED): the addresses stay valid and read as zeros. The engine continues as if the cache had just been
allocated, and CRIU finds no pages to write.
"""

import ctypes
import gc
import mmap
import os
import sys

MADV_DONTNEED = 4
SMALLEST_DISCARD = 1 << 20  # bytes; for less, the calls cost more than the pages save

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def tensors_in(holder):
    """Yield every tensor that is an attribute of an object, or is in a list, tuple or dict among its attributes."""
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
    """Drop the pages of CPU tensors with useless contents, which then read as zeros. Returns the bytes dropped.

    Only whole pages inside a storage are dropped; its first and last page may be shared with other data. A storage is
    dropped once, however many views it has. Shared memory is skipped, since the call would not empty it.
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
    """Drop the pages of a model's parameters, which the engine will reload from disk (excluded weights). Returns the bytes dropped.

    Buffers stay: values computed at start, such as rotary tables, are in no checkpoint file.
    """
    return discard(parameter.data for parameter in model.parameters())


def areas(tensors, others=()):
    """Return the memory areas of CPU tensors: (address, bytes) of each storage and of `others`, sorted, adjacent ones merged."""
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
    """Shut NVML down in this process, as often as it was initialised: CRIU refuses to dump an open /dev/nvidiactl.

    The next user of NVML initialises it again. vLLM's API server was seen to need six calls (docs/measurements.md).
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return  # not loaded in this process
    for _ in range(64):
        if nvml.nvmlShutdown():
            return


def return_host_memory():
    """Return pinned memory that PyTorch caches after its use, and the allocator's free pages, to the kernel."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
        if empty := empty or getattr(getattr(torch, "_C", None), "_host_emptyCache", None):  # from PyTorch 2.5 on
            empty()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def trim():
    """Collect garbage, then return the allocator's free pages to the kernel and the CUDA caching allocators' to the driver.

    Of these, one keeps GPU memory and one pinned host memory, such as what a loader staged the weights in.

    The remaining objects are frozen, which excludes them from later collections. A collection just after a restore
    would walk the whole heap and page all of it in before the first token (seen: 435 MB of vLLM's 535 MB API server
    instead of 22 MB).
    """
    gc.collect()
    gc.freeze()
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return_host_memory()
