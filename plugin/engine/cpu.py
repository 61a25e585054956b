"""Request again, after a restore, the permissions that CPU state needs, and keep counters of CPU time from failing.

A process may use the tile registers of AMX (Intel, since 2023) only after it has requested them. oneDNN does so once,
at its first matrix product, and remembers. The permission is kernel state, not process memory: CRIU 4.2 neither dumps
nor restores it, execve(2) drops it, and the first tile instruction of a restored process ends it with SIGILL. See
"Using XSTATE features in user space" in the kernel's documentation, and arch/x86/include/uapi/asm/prctl.h for the
numbers. This concerns Linux on x86-64; elsewhere it does nothing.

A restored process begins with a CPU time of zero. SGLang adds the difference between two readings to a Prometheus counter
(`--enable-metrics`), and a counter refuses a negative amount: the scheduler ended.
"""

import ctypes
import platform
import sys

_ARCH_PRCTL = 158
_GET_SUPPORTED, _GET_PERMITTED, _REQUEST = 0x1021, 0x1022, 0x1023

_supported = sys.platform == "linux" and platform.machine() == "x86_64"
_libc = ctypes.CDLL(None, use_errno=True)


def _query(question):
    """Return a mask of state components, or 0 if this kernel (before 5.16) does not support the request."""
    mask = ctypes.c_uint64()
    return 0 if _libc.syscall(_ARCH_PRCTL, question, ctypes.byref(mask)) else mask.value


def permitted():
    """Return the mask of state components that this process may use."""
    return _query(_GET_PERMITTED) if _supported else 0


def request_components():
    """Request every component that this process may not use yet, and return the resulting mask.

    A process that had not requested them before gets them as well, at no cost until they are used. A component that the
    kernel refuses (because a signal stack is too small for the larger state) was not in use before the dump either: the
    same condition held then.
    """
    if not _supported:
        return 0
    missing = _query(_GET_SUPPORTED) & ~permitted()
    for component in range(missing.bit_length()):
        if missing >> component & 1:
            _libc.syscall(_ARCH_PRCTL, _REQUEST, component)
    return permitted()


def accept_smaller_readings():
    """Make Prometheus counters of this process count a negative amount as 0. Later calls do nothing."""
    metrics = sys.modules.get("prometheus_client.metrics")
    if metrics is None or metrics.Counter.inc.__module__ == __name__:
        return
    original = metrics.Counter.inc

    def inc(self, amount=1, *args, **kwargs):
        return original(self, amount if amount > 0 else 0, *args, **kwargs)

    metrics.Counter.inc = inc
