"""Take an engine off the GPU before it is ended, where ending it there can hang the host (checkpoint.cuda.leaving)."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from checkpoint.cuda import leaving
from checkpoint.sandbox.process_tree import processes
from launchers.errors import LauncherError
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from checkpoint.sandbox.sandbox import Sandbox
    from launchers.client import Client
    from plugin.runtime.steps.context import StartContext

log = logging.getLogger("quickthaw")


def leave(replica: StartContext, sandbox: Sandbox, client: Client | None = None) -> bool:
    """Take the engine in `sandbox` off the GPU if its driver, or the user, wants that; return True if it left.

    `client`: the engine, if it can be asked to drop its memory first.
    """
    wanted, driver = replica.settings.suspend_before_kill, replica.driver()
    if driver is None or wanted == "never" or replica.tracker.phase is Phase.STANDBY:  # in standby it is off already
        return False
    if wanted == "auto" and not leaving.hangs_at_kill(replica.identity.host.driver):
        return False

    def offload() -> None:
        assert client is not None
        with contextlib.suppress(LauncherError, OSError):  # an engine that does not answer is moved as it is
            replica.engine.offload(client, replica.command, excluded=True)

    pids = processes(sandbox.init_pid)
    return bool(pids) and leaving.take_off(driver, pids, offload=offload if client else None)
