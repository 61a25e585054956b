"""Find what a test must not leave behind: processes in their own namespaces, mounts, partly written snapshots, work
folders.
"""

import os
import time
from pathlib import Path


def _marked(pid, marker):
    """Return whether a process, or an ancestor of it, was started with `marker` in its environment, which init and
    engines inherit.
    """
    try:
        return marker in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def processes(marker):
    """Return the PIDs of processes that carry the marker, without this one and its ancestors."""
    skip, pid = set(), os.getpid()
    while pid > 1:
        skip.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return {
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in skip and _marked(name, marker)
    }


def mounts(below):
    """Return the mount points below a folder."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if line.split()[1].startswith(str(below) + "/")}


def state(home):
    """Return the partly written files below a state folder."""
    found = set()
    for pattern in ("snapshots/.partial-*", "snapshots/.removed-*", "run/restore-*"):
        found |= {str(path) for path in Path(home).glob(pattern)}
    return found


class Watch:
    """Watches one state folder and the processes that have its path in their environment, so that parallel tests do
    not count.

    A test's commands must get `environment`. Sandboxes made in this process inherit it from os.environ.
    """

    def __init__(self, home):
        self.home = Path(home)
        self.environment = {"RUNNER_TEST_HOME": str(home)}
        self._marker = f"RUNNER_TEST_HOME={home}\0".encode()

    def new(self):
        """Return what exists now and must not exist at the end of a test."""
        found = {f"process {pid}: {_name(pid)}" for pid in processes(self._marker)}
        return found | {f"mount {where}" for where in mounts(self.home)} | state(self.home)

    def gone(self, limit_s=60.0):
        """Wait until nothing is left; return what still exists after `limit_s` seconds."""
        limit = time.monotonic() + limit_s
        while (left := self.new()) and time.monotonic() < limit:
            time.sleep(0.05)
        return left


def _name(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    except OSError:
        return "(ended)"
