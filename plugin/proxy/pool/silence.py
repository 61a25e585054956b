"""Detect a silent replica: its process lives and its port accepts connections, but no data comes back.

Every byte that a replica sends is a sign of life. A replica that has requests and sends nothing is probed every few
seconds with a small GET on a separate connection. A busy engine answers it, since its HTTP server is another thread or
process. An answer does not count while the owner sees that one of the engine's processes is stopped.

After a third of the limit the replica is suspect and gets no new requests; after the whole limit the owner's callback
runs. Only time with an unanswered probe counts, and only while this process runs: a suspended host does not cause false
alarms.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from plugin.proxy.descriptor_limit import SHORTAGE
from plugin.proxy.endpoints.request import fetch
from plugin.proxy.errors import UpstreamFault
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.runtime.phases import IllegalTransition, Phase

log = logging.getLogger("quickthaw.proxy")
_PROBE_AFTER_S = 5.0
_ANSWER_S = 10.0
_PAGE = "/v1/models"
"""The HTTP server of either engine answers this by itself, with whatever status."""


@dataclass
class _State:
    """What is known about one replica since it last reached serving."""

    generation: int
    silent_s: float = 0.0
    probed_at: float = 0.0
    probe: asyncio.Task[None] | None = None
    reported: bool = False


class Silence:
    """Watch the replicas of one pool. `on_silent(replica, why)` runs on the loop, at most once per incarnation of a replica."""

    def __init__(self, pool: ReplicaPool, limit_s: float, on_silent: Callable[[Replica, str], None]) -> None:
        self.pool, self.limit_s, self._on_silent = pool, limit_s, on_silent
        self.suspect_s = limit_s / 3
        self.probe_after_s = min(_PROBE_AFTER_S, limit_s / 6)
        self._every_s = min(1.0, limit_s / 12)
        self._states: dict[str, _State] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        last = time.monotonic()
        try:
            while True:
                await asyncio.sleep(self._every_s)
                now = time.monotonic()
                passed, last = min(now - last, 2 * self._every_s), now
                for replica in tuple(self.pool.replicas.values()):
                    self._check(replica, now, passed)
        finally:
            for state in self._states.values():
                if state.probe is not None:
                    state.probe.cancel()

    def _check(self, replica: Replica, now: float, passed_s: float) -> None:
        state = self._states.get(replica.name)
        if state is None or state.generation != replica.generation:
            if state is not None and state.probe is not None:
                state.probe.cancel()
            state = self._states[replica.name] = _State(replica.generation)
            replica.last_byte = max(replica.last_byte, now)
        phase = replica.tracker.phase
        # Once in doubt, probe until it answers, even when the waiting clients have given up.
        doubted = replica.outstanding > 0 or state.probed_at > replica.last_byte or phase is Phase.SUSPECT
        # While pages are still to come, the page server's own check decides instead.
        if phase not in (Phase.SERVING, Phase.SUSPECT) or not doubted or replica.draining or replica.pages_pending():
            state.silent_s = 0.0
            return
        if replica.last_byte > state.probed_at or state.probed_at == 0.0:
            state.silent_s = 0.0
            if phase is Phase.SUSPECT:
                self._trust(replica)
        else:
            state.silent_s += passed_s
        if now - max(replica.last_byte, state.probed_at) >= self.probe_after_s and state.probe is None:
            if replica.last_byte >= state.probed_at:
                state.probed_at = now  # first probe since its last byte: silence counts from here
            state.probe = asyncio.get_running_loop().create_task(self._probe(replica, state))
        if state.silent_s >= self.suspect_s and phase is Phase.SERVING:
            self._suspect(replica, state)
        if state.silent_s >= self.limit_s and not state.reported:
            state.reported = True
            self._on_silent(replica, f"it has sent nothing for {state.silent_s:.0f} s, though it runs")

    async def _probe(self, replica: Replica, state: _State) -> None:
        """Send a probe; any answer is a sign of life."""
        upstream = replica.upstream
        assert upstream is not None
        try:
            with contextlib.suppress(UpstreamFault):  # a bad answer is a sign of life too
                await fetch(upstream, "GET", _PAGE, limit_s=min(_ANSWER_S, self.limit_s))
            if not await asyncio.to_thread(replica.stopped):
                replica.last_byte = time.monotonic()
        except OSError as exc:
            if exc.errno in (*SHORTAGE, errno.EADDRNOTAVAIL):
                state.silent_s = 0.0  # this host's fault
            await asyncio.sleep(min(self._every_s, self.probe_after_s))
        finally:
            state.probe = None

    def _suspect(self, replica: Replica, state: _State) -> None:
        why = f"replica-silent: it has sent nothing for {state.silent_s:.0f} s"
        self._move(replica, Phase.SUSPECT, why)
        text = "%s: %s; it gets no new requests, and is restarted after %.0f s of silence"
        fields = {"pool": self.pool.name, "replica": replica.name, "reason": why}
        log.warning(text, replica.name, why, self.limit_s, extra={"event": "suspect", "fields": fields})

    def _trust(self, replica: Replica) -> None:
        self._move(replica, Phase.SERVING, "answers again")

    @staticmethod
    def _move(replica: Replica, phase: Phase, why: str) -> None:
        try:
            replica.tracker.to(phase, why)
        except IllegalTransition:
            log.debug("%s changed its phase by itself before it became %s", replica.name, phase)
