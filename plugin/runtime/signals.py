"""The signals that stop a quickthaw command in order.

Their handlers: `Launch.install_signal_handlers` (plugin/runtime/launcher.py), `quickthaw proxy` (plugin/proxy/cli.py), and
`unwind` for commands that end with what they made.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_HOST_PIDS = 0xEFFFFFFC
"""Inode number of the host's own PID namespace (Linux, include/linux/proc_ns.h)."""


def stopping() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, SIGINT and SIGHUP (the terminal closed); without SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def unwind() -> None:
    """Let a stopping signal end this process by an exception, so that its `finally` blocks run; a third one ends it at once.

    Python does so for SIGINT only. A signal that is ignored stays so. Call it in the main thread.
    """
    arrived = 0

    def end(number: int, _: FrameType | None) -> None:
        nonlocal arrived
        arrived += 1
        if arrived > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise SystemExit(128 + number)

    for number in stopping():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Handle stopping signals that arrive in the block at its end: for steps whose result must not be lost. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for early in arrived:
            signal.raise_signal(early)


def is_container_command() -> bool:
    """Return whether this process is what a container runs, at most behind an init or a shell.

    Its runtime stops a container by SIGTERM, waits as long as the operator said (`terminationGracePeriodSeconds`, `docker stop
    --time`), and then kills everything in it.
    """
    try:
        own = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return False
    # 0: the parent lies outside (a Pod that shares its processes); 1: pid1.stand_in, tini, sh -c.
    return own != _HOST_PIDS and (os.getpid() == 1 or os.getppid() in (0, 1))
