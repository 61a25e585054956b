"""Detect another user of this host who listens at the port that the proxy chose for its own engine.

Every user can read the port on the engine's command line, and it is free until the engine has started. A process that
listens there first would receive the clients' requests and keys.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from plugin.bench.client import listening_users
from plugin.proxy.process_tree import process_tree


def foreign_listener(port: int, pid: int | None) -> int | None:
    """Return the uid of a stranger who listens at `port`, or None.

    Our own user is no stranger, nor is a user of the process `pid` or of its descendants: a command may start its engine
    as another user.
    """
    strangers = listening_users(port) - {os.geteuid()}
    if strangers and pid is not None:
        strangers -= _users(process_tree(pid))
    return min(strangers, default=None)


def _users(pids: Iterable[int]) -> set[int]:
    users = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # ended meanwhile
            users.add(Path(f"/proc/{pid}").stat().st_uid)
    return users
