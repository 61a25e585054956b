"""What a processor's state needs a permission for, asked for again after a restore: Linux on x86-64, elsewhere nothing.

The tile registers of AMX (Intel, since 2023) may be used only by a process that has asked for them; oneDNN does so once, at its first
matrix product, and remembers. The permission is the kernel's, not the process's memory: CRIU 4.2 neither dumps nor restores it,
execve(2) drops it, and the first tile instruction of a restored process ends it with SIGILL. See "Using XSTATE features in user space"
in the kernel's documentation, and arch/x86/include/uapi/asm/prctl.h for the numbers.
"""

import ctypes
import platform
import sys

_ARCH_PRCTL = 158
_GET_SUPPORTED, _GET_PERMITTED, _REQUEST = 0x1021, 0x1022, 0x1023

_here = sys.platform == "linux" and platform.machine() == "x86_64"
_libc = ctypes.CDLL(None, use_errno=True)


def _asked(question):
    """A mask of state components, or 0 where this kernel (before 5.16) does not know the question."""
    mask = ctypes.c_uint64()
    return 0 if _libc.syscall(_ARCH_PRCTL, question, ctypes.byref(mask)) else mask.value


def permitted():
    """The mask of state components that this process may use."""
    return _asked(_GET_PERMITTED) if _here else 0


def regain():
    """Ask for every component that this process may not use yet; the mask after it.

    A process that had not asked before gets it as well, which costs nothing until it is used. What is refused (the kernel does so
    where a signal stack is too small for the larger state) was not in use before either: the condition was the same then.
    """
    if not _here:
        return 0
    missing = _asked(_GET_SUPPORTED) & ~permitted()
    for component in range(missing.bit_length()):
        if missing >> component & 1:
            _libc.syscall(_ARCH_PRCTL, _REQUEST, component)
    return permitted()
