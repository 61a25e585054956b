"""One line per event on standard error, which a detached daemon has pointed at its log file."""

from __future__ import annotations

import faulthandler
import logging
import signal
import sys


def configure(role: str, level: int = logging.INFO) -> None:
    """Send the process's log records to standard error as `time role level message`.

    SIGUSR1 writes the stacks of all threads there: what to send when a mount seems stuck.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
