"""What must not be left behind: processes in namespaces of their own, mounts of ours, half-written snapshots, work folders."""

import os
import time
from pathlib import Path


def _ours(pid):
    """Whether a process is one of quickthaw's or lives in a PID namespace that is not the host's."""
    try:
        if os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid"):
            return True
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    text = b" ".join(words)
    return any(name in text for name in (b"checkpoint/init.py", b"checkpoint.pages", b"criu", b"plugin.launch", b"lazyfs.daemon"))


def processes():
    """The numbers of processes that would be leftovers once a test is over."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit() and _ours(int(name))}


def mounts():
    """Mount points of the host that are FUSE or ours."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {line.split()[1] for line in lines if " fuse" in line and "fusectl" not in line or "quickthaw" in line}


def state(home):
    """What is half-written below a state folder."""
    found = set()
    for pattern in ("snapshots/.partial-*", "snapshots/.removed-*", "run/restore-*"):
        found |= {str(path) for path in Path(home).glob(pattern)}
    return found


class Watch:
    """Remembers what was there; `gone` waits until nothing more is."""

    def __init__(self, home=None):
        self.home = home
        self._processes, self._mounts = processes(), mounts()

    def new(self):
        """What is there now and was not before."""
        found = {f"process {pid}: {_name(pid)}" for pid in processes() - self._processes}
        found |= {f"mount {where}" for where in mounts() - self._mounts}
        if self.home:
            found |= state(self.home)
        return found

    def gone(self, limit_s=20.0):
        """Wait for everything new to go; what is still there after `limit_s` seconds."""
        limit = time.monotonic() + limit_s
        while (left := self.new()) and time.monotonic() < limit:
            time.sleep(0.05)
        return left


def _name(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:160]
    except OSError:
        return "(ended)"
