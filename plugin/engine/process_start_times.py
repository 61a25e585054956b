"""Keep the process start times that psutil remembers valid after a restore.

psutil identifies a process by its PID and its start time (field 22 of /proc/PID/stat). A restored process has a new
start time, so every `psutil.Process` made before the dump would take it for another process: `is_running()` is false
and `send_signal()` raises, as in SGLang's watchdog. The launcher writes the start times of the dump to the control
folder before the process tree resumes. psutil then reads these for the restored processes, so that remembered, hashed
and stored values stay equal.
"""

import functools
import json
import os
import sys

FILE = "start-times"
_OURS = "quickthaw_parse_stat_file"


class _Restored:
    """The processes of the last restore: PID → (start time now, start time at the dump), in clock ticks as bytes."""

    def __init__(self):
        self.fingerprint = None
        self.ticks = {}

    def read(self):
        """Return the current table, reading it again only if the launcher has written a new file."""
        folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
        if not folder:
            return self.ticks
        path = os.path.join(folder, FILE)
        try:
            stat = os.stat(path)
        except OSError:
            return self.ticks  # a cold start
        fingerprint = (stat.st_dev, stat.st_ino, stat.st_mtime_ns)
        if fingerprint != self.fingerprint:
            with open(path) as file:
                dumped = json.load(file)
            found = {}
            for pid, ticks in dumped.items():
                now = _start_time(pid)
                if now:
                    found[int(pid)] = (now, b"%d" % ticks)
            self.ticks, self.fingerprint = found, fingerprint
        return self.ticks


_restored = _Restored()


def _start_time(pid):
    """Return field 22 of /proc/PID/stat as bytes, or None if the process has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return None


def patch_psutil():
    """Patch psutil to read the start times of the dump, if this process has imported it. May be called again."""
    process = getattr(sys.modules.get("psutil._pslinux"), "Process", None)
    parse = getattr(process, "_parse_stat_file", None)
    if process is None or parse is None or getattr(parse, "__name__", "") == _OURS:
        return

    @functools.wraps(parse)  # this keeps psutil's own attributes, for its cache
    def parse_stat_file(self):
        stat = parse(self)
        now, dumped = _restored.read().get(self.pid, (None, None))
        return {**stat, "create_time": dumped} if now is not None and stat.get("create_time") == now else stat

    parse_stat_file.__name__ = _OURS
    process._parse_stat_file = parse_stat_file


def refresh():
    """Read the restored processes' start times now, before one of their PIDs can be reused."""
    patch_psutil()
    if "psutil" in sys.modules:
        _restored.read()
