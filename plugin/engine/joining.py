"""One step of a restored engine for its canary and for the request that waits for it, instead of one step each.

An engine begins with whatever has arrived first, and what comes a millisecond later waits for a whole step. A canary that has a request
beside it says so in its identifier (launchers/base.py, JOINED), and the engine's process that schedules waits for that request: once,
for at most LIMIT_S. Everything else goes the engine's own way.

The limit is that of a proxy which is still importing what it needs, tens of milliseconds behind the engine; a step in vain costs more.
"""

import time

JOINED = "quickthaw-joined-"
LIMIT_S = 0.06
POLL_S = 0.0003


def wanted(identifiers):
    """Whether a canary that is not alone stands alone in this queue of identifiers."""
    found = list(identifiers)
    return len(found) == 1 and JOINED in str(found[0])


def wait(arrived):
    """Wait until `arrived()` is true, at most LIMIT_S."""
    limit = time.monotonic() + LIMIT_S
    while not arrived() and time.monotonic() < limit:
        time.sleep(POLL_S)
