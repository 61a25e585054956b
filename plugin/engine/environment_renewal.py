"""Renew environment variables of a restored engine: those for its host, its session and its keys.

checkpoint/compatibility/environment.py decides which ones. Before the wake, the launcher writes them to the control
folder (launchers/control.py): records separated by null bytes, `NAME=VALUE` to set, `NAME` to remove. Only changed
variables are written, since another thread may be reading the environment.
"""

import contextlib
import os


def renew():
    """Apply the launcher's variables to this process's environment; return how many have changed."""
    folder, changed = os.environ.get("QUICKTHAW_CONTROL_DIR"), 0
    if not folder:
        return changed
    with contextlib.suppress(OSError):
        with open(os.path.join(folder, "environment"), "rb") as file:
            records = os.fsdecode(file.read()).split("\0")
        for record in records:
            name, given, value = record.partition("=")
            if not given:
                changed += os.environ.pop(name, None) is not None
            elif os.environ.get(name) != value:
                os.environ[name] = value
                changed += 1
    return changed
