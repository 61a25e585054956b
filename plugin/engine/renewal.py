"""Environment variables that a restored engine is given anew: where it runs, in which session, with which keys.

Which ones is checkpoint/compatibility/environment.py's to say. The launcher leaves them in the control folder before it wakes the engine
(launchers/control.py): records parted by null bytes, `NAME=VALUE` to set, `NAME` to remove. Only what differs is written, since another
thread may be reading the environment.
"""

import contextlib
import os


def renew():
    """Take what the launcher left into this process's environment; how many variables that changed."""
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
