"""What the CUDA driver's double (tests/kits/checkpoint/cuda_double.py) does inside a process: a thread that moves memory at its signals.

At a checkpoint the thread makes a host copy, new private memory that is locked until the checkpoint ends. At a restore it locks
the copy, compares it, and unmaps it: a byte that is not as it was ends the process. The thread's name says where
the state is, GPU_ON or GPU_OFF. Standard library only.
"""

import ctypes
import mmap
import os
import signal
import sys
import threading

FILL, FILLED, EMPTY, EMPTIED = (signal.SIGRTMIN + number for number in (11, 12, 13, 14))
"""A checkpoint begins and ends, a restore begins and ends. The host copy is locked in between."""
GPU_ON, GPU_OFF = "gpu-on", "gpu-off"
_PIECE = 1 << 16
_NORESERVE = 0x4000  # keeps the kernel from merging the copy with another mapping; mmap names it from Python 3.12 on
_libc = ctypes.CDLL(None, use_errno=True)


def start(size):
    """Start the thread; `size` is the host copy's, in bytes, rounded up to 64 KiB. Call this before the process has other threads."""
    signals = {FILL, FILLED, EMPTY, EMPTIED}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ready = threading.Event()
    threading.Thread(target=_serve, args=(size, signals, ready), name="cuda", daemon=True).start()
    ready.wait()


def _serve(size, signals, ready):
    pattern = os.urandom(_PIECE)
    size = -(-size // _PIECE) * _PIECE
    copy = None
    _name(GPU_ON)
    ready.set()
    while True:
        number = signal.sigwait(signals)
        if number == FILL:
            copy = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
            for at in range(0, size, _PIECE):
                copy[at : at + _PIECE] = pattern
            _name(GPU_OFF)
            _lock(copy, _libc.mlock)
        elif number == EMPTY:
            _lock(copy, _libc.mlock)
        elif number == FILLED:
            _lock(copy, _libc.munlock)
        else:
            if copy is not None and any(copy[at : at + _PIECE] != pattern for at in range(0, size, _PIECE)):
                _end("the host copy is not as it was")
            copy = None  # unmapped, and unlocked with that
            _name(GPU_ON)


def _name(text):
    with open("/proc/thread-self/comm", "w") as file:
        file.write(text)


def _lock(memory, call):
    place = ctypes.c_char.from_buffer(memory)
    try:
        if call(ctypes.byref(place), ctypes.c_size_t(len(memory))):
            _end(f"{call.__name__}: {os.strerror(ctypes.get_errno())}")
    finally:
        del place  # or the mapping could not be closed


def _end(reason):
    print(f"double of CUDA: {reason}", file=sys.stderr, flush=True)
    os._exit(77)
