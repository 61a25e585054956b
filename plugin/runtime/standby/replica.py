"""The standby of one replica: go there, come back, or find out that the engine was lost meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from checkpoint.errors import CheckpointError
from launchers.errors import EngineFailed, LauncherError
from plugin.records import wake_times
from plugin.runtime.phases import Phase
from plugin.runtime.standby import engine
from plugin.runtime.steps.context import RestoreContext
from plugin.runtime.steps.take_snapshot import NotResumed

if TYPE_CHECKING:
    from plugin.runtime.steps.engine_process import Running

log = logging.getLogger("quickthaw")


class RestingReplica(RestoreContext, Protocol):
    """The part of a replica that its standby needs."""

    running: Running | None

    def clear(self) -> None:
        """End the engine and release everything made for it."""


class Standby:
    """Freeze the engine of one replica and continue it."""

    def __init__(self, replica: RestingReplica, starting: threading.Lock) -> None:
        """`starting` is held while the replica starts."""
        self._replica, self._starting = replica, starting
        self._frozen: engine.Frozen | None = None
        self._rest = wake_times.Rest(0.0)
        self.continued = False
        """True if the last start continued an engine in standby."""
        self.moving = threading.Lock()
        """Held while the engine is frozen or ended, so that neither meets the other half done."""

    def enter(self) -> None:
        """Freeze the idle engine with its memory.

        Raises CheckpointError or LauncherError, and the engine serves on; after `engine-not-resumed` it was killed, and
        its owner starts another.
        """
        replica = self._replica
        with self.moving:
            running = replica.running
            if replica.stop_requested or running is None or replica.tracker.phase is not Phase.SERVING:
                raise EngineFailed("standby-refused", f"the engine is {replica.tracker.phase}")
            began = time.monotonic()
            try:
                self._frozen = frozen = engine.enter(replica, running)
            except NotResumed:
                running.kill()
                raise
            self._rest = wake_times.Rest(time.monotonic() - began, gpu_bytes=frozen.gpu_bytes)
            self._rest.memory_bytes = engine.memory_held(running)  # last: a request may be waiting

    def leave(self) -> bool:
        """Continue an engine in standby and return True. Return False, with nothing left of it, if there is none or it was lost.

        Raises the error of an engine that was lost because of a stop.
        """
        replica = self._replica
        frozen, running, self._frozen = self._frozen, replica.running, None
        self.continued = False
        began = time.monotonic()
        if frozen is None or running is None or replica.tracker.phase is not Phase.STANDBY:
            return False
        try:
            engine.leave(replica, running, frozen)
        except (CheckpointError, LauncherError, OSError) as error:
            if not replica.stop_requested:
                replica.tracker.to(Phase.FAILED, str(error))
            replica.clear()
            if replica.stop_requested:
                raise
            log.warning("standby-lost: %s; starting the engine again, under the same held requests", error)
            return False
        self.continued = True
        wake_times.remember(replica.settings, time.monotonic() - began, self._rest)
        return True

    def lost(self, code: int) -> None:
        """Clean up after an engine that ended with `code` in standby; the next request starts another."""
        replica = self._replica
        with self._starting, self.moving:
            if replica.tracker.phase is Phase.STANDBY:
                log.warning("standby-lost: the engine ended with %d in standby; the next request starts another", code)
                replica.clear()
                replica.tracker.to(Phase.ASLEEP, f"engine-died: it ended with {code} in standby")
