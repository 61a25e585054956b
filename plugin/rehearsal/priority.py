"""Give work the lowest priority that this host has, so that it runs only where nothing else would.

Four things are needed: the idle scheduling class; the least weight of the session's autogroup, among which the kernel
shares the processors before it looks at classes; the idle class of the disk's scheduler; and the first place among
those that the kernel ends when memory runs out. Each is tried by itself; what a host refuses stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable
from pathlib import Path

_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _IO_IDLE = 1, 3 << 13
_LEAST_NICE, _ENDED_FIRST = 19, 1000


def lower(pids: Iterable[int]) -> None:
    """Give these processes, with all their threads, the lowest priority. Those that have ended are skipped."""
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in map(int, os.listdir(f"/proc/{pid}/task")):
                with contextlib.suppress(OSError):
                    os.sched_setscheduler(task, os.SCHED_IDLE, os.sched_param(0))
                _idle_io(task)
        for name, value in (("autogroup", _LEAST_NICE), ("oom_score_adj", _ENDED_FIRST)):
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/{name}").write_text(str(value))


def lower_own() -> None:
    """Give this process and its later children the lowest priority, in a session of its own, which has an autogroup of its own."""
    with contextlib.suppress(OSError):  # it leads a session already
        os.setsid()
    lower([os.getpid()])


def is_lowest() -> bool:
    """Return whether this process has the idle scheduling class."""
    return os.sched_getscheduler(0) == os.SCHED_IDLE


def _idle_io(task: int) -> None:
    """Set the idle class of ioprio_set(2), which the standard library does not have."""
    number = _SYS_IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, task, _IO_IDLE)
