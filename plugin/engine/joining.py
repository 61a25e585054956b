"""Run a restored engine's canary and the waiting request in one step, instead of one step each.

An engine starts with the requests that have arrived; one that arrives a millisecond later waits for a whole step. The
identifier of a canary that expects a request beside it is marked (launchers/canary.py, JOINED). The engine's scheduler
process waits for that request once, for at most LIMIT_S. All other requests are scheduled as usual.

An identifier is chosen by the client (X-Request-Id, `rid`), and each wait delays every stream. So only a wake allows
a wait (control.py), and only one.

The limit covers a proxy that is still importing its modules, tens of milliseconds behind the engine; a wasted step
costs more.
"""

import time

JOINED = "quickthaw-joined-"
LIMIT_S = 0.06
POLL_S = 0.0003
allowed = False
"""True from a wake until the next wait."""


def wanted(identifiers):
    """Return True if a wait is allowed, and this queue of identifiers holds only a canary that expects a request beside it."""
    if not allowed:
        return False
    found = list(identifiers)
    return len(found) == 1 and JOINED in str(found[0])


def wait(arrived):
    """Wait until `arrived()` is true, at most LIMIT_S seconds. No other wait is allowed until the next wake."""
    global allowed
    allowed = False
    limit = time.monotonic() + LIMIT_S
    while not arrived() and time.monotonic() < limit:
        time.sleep(POLL_S)
