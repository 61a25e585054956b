"""What must not be left behind: processes in namespaces of their own, mounts of ours, half-written snapshots, work folders."""

import os
import time
from pathlib import Path


def _marked(pid, marker):
    """Whether a process was started, directly or not, with `marker` in its environment; process 1 of a sandbox and engines inherit it."""
    try:
        return marker in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def processes(marker):
    """The numbers of processes that carry the marker, but for this one and its ancestors."""
    skip, pid = set(), os.getpid()
    while pid > 1:
        skip.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return {
        int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in skip and _marked(name, marker)
    }


def mounts(below):
    """Mount points below a folder."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if line.split()[1].startswith(str(below) + "/")}


def state(home):
    """What is half-written below a state folder."""
    found = set()
    for pattern in ("snapshots/.partial-*", "snapshots/.removed-*", "run/restore-*"):
        found |= {str(path) for path in Path(home).glob(pattern)}
    return found


class Watch:
    """Watches one state folder and the processes that carry its path in their environment, so that other tests beside it do not count.

    `environment` is what a test's commands must be given; Sandboxes made in this process inherit it from os.environ.
    """

    def __init__(self, home):
        self.home = Path(home)
        self.environment = {"RUNNER_TEST_HOME": str(home)}
        self._marker = f"RUNNER_TEST_HOME={home}\0".encode()

    def new(self):
        """What is there now and must not be once a test is over."""
        found = {f"process {pid}: {_name(pid)}" for pid in processes(self._marker)}
        return found | {f"mount {where}" for where in mounts(self.home)} | state(self.home)

    def gone(self, limit_s=60.0):
        """Wait for everything to go; what is still there after `limit_s` seconds."""
        limit = time.monotonic() + limit_s
        while (left := self.new()) and time.monotonic() < limit:
            time.sleep(0.05)
        return left


def _name(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    except OSError:
        return "(ended)"
