"""The hooks of a launch's pool: wake its replicas, put them in standby, or to sleep."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from launchers.errors import LauncherError
from plugin.runtime.phases import Phase
from plugin.runtime.replica import SERVES, Replica

if TYPE_CHECKING:
    from plugin.proxy.pool.pool import ReplicaPool


class Moves:
    """Move the replicas of one launch. `pool` is set before a hook is called."""

    pool: ReplicaPool

    def __init__(
        self, replicas: Sequence[Replica], start: Callable[[Replica], object], waking: Callable[[], object]
    ) -> None:
        """`start` starts a further replica, in a thread of its own; `waking` is called when a wake begins."""
        self._replicas, self._start, self._waking = replicas, start, waking

    async def wake(self) -> None:
        """Bring one replica to serving, and start the others. Raises CheckpointError or LauncherError."""
        self._waking()
        resting = self._resting()
        while not resting and self._ending():
            await asyncio.sleep(0.01)
            resting = self._resting()
        resting.sort(key=lambda replica: replica.running is None)  # one in standby is there first
        if resting:
            await asyncio.to_thread(resting[0].start)
            for replica in resting[1:]:
                threading.Thread(target=self._start, args=(replica,), daemon=True).start()

    def _resting(self) -> list[Replica]:
        return [r for r in self._replicas if r.tracker.phase is Phase.STANDBY or r.running is None]

    def _ending(self) -> bool:
        """Return True while the only engines are dead ones that their owner is about to clear away and start again."""
        return all(r.tracker.phase is Phase.FAILED and not r.stop_requested for r in self._replicas)

    async def sleep(self) -> None:
        """End every engine that a snapshot restores. Raises LauncherError (no-snapshot) if there is none."""
        able = [r for r in self._replicas if r.snapshot is not None and r.tracker.phase in (*SERVES, Phase.STANDBY)]
        if not able:
            raise LauncherError("no-snapshot", "there is no snapshot to wake the engine from; see the log for why")
        self._wake_on_request()
        for replica in able:
            await asyncio.to_thread(replica.sleep)

    async def standby(self) -> None:
        """Freeze every engine that serves. Raises CheckpointError or LauncherError; what was not frozen serves on."""
        self._wake_on_request()
        for replica in self._replicas:
            if replica.tracker.phase is Phase.SERVING:
                await asyncio.to_thread(replica.standby)

    def _wake_on_request(self) -> None:
        """Let requests wake the engine from now on, though nothing puts it to rest when it is idle."""
        self.pool.waker.hook = self.wake
