"""Who listens at a port that this proxy chose for an engine of its own: the engine, or another user of the host who was there first.

The port stands in the command line, which every user can read, and is free until the engine has started. Whoever listens there before
the engine would get the clients' requests and keys.
"""

from __future__ import annotations

import os
from pathlib import Path

from plugin.bench.client import listening_users


def stranger_at(port: int, pid: int | None) -> int | None:
    """Return a user who listens at `port` and is neither this process's nor one of the command's at `pid` or below; None if there is none.

    A command may start its engine as another user.
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
