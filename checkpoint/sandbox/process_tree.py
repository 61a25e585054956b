"""The processes of a sandbox, by their numbers on the host and inside, and their private memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path


def processes(init_pid: int) -> list[int]:
    """List every process below a sandbox's init, by its number on the host."""
    found: list[int] = []
    waiting = [init_pid]
    while waiting:
        pid = waiting.pop()
        tasks = _tasks(pid)
        for task in tasks:
            with contextlib.suppress(OSError):  # only this thread ended
                waiting.extend(int(child) for child in (task / "children").read_text().split())
        if tasks and pid != init_pid:
            found.append(pid)
    return found


def state(pid: int) -> str:
    """Return a process's state letter (proc(5)), `X` if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def inner_numbers(pids: Sequence[int]) -> list[int]:
    """List the numbers of processes and their threads inside their PID namespace."""
    numbers = []
    for pid in pids:
        for task in _tasks(pid):
            with contextlib.suppress(OSError):  # only this thread ended
                for line in (task / "status").read_text().splitlines():
                    if line.startswith("NSpid:"):
                        numbers.append(int(line.split()[-1]))
    return numbers


def inner_number(pid: int) -> int:
    """Return a process's number inside its PID namespace; its own number if it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid


def _tasks(pid: int) -> list[Path]:
    """List a process's threads, none if it has ended."""
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def private_bytes(pids: Sequence[int]) -> int:
    """Sum the private memory of processes in bytes, which is about the size of CRIU's images.

    The source is smaps_rollup: Private_Dirty and Swap.
    """
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("Private_Dirty:", "Swap:")):
                total += int(line.split()[1]) * 1024
    return total
