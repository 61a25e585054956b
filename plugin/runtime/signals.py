"""The signals that stop a quickthaw command in order.

Their handlers: `Launch.install_signal_handlers` (plugin/runtime/launcher.py) and `quickthaw proxy` (plugin/proxy/cli.py).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

_HOST_PIDS = 0xEFFFFFFC
"""Inode number of the host's own PID namespace (Linux, include/linux/proc_ns.h)."""


def stopping() -> tuple[signal.Signals, ...]:
    """Return SIGTERM, SIGINT and SIGHUP (the terminal closed); without SIGHUP where nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT) if ignored else (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
