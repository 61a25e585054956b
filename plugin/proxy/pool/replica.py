"""One running engine as the proxy sees it: its address, its phase, and its load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from plugin.proxy.http.address import Upstream
from plugin.proxy.pool.backoff import Backoff
from plugin.proxy.pool.start_times import Kind, kind_of
from plugin.runtime.phases import Phase, PhaseTracker, Span

if TYPE_CHECKING:
    from plugin.proxy.http.upstream_connection import UpstreamConnection

STARTING = frozenset(
    {Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING, Phase.TRIMMING, Phase.CHECKPOINTING}
    | {Phase.RESUMING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING}
)

KEEP_ENGINE = frozenset({Phase.SERVING, Phase.SUSPECT, Phase.STANDBY, Phase.WAKING, Phase.VERIFYING})
"""Phases in which a replica's engine is the one that served before."""

FOUND_UP = "found up"
"""The reason of a serving replica that another process has started; its start time is unknown here."""


class Replica:
    """One running engine as the proxy sees it. Set `upstream` before the tracker reaches serving."""

    def __init__(self, name: str, tracker: PhaseTracker, upstream: Upstream | None = None) -> None:
        self.name, self.tracker, self.upstream = name, tracker, upstream
        self.outstanding = 0
        self.served = 0
        self.first_start = tracker.phase is Phase.IDLE or tracker.phase in STARTING
        """True until it first serves or sleeps: what asks for it then waits, as for any engine that loads."""
        self.draining = False
        """True while the replica drains (`quiesced`, or going to sleep): it finishes its requests and gets no new ones."""
        self.suspect_until = 0.0
        self.adapters_loaded = False
        """True if clients have loaded LoRA adapters into this engine process (plugin.proxy.pool.adapters)."""
        self.refusals = Backoff(0.5, 30.0)
        """Connections that it refused in a row while it was serving."""
        self.woken_at = 0
        """Number of refusals at the time of the last wake."""
        self.generation = 0
        """How often it has reached serving. A refusal by an earlier incarnation does not count against this one."""
        self.idle: list[UpstreamConnection] = []
        self.connecting: asyncio.Semaphore | None = None
        self.drained_event: asyncio.Event | None = None
        self.step = ""
        """How far its start is, in its owner's words, where these say more than the phase (a pod that is scheduled)."""
        self.start_ended = True
        """True once the last start has ended, in success or final failure; the next phase then begins a new start. A
        failed restore that continues as a cold start is one start.
        """
        self.check: asyncio.Future[bool] | None = None
        """Pending while a restored replica is compared with its snapshot. Resolves to True when the check passes, to False
        when it fails or when the speculative requests are cancelled.
        """
        self.pages_pending: Callable[[], bool] = lambda: False
        """Returns True if pages are still to come from a page server; the replica may be killed under its requests until then."""
        self.kill_reason: Callable[[], str] = str
        """Returns why its owner killed it (missing pages, or silence), else ""."""
        self.killed_when_silent = False
        """True if its owner kills it when it is silent (`silence`); requests without an answer are then retried."""
        self.stopped: Callable[[], bool] = lambda: False
        """Returns True if the owner sees that one of its processes is stopped (SIGSTOP); may block."""
        self.last_byte = 0.0
        """When it last sent anything (monotonic seconds)."""
        self.pages: Callable[[], dict[str, float]] = dict
        """Returns its page servers' totals so far (plugin.runtime.steps.paging); empty if it never had one."""
        self.recording: Callable[[], bool] = lambda: False
        """Returns True if its restore records the snapshot's working set, which takes longer than a later restore."""
        self.engine_pid: Callable[[], int | None] = lambda: None
        """Returns the host PID of the root of its engine's processes, or None if none runs or it is unknown."""
        self.address: Callable[[], str] = lambda: self.upstream.name if self.upstream else ""
        """Returns its engine's address, for the admin page."""
        self.memory_bytes: int | None = None
        """Memory that its processes held at `measured_at` (monotonic seconds; plugin.proxy.admin.costs), None if unknown."""
        self.gpu_bytes: int | None = None
        self.measured_at = 0.0
        self._phases: list[Phase] = []
        self._began = time.monotonic()
        self._skip = 0

    def record(self, old: Phase, new: Phase, before: tuple[Span, ...] = ()) -> None:
        """Update the current start's kind, age and spans. `before` is the tracker's timeline at this change."""
        if new in STARTING and (self.start_ended or old is not Phase.FAILED) and old not in STARTING:
            self._phases, self.start_ended = [], False
            self._began = time.monotonic()
            self._skip = len(before)
        self._phases.append(new)
        self.first_start = self.first_start and new not in (Phase.SERVING, Phase.STANDBY, Phase.ASLEEP)
        if new is Phase.SERVING:
            self.start_ended = True

    def catch_up(self) -> None:
        """Reconstruct a start that began, and may have ended, before this replica was added."""
        phase, spans = self.tracker.phase, self.tracker.timeline
        old = Phase.IDLE
        for new in (*(span.phase for span in spans), phase):
            self.record(old, new)
            old = new
        in_phase = 0.0 if phase is Phase.SERVING else self.tracker.seconds_in_phase
        self._began = time.monotonic() - in_phase - sum(span.took_s for span in spans)

    def clear_refusals(self) -> None:
        """Reset its refusals after an accepted connection."""
        if self.refusals.failures:
            self.refusals.succeeded()
            self.woken_at = 0

    @property
    def refuses_after_wake(self) -> bool:
        """Return True if it is paused for refusing connections and no wake is worth trying: one since its last refusal did not help."""
        paused = self.suspect_until > time.monotonic() and self.tracker.phase is Phase.SERVING
        return paused and self.refusals.failures > 1 and self.woken_at == self.refusals.failures

    @property
    def will_recover(self) -> bool:
        """Return True if it will take requests again by itself: it is starting, draining, or suspect."""
        return self.draining or self.tracker.phase in STARTING or self.tracker.phase is Phase.SUSPECT

    @property
    def spans(self) -> tuple[Span, ...]:
        """Return the finished phases of the current start only, with times from its own beginning."""
        mine = self.tracker.timeline[self._skip :]
        return tuple(Span(span.phase, span.at_s - mine[0].at_s, span.took_s) for span in mine)

    async def wait_idle(self) -> None:
        """Return once no request is outstanding. The requests' own limits bound the wait, and so may the caller."""
        while self.outstanding:
            self.drained_event = self.drained_event or asyncio.Event()
            self.drained_event.clear()
            await self.drained_event.wait()

    @property
    def start_kind(self) -> Kind | None:
        """Return the kind of the current start, or None while it is unknown."""
        kind = kind_of(self._phases)
        return Kind.FIRST_RESTORE if kind is Kind.RESTORED and self.recording() else kind

    @property
    def start_age_s(self) -> float:
        """Return the seconds since the current start began."""
        return time.monotonic() - self._began
