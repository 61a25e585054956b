"""One line per event on standard error, which a detached daemon has pointed at its log file."""

from __future__ import annotations

import logging
import sys


def configure(role: str, level: int = logging.INFO) -> None:
    """Send the process's log records to standard error as `time role level message`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {role}[%(process)d] %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
