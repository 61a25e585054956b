"""One running engine as the proxy sees it: where it listens, what phase it is in, and how much it is doing."""

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
    from plugin.proxy.http.upstream_connection import BackConnection

STARTING = frozenset(
    {Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING, Phase.SHRINKING, Phase.CHECKPOINTING}
    | {Phase.RESUMING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING}
)

FOUND_UP = "found up"
"""The reason of a serving replica that somebody else has started: how long that took is not known here."""


class Replica:
    """One running engine as the proxy sees it. `upstream` may be set later, but before the tracker says serving."""

    def __init__(self, name: str, tracker: PhaseTracker, upstream: Upstream | None = None) -> None:
        self.name, self.tracker, self.upstream = name, tracker, upstream
        self.outstanding = 0
        self.served = 0
        self.held_back = False
        """True while the replica is quiesced or being put to sleep: it keeps what it has and gets nothing new."""
        self.suspect_until = 0.0
        self.adapters_loaded = False
        """Whether clients have loaded LoRA adapters into this very engine (plugin.proxy.pool.adapters)."""
        self.refusals = Backoff(0.5, 30.0)
        """Connections that it refused in a row while it was serving."""
        self.woken_at = 0
        """How many refusals there were when the owner was last asked to wake the pool."""
        self.generation = 0
        """How often it has come to serving: a refusal by an earlier incarnation says nothing about this one."""
        self.idle: list[BackConnection] = []
        self.connecting: asyncio.Semaphore | None = None
        self.emptied: asyncio.Event | None = None
        self.over = True
        """True once the last start has ended, well or finally badly: what begins then is another start. A restore that
        failed and goes on cold is still the same one.
        """
        self.check: asyncio.Future[bool] | None = None
        """While a restored replica is compared with its snapshot: done when that has ended, or requests that run ahead are
        taken back.
        """
        self.coming: Callable[[], bool] = lambda: False
        """Whether pages of it are still to come from a page server: then it may be ended under its requests (`lost`)."""
        self.lost: Callable[[], str] = str
        """Why its owner ended it, where that is since pages did not come or it was silent; else empty."""
        self.guarded = False
        """Whether its owner ends it when it is silent (`silence`): then requests without an answer are asked again."""
        self.stopped: Callable[[], bool] = lambda: False
        """Whether one of its processes is stopped, as its owner sees it; may block."""
        self.last_byte = 0.0
        """When it last sent anything (monotonic seconds)."""
        self.pages: Callable[[], dict[str, float]] = dict
        """What its page servers have counted so far (plugin.runtime.paging); empty where it never had one."""
        self._phases: list[Phase] = []
        self._began = time.monotonic()
        self._skip = 0

    def note(self, old: Phase, new: Phase, before: tuple[Span, ...] = ()) -> None:
        """Follow the start that is under way, for its kind, its age and its spans; `before` is the tracker's timeline
        at this change.
        """
        if new in STARTING and (self.over or old is not Phase.FAILED) and old not in STARTING:
            self._phases, self.over = [], False
            self._began = time.monotonic()
            self._skip = len(before)
        self._phases.append(new)
        if new is Phase.SERVING:
            self.over = True

    def catch_up(self) -> None:
        """Follow a start that began, and may have ended, before anybody listened."""
        phase, spans = self.tracker.phase, self.tracker.timeline
        old = Phase.IDLE
        for new in (*(span.phase for span in spans), phase):
            self.note(old, new)
            old = new
        in_phase = 0.0 if phase is Phase.SERVING else self.tracker.seconds_in_phase
        self._began = time.monotonic() - in_phase - sum(span.took_s for span in spans)

    def accepts(self) -> None:
        """It took a connection: forget its refusals."""
        if self.refusals.failures:
            self.refusals.succeeded()
            self.woken_at = 0

    @property
    def refusal_woken(self) -> bool:
        """Whether it is paused for refusing connections, and a wake since its last refusal changed nothing."""
        paused = self.suspect_until > time.monotonic() and self.tracker.phase is Phase.SERVING
        return paused and self.refusals.failures > 1 and self.woken_at == self.refusals.failures

    @property
    def returns(self) -> bool:
        """Whether it will take requests again by itself: it is starting, quiesced, or suspected."""
        return self.held_back or self.tracker.phase in STARTING or self.tracker.phase is Phase.SUSPECT

    @property
    def spans(self) -> tuple[Span, ...]:
        """The finished phases of the current start alone, from its own beginning."""
        mine = self.tracker.timeline[self._skip :]
        return tuple(Span(span.phase, span.at_s - mine[0].at_s, span.took_s) for span in mine)

    async def quiet(self) -> None:
        """Return once it answers nothing; bounded by the limits of the requests in flight, and by whoever calls."""
        while self.outstanding:
            self.emptied = self.emptied or asyncio.Event()
            self.emptied.clear()
            await self.emptied.wait()

    @property
    def start_kind(self) -> Kind | None:
        """The kind of the current start, None while nothing tells."""
        return kind_of(self._phases)

    @property
    def start_age_s(self) -> float:
        """Seconds since the current start began."""
        return time.monotonic() - self._began
