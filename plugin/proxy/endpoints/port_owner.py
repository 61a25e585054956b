"""Detect another user of this host who listens at the port that the proxy chose for its own engine.

Every user can read the port on the engine's command line, and it is free until the engine has started. A process that
listens there first would receive the clients' requests and keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from plugin.bench.client import listening_users


def stranger_at(port: int, pid: int | None) -> int | None:
    """Return the uid of a stranger who listens at `port`, or None.

    Our own user is no stranger, nor is a user of the process `pid` or of its descendants: a command may start its engine
    as another user.
    """
    strangers = listening_users(port) - {os.geteuid()}
    if strangers and pid is not None:
        strangers -= _users_below(pid)
    return min(strangers, default=None)


def _users_below(pid: int) -> set[int]:
    users, waiting = set(), [pid]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        try:
            users.add(process.stat().st_uid)
            for task in (process / "task").iterdir():
                waiting.extend(int(child) for child in (task / "children").read_text().split())
        except OSError:
            continue  # ended meanwhile
    return users
