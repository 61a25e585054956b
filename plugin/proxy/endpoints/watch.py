"""Watch an endpoint that others start and stop, so that its phase is right without any request.

Every second a connection is opened and closed, which adds no line to an engine's access log. The readiness path is
requested every 10 s while it answers. A serving endpoint is lost after two refusals in a row, or when it is not ready
for 30 s (120 s while it has requests, since a busy engine may answer slowly). A stopped endpoint counts as serving as
soon as it is ready.

Replicas of `launch` are watched by their owner, not here.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

from plugin.proxy.descriptor_limit import SHORTAGE
from plugin.proxy.http.address import Upstream
from plugin.proxy.http.upstream_connection import connect
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import STARTING, Replica
from plugin.runtime.phases import Phase, PhaseTracker


class Watched(Protocol):
    """The part of an `endpoint.Endpoint` that a `Watch` needs."""

    tracker: PhaseTracker
    pool: ReplicaPool
    actions: int
    """Counts its wakes and sleeps: an observation before one says nothing after it."""
    acting: bool
    """True during a wake or a sleep, which checks the endpoint itself."""

    @property
    def upstream(self) -> Upstream:
        """Return the endpoint's address."""

    @property
    def may_start_elsewhere(self) -> bool:
        """Return True if others may start it, and a ready answer then proves that it serves."""

    async def ready(self) -> str | None:
        """Return None if its readiness path answers 200, else the reason."""

    async def is_up(self) -> bool:
        """Return True if it is ready and, if a model is named, generates a token."""

    def mark_up(self) -> None:
        """Mark it as serving."""

    def mark_lost(self, why: str) -> None:
        """Mark it as no longer serving."""


@dataclass(frozen=True)
class WatchIntervals:
    """Intervals and thresholds of a watch, in seconds."""

    every_s: float = 1.0
    probe_every_s: float = 10.0
    refusals: int = 2
    unready_s: float = 30.0
    unready_busy_s: float = 120.0
    connect_s: float = 2.0


class Watch:
    """Watch one endpoint until cancelled."""

    def __init__(self, watched: Watched, intervals: WatchIntervals) -> None:
        self.watched, self.intervals = watched, intervals
        self._reset()

    def _reset(self) -> None:
        self._refusals = 0
        self._unready_since: float | None = None
        self._probe_at = 0.0
        self._failed_probes = 0

    async def run(self) -> None:
        """Check the endpoint at intervals until cancelled."""
        actions, phase = -1, Phase.IDLE
        while True:
            await asyncio.sleep(self.intervals.every_s)
            watched = self.watched
            if (watched.actions, watched.tracker.phase) != (actions, phase):
                actions, phase = watched.actions, watched.tracker.phase
                self._reset()
            if watched.acting or phase in STARTING or phase is Phase.STOPPED:
                continue
            if phase is Phase.SERVING:
                why = await self._reason_lost()
                if why is not None and self._is_current(actions, phase):
                    watched.mark_lost(why)
            elif watched.may_start_elsewhere and await self._is_serving() and self._is_current(actions, phase):
                watched.mark_up()

    def _is_current(self, actions: int, phase: Phase) -> bool:
        """Return True if an observation still applies: no wake, sleep or change of phase has come in between."""
        return self.watched.actions == actions and self.watched.tracker.phase is phase and not self.watched.acting

    async def _connects(self) -> bool | None:
        """Return True if it accepts a connection, None if this host cannot tell."""
        try:
            connection = await connect(
                Replica("probe", PhaseTracker(), self.watched.upstream), self.intervals.connect_s
            )
        except TimeoutError:
            return None
        except OSError as exc:
            return None if exc.errno in SHORTAGE else False
        connection.abort()
        return True

    async def _reason_lost(self) -> str | None:
        """Return why a serving endpoint counts as lost, or None."""
        if await self._connects() is False:
            self._refusals += 1
            return "it refuses connections" if self._refusals >= self.intervals.refusals else None
        self._refusals = 0
        now = time.monotonic()
        if self._unready_since is None and now < self._probe_at:
            return None
        self._probe_at = now + self.intervals.probe_every_s
        why = await self.watched.ready()
        if why is None:
            self._unready_since = None
            return None
        self._unready_since = self._unready_since or now
        pool = self.watched.pool
        busy = pool.outstanding or pool.busy_elsewhere()
        unready_s = time.monotonic() - self._unready_since
        limit = self.intervals.unready_busy_s if busy else self.intervals.unready_s
        return f"not ready for {unready_s:.0f} s: {why}" if unready_s >= limit else None

    async def _is_serving(self) -> bool:
        """Return True if a stopped endpoint serves. Pauses grow while it listens but does not serve, since each check may cost a token."""
        now = time.monotonic()
        if now < self._probe_at or not await self._connects():
            return False
        if await self.watched.is_up():
            return True
        self._failed_probes += 1
        self._probe_at = now + min(self.intervals.probe_every_s, self.intervals.every_s * 2**self._failed_probes)
        return False
