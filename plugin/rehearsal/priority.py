"""Give work the lowest priority that this host has, so that it runs only where nothing else would.

A control group of its own with `cpu.idle`, where one can be made: processes inherit it, whatever sessions they make and
whatever priorities CRIU restores. Beside that, for hosts where none can be made: the idle scheduling class, and the
least weight of the session's autogroup, among which the kernel shares the processors before it looks at classes. Then
the idle class of the disk's scheduler, and the first place among those that the kernel ends when memory runs out. Each
is tried by itself; what a host refuses stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from checkpoint.control_groups import Group, groups

_SYS_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_WHO_PROCESS, _IO_IDLE = 1, 3 << 13
_LEAST_NICE, _ENDED_FIRST = 19, 1000
_GROUP = "quickthaw-rehearsal-"
_LEAST = (("cpu.idle", 1), ("cpu.shares", 2), ("cpu.weight", 1))
"""Files of a control group for processors, and the least that they take; the first that is there counts."""


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
    _enter_group()
    lower([os.getpid()])


def is_lowest() -> bool:
    """Return whether this process has the idle scheduling class."""
    return os.sched_getscheduler(0) == os.SCHED_IDLE


def limited() -> bool:
    """Return whether a control group limits this process's processor time: the lowest priority uses it up like any other."""
    for group in _groups():
        for one in group.and_above():
            for name, no_limit in (("cpu.max", "max"), ("cpu.cfs_quota_us", "-1")):
                with contextlib.suppress(OSError, IndexError):
                    if (one / name).read_text().split()[0] != no_limit:
                        return True
    return False


def remove_groups() -> None:
    """Remove the control groups of this process and of rehearsals that have ended: one that begins is empty for a moment."""
    for parent in _parents():
        with contextlib.suppress(OSError):
            for group in parent.glob(f"{_GROUP}*"):
                owner = group.name.removeprefix(_GROUP)
                if owner == str(os.getpid()) or not Path("/proc", owner).exists():
                    # Below it, a frozen engine's (checkpoint/sandbox/freezer.py), if its process was killed.
                    for one in (*group.glob("quickthaw-*"), group):
                        with contextlib.suppress(OSError):  # it still has processes
                            one.rmdir()


def leave_group() -> None:
    """Move this process back, and remove its control group once it is empty."""
    for parent in _parents():
        if parent.name.startswith(_GROUP):
            with contextlib.suppress(OSError):
                (parent.parent / "cgroup.procs").write_text(str(os.getpid()))
    remove_groups()


def _enter_group() -> None:
    remove_groups()
    for parent in _parents():
        group = parent / f"{_GROUP}{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            name, least = next((name, least) for name, least in _LEAST if (group / name).exists())
            (group / name).write_text(str(least))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except (OSError, StopIteration):  # no controller of processors, or not for us
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return


def _groups() -> Iterator[Group]:
    """Yield this process's control groups that may share out processors, of version 1 and 2."""
    with contextlib.suppress(OSError, ValueError):
        yield from groups("cpu")


def _parents() -> list[Path]:
    """Return the folders in which a rehearsal may make its group."""
    return [group.folder for group in _groups()]


def _idle_io(task: int) -> None:
    """Set the idle class of ioprio_set(2), which the standard library does not have."""
    number = _SYS_IOPRIO_SET.get(platform.machine())
    if number is not None:
        ctypes.CDLL(None).syscall(number, _WHO_PROCESS, task, _IO_IDLE)
