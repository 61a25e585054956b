"""List the processes of an engine. `checkpoint.sandbox.process_tree` is not used: the proxy imports nothing of snapshots."""

from __future__ import annotations

import contextlib
from pathlib import Path


def process_tree(root: int) -> list[int]:
    """Return a process and all below it, by their numbers on the host."""
    found = [root]
    for pid in found:
        try:
            threads = list(Path(f"/proc/{pid}/task").iterdir())
        except OSError:
            continue  # ended meanwhile
        for thread in threads:
            with contextlib.suppress(OSError):  # only this thread ended
                found += map(int, (thread / "children").read_text().split())
    return found
