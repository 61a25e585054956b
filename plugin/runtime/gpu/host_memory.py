"""Give back the host memory that an engine's wake leaves behind: copies of GPU memory that were made for its sleep.

PyTorch keeps freed pinned memory for its next use, as much as the weights. To unpin so much may take a while, so an engine
returns it when it has had no requests for a moment, not while one waits.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from launchers.errors import LauncherError
from plugin.runtime.phases import Phase
from plugin.runtime.steps.context import RestoreContext

if TYPE_CHECKING:
    from plugin.runtime.standby.replica import Standby
    from plugin.runtime.steps.engine_process import Running

log = logging.getLogger("quickthaw")
IDLE_S = 2.0
"""Seconds without requests after which the memory is returned."""
LOOK_S = 0.25


class AwakeReplica(RestoreContext, Protocol):
    """The part of a replica that is needed here."""

    running: Running | None
    resting: Standby


def return_later(replica: AwakeReplica) -> None:
    """Have the engine that serves now return its host memory once it is idle. Returns at once."""
    threading.Thread(target=_return, args=(replica, replica.running), name="host-memory", daemon=True).start()


def _return(replica: AwakeReplica, running: Running | None) -> None:
    quiet = time.monotonic()
    while time.monotonic() - quiet < IDLE_S:
        time.sleep(LOOK_S)
        if replica.running is not running or replica.stop_requested:
            return
        if replica.page_follower.there() > 0:
            quiet = time.monotonic()
    with replica.resting.moving:  # a frozen engine would not answer
        if running is None or replica.running is not running or replica.tracker.phase is not Phase.SERVING:
            return
        try:
            replica.engine.return_memory(running.client)
        except (LauncherError, OSError) as error:
            log.info("the engine keeps host memory that its wake left: %s", error)
