"""The replicas behind one name: choose a replica per request, share one wake among waiting requests, put idle replicas to sleep.

An owner (launch, restore, `quickthaw proxy`) makes a `ReplicaPool`, adds replicas with their `PhaseTracker`, and may
pass hooks. `wake` brings at least one replica to serving, or raises an exception with a `code`. `sleep` stops idle
replicas or puts them to sleep, `standby` freezes them. `suspect` is called when a replica refused a connection. Trackers may move in any
thread; everything else happens on the loop passed to `bind`.

Guarantees:

- At most one wake runs at a time.
- A request gets a replica only while that replica serves and is not draining (sleep, `quiesced`). This is decided in one step with
  its count of outstanding requests. With `speculative`, a speculative request may also use a replica during its check; its answer is
  withheld until the check passes.
- A waiting request ends with a replica, a coded error, or its own cancellation.
- A failed start ends waiting requests only when the owner reports it as final (`start_failed`, or `wake` raising).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

from plugin.proxy.errors import ProxyError, Unavailable
from plugin.proxy.errors import start_failed as start_error
from plugin.proxy.http.address import Upstream
from plugin.proxy.pool import speculation
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.replica import FOUND_UP, KEEP_ENGINE, STARTING, Replica
from plugin.proxy.pool.sleeper import Sleeper
from plugin.proxy.pool.start_times import History, Kind
from plugin.proxy.pool.waiting import UNKNOWN_LEFT_S, Progress, Waiter
from plugin.proxy.pool.waker import Waker
from plugin.runtime.phases import Phase, PhaseTracker, Span

log = logging.getLogger("quickthaw.proxy")

_TICK_S = 0.1
_RECENT_S = 2.0


class ReplicaPool:
    """A set of replicas that answer the same requests."""

    def __init__(
        self,
        *,
        name: str = "default",
        wake: Callable[[], Awaitable[None]] | None = None,
        sleep: Callable[[], Awaitable[None]] | None = None,
        standby: Callable[[], Awaitable[None]] | None = None,
        suspect: Callable[[Replica, str], None] | None = None,
        history: History | None = None,
        sleep_after_s: float | None = None,
        standby_after_s: float | None = None,
        speculative: bool = False,
        wake_limit_s: float = 1800.0,
        sleep_limit_s: float = 300.0,
        drain_limit_s: float = 60.0,
    ) -> None:
        """`drain_limit_s`: maximum seconds that `evict` waits for requests in flight; after that the pool continues to serve."""
        self.name = name
        self.replicas: dict[str, Replica] = {}
        self.history = history or History()
        self.sleep_after_s, self.standby_after_s = sleep_after_s, standby_after_s
        self.speculative = speculative
        self.max_held, self.max_hold_s, self.last_active = 4096, 3600.0, time.monotonic()
        self.probes = 0
        """How many of the outstanding requests do not count as use (`path_rules.Verdict.QUIET`)."""
        self.on_phase: list[Callable[[Replica, Phase, str], None]] = []
        """Callbacks (replica, phase, reason), run on the loop after each change of phase."""
        self.background: list[Callable[[], Coroutine[None, None, None]]] = []
        """Coroutine functions that run on the loop for as long as the pool is served."""
        self.busy_elsewhere: Callable[[], int] = lambda: 0
        """Returns how many requests are held or in flight in worker processes that share this pool."""
        self.facts: Callable[[], Facts] = Facts
        """Returns the names and sizes of what it serves."""
        self.next_kind: Callable[[], Kind | None] = lambda: None
        """Returns the kind of the next start, or None where the owner does not know it before it runs."""
        self.started_here = True
        """False when this process cannot start a replica; requests then wait for another process to start one."""
        self.held_for_others = 0
        """How many other proxies want its replicas quiet (kubernetes.agreement); while any does, requests are held and nothing is woken."""
        self.upstream_timeout_s: float | None = None
        """Maximum seconds that a replica may be silent within an answer; None uses the proxy's setting."""
        self._suspect_hook = suspect
        self.waker = Waker(self, wake, wake_limit_s)
        self.sleeper = Sleeper(self, sleep, sleep_limit_s, drain_limit_s, standby)
        self._waiters: dict[Waiter, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unbound: list[tuple[Replica, Phase, Phase, str, tuple[Span, ...]]] = []
        self._ticking, self._rotation = False, 0
        self._closed: ProxyError | None = None

    # -- the owner's API ---------------------------------------------------------------------------

    def bind(self, loop: asyncio.AbstractEventLoop, *, max_held: int = 4096, max_hold_s: float = 3600.0) -> None:
        """Attach the pool to the loop that serves it and process the transitions so far. `ProxyServer.start` calls this."""
        self._loop = loop
        self.max_held, self.max_hold_s = max_held, max_hold_s
        unbound, self._unbound = self._unbound, []
        for change in unbound:
            self._moved(*change)
        for replica in self.replicas.values():
            # A fast restore may be in its check before this process has finished its imports.
            self._note_check(replica, replica.tracker.phase)

    def add(
        self,
        name: str,
        tracker: PhaseTracker,
        upstream: Upstream | None = None,
        *,
        recording: Callable[[], bool] = lambda: False,
    ) -> Replica:
        """Add a replica; it gets requests whenever its tracker is in the serving phase. `recording`: see `Replica`."""
        replica = Replica(name, tracker, upstream)
        replica.recording = recording
        if tracker.phase is not Phase.IDLE:
            replica.catch_up()
            known = tracker.phase is Phase.SERVING and tracker.reason != FOUND_UP
            if known and replica.start_kind is not None:
                self.history.record(replica.start_kind, replica.start_age_s, replica.spans)
        self.replicas[name] = replica
        tracker.listen(lambda old, new, reason: self._on_transition(replica, old, new, reason))
        if self._loop is not None:
            self._note_check(replica, tracker.phase)
            self.dispatch()
        return replica

    def remove(self, name: str) -> None:
        """Remove a replica from the pool. Its requests in flight continue to their end."""
        replica = self.replicas.pop(name, None)
        if replica is not None:
            replica.draining = True
            self.close_idle(replica)

    def start_failed(self, error: Exception) -> None:
        """Report from any thread that a start has finally failed.

        Held requests end with its code, and so do new requests until another start begins.
        """
        assert self._loop is not None, "the pool is bound to a loop before it serves"
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self.waker.fail_finally(start_error(error))
        else:
            self._loop.call_soon_threadsafe(self.waker.fail_finally, start_error(error))

    async def wake(self) -> None:
        """Return when at least one replica serves; start a wake unless one is running.

        Raises ProxyError with the owner's code when the start has finally failed.
        """
        self.release(await self.acquire(self.waker.limit_s, unbounded=True))

    async def sleep(self) -> bool:
        """Put the pool to sleep if no request is in flight or held. Return True if it went to sleep."""
        return await self.sleeper.sleep()

    @asynccontextmanager
    async def quiesced(self, name: str, limit_s: float) -> AsyncIterator[Replica]:
        """Drain one replica, as before taking its snapshot: send it no new requests and wait for those in flight.

        Raises TimeoutError if it was still answering after `limit_s` seconds.
        """
        replica = self.replicas[name]
        replica.draining = True
        try:
            async with asyncio.timeout(limit_s):
                await replica.wait_idle()
            self.close_idle(replica)
            yield replica
        finally:
            replica.draining = False
            self.dispatch()

    def close(self, error: ProxyError) -> None:
        """End all held and all future requests with `error`; cancel a wake or sleep in progress."""
        self._closed = error
        self.waker.fail(error)
        for replica in self.replicas.values():
            self.close_idle(replica)
        for task in (self.waker.task, self.sleeper.task):
            if task is not None:
                task.cancel()

    async def wait_settled(self, limit_s: float = 20.0) -> None:
        """Wait, after `close`, until the wake or sleep that it cancelled has cleaned up."""
        tasks = [task for task in (self.waker.task, self.sleeper.task) if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=limit_s)

    # -- the proxy's API ---------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Return the number of requests waiting for a replica."""
        return len(self._waiters)

    @property
    def closed(self) -> bool:
        """Return True once the pool answers no more requests."""
        return self._closed is not None

    @property
    def kept_awake(self) -> bool:
        """Return True if an engine holds state that no start restores (plugin.proxy.pool.adapters)."""
        return any(replica.adapters_loaded for replica in self.replicas.values())

    @property
    def outstanding(self) -> int:
        """Return the number of requests that replicas are answering."""
        return sum(replica.outstanding for replica in self.replicas.values())

    @property
    def wanted(self) -> bool:
        """Return True if a client waits for this pool, here or in a worker, or did within the last 2 s."""
        recent = time.monotonic() - self.last_active < _RECENT_S
        return recent or any(waiter.client for waiter in self._waiters) or bool(self.busy_elsewhere())

    def try_acquire(self) -> Replica | None:
        """Return the least loaded serving replica, counting the request as outstanding; None if the request must be held."""
        if self._waiters or self._closed is not None:
            return None
        replica = self.ready()
        if replica is not None:
            replica.outstanding += 1
        return replica

    async def acquire(
        self,
        limit_s: float | None = None,
        *,
        at_most_s: float = math.inf,
        since: float | None = None,
        unbounded: bool = False,
        speculative: bool = False,
    ) -> Replica:
        """Return a serving replica, waking the pool and waiting if necessary.

        Args:
            limit_s: the configured deadline in seconds; None uses the measured one.
            at_most_s: the client's own limit in seconds; it lowers the deadline and never raises it.
            since: arrival of the request (monotonic seconds), where its deadline starts; None is now.
            unbounded: do not count against `max_held` (an owner's own wait).
            speculative: accept a replica that is under check and not serving yet (`Replica.check`).

        Raises:
            Unavailable: too many are held, or the deadline passed.
            StartFailed: the start failed for good.
        """
        if self._closed is not None:
            raise self._closed.fresh()
        replica = self.try_acquire()
        if replica is not None:
            return replica
        if not unbounded and len(self._waiters) >= self.max_held:
            raise Unavailable(
                "held-too-many", f"{self.max_held} requests are held already", retry_after_s=self.left_s()
            )
        if (refusal := self.waker.refusal()) is not None:
            raise refusal
        now = time.monotonic()
        since = now if since is None else since
        least = at_most_s if limit_s is None else min(limit_s, at_most_s)
        if now - since >= least:
            self.begin_wake()
            raise Unavailable(
                "hold-deadline", f"no replica was ready within {least:.1f} s", retry_after_s=self.left_s()
            )
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop.create_future(), limit_s, at_most_s, since, speculative, client=not unbounded)
        self._waiters[waiter] = None
        self._speculate()
        self.waker.demand()
        self._tick_soon(loop)
        try:
            return await waiter.ready
        except asyncio.CancelledError:
            if waiter.ready.done() and not waiter.ready.cancelled() and waiter.ready.exception() is None:
                self.release(waiter.ready.result())
            raise
        finally:
            self._waiters.pop(waiter, None)
            self.last_active = time.monotonic()

    @property
    def waking(self) -> bool:
        """Return True while a wake is running."""
        return self.waker.task is not None

    def accepts(self) -> bool:
        """Return True if a new request would be held or answered rather than refused at once."""
        return self._closed is None and len(self._waiters) < self.max_held and self.waker.refusal() is None

    def wants_speculation(self) -> bool:
        """Return True if a waiting request may run beside a replica's check. Callable from any thread."""
        return self.speculative and any(
            waiter.speculative and not waiter.ready.done() for waiter in list(self._waiters)
        )

    async def cancel_speculation(self, name: str) -> bool:
        """Cancel the speculative requests on a replica whose check needs the engine alone. Return True if there were any.

        No speculative request runs on it again until it serves.
        """
        return await speculation.cancel(self.replicas[name])

    def begin_wake(self) -> None:
        """Start a wake, if one is needed, for a request that will be held but is not waiting yet."""
        self.last_active = time.monotonic()
        self.waker.demand()

    def release(self, replica: Replica, used: bool = True) -> None:
        """Release a replica that `acquire` returned; call it exactly once per acquire. `used`: the request counts as use."""
        replica.outstanding -= 1
        if replica.outstanding == 0 and replica.drained_event is not None:
            replica.drained_event.set()
        if used:
            self.last_active = time.monotonic()

    def refused(self, replica: Replica, generation: int, why: str) -> None:
        """Record that a serving replica refused a connection: prefer others for a pause that doubles with each refusal in a row.

        Ignored unless `generation` is current. Calls the owner's `suspect` hook.
        """
        if generation != replica.generation:
            return
        pause = replica.refusals.failed()
        replica.suspect_until = time.monotonic() + pause
        if replica.refusals.failures == 2:
            text = "%s refuses connections though it is serving (%s); the pauses between tries grow to %.0f s"
            fields = {"pool": self.name, "replica": replica.name, "reason": why}
            log.warning(text, replica.name, why, replica.refusals.most_s, extra={"event": "refusing", "fields": fields})
        self.close_idle(replica)
        if self._suspect_hook is not None:
            self._suspect_hook(replica, why)

    def progress(self) -> Progress:
        """Return the progress of the start that requests wait for."""
        best = max(self.replicas.values(), key=lambda r: (r.tracker.phase in STARTING, r.start_age_s), default=None)
        phase = best.tracker.phase if best else Phase.IDLE
        expected = self.next_kind() or self.history.guess_kind()
        if best is None or phase not in STARTING:
            kind, elapsed = expected, 0.0
            left = self.history.typical(kind)
        else:
            kind, elapsed = best.start_kind or expected, best.start_age_s
            left = self.history.left(kind, elapsed, phase, best.tracker.seconds_in_phase)
        if not self.started_here:
            left = UNKNOWN_LEFT_S
        step = best.step if best and phase in STARTING else ""
        return Progress(phase, kind, elapsed, elapsed + left, left, self.started_here, step)

    def left_s(self) -> float:
        """Return the seconds until a replica is expected to serve, for Retry-After."""
        return self.progress().left_s

    # -- internals ---------------------------------------------------------------------------------

    def ready(self) -> Replica | None:
        """Return the replica for the next request, or None if the request must wait."""
        if self.held_for_others:
            return None
        now, best, load = time.monotonic(), None, 0
        replicas = self.replicas
        if len(replicas) > 1:
            self._rotation += 1
            order = list(replicas.values())
            cut = self._rotation % len(order)
            candidates = order[cut:] + order[:cut]
        else:
            candidates = list(replicas.values())
        for replica in candidates:
            if replica.tracker.phase is not Phase.SERVING or replica.draining or replica.suspect_until > now:
                continue
            if replica.upstream is None:
                continue
            if best is None or replica.outstanding < load:
                best, load = replica, replica.outstanding
        return best

    def _on_transition(self, replica: Replica, old: Phase, new: Phase, reason: str) -> None:
        """Handle a tracker's transition, in the thread that made it."""
        if new is Phase.SERVING:
            replica.generation += 1  # increment now: a refusal by the old incarnation may still be queued on the loop
        before = replica.tracker.timeline
        if self._loop is None:
            self._unbound.append((replica, old, new, reason, before))
            return
        try:
            self._loop.call_soon_threadsafe(self._moved, replica, old, new, reason, before)
        except RuntimeError:
            log.debug("a replica moved after the proxy's loop had closed", extra={"fields": {"phase": str(new)}})

    def _moved(self, replica: Replica, old: Phase, new: Phase, reason: str, before: tuple[Span, ...]) -> None:
        replica.record(old, new, before)
        self._note_check(replica, new)
        fields: dict[str, object]
        fields = {"pool": self.name, "replica": replica.name, "from": str(old), "to": str(new), "reason": reason}
        log.info("%s: %s → %s", replica.name, old, new, extra={"event": "phase", "fields": fields})
        if new in STARTING:
            self.waker.final = None
        if old is Phase.SERVING and new is not Phase.SERVING:
            self.close_idle(replica)
        replica.adapters_loaded = replica.adapters_loaded and new in KEEP_ENGINE
        if new is Phase.SERVING:
            replica.suspect_until = 0.0
            self.waker.pause.succeeded()
            if old in STARTING:
                replica.clear_refusals()
                self.sleeper.forget_failures()
            kind = replica.start_kind
            if kind is not None and old in STARTING and reason != FOUND_UP:
                spans = replica.spans
                self.history.record(kind, replica.start_age_s, spans)
                phases = {str(span.phase): round(span.took_s, 4) for span in spans}
                seconds = round(replica.start_age_s, 4)
                took = {"kind": str(kind), "seconds": seconds, "phases": phases, "held": self.held}
                fields = {"pool": self.name, "replica": replica.name} | took
                text = "%s: serving after %.2f s (%s)"
                log.info(text, replica.name, replica.start_age_s, kind, extra={"event": "started", "fields": fields})
            self.last_active = time.monotonic()
        for notify in self.on_phase:
            notify(replica, new, reason)
        self.dispatch()

    def _note_check(self, replica: Replica, phase: Phase) -> None:
        if self.speculative and self._loop is not None:
            speculation.note_check(replica, phase, self._loop)

    def _speculate(self) -> None:
        speculation.assign_speculatively(self.replicas.values(), self._waiters, self._assign)

    def _assign(self, waiter: Waiter, replica: Replica) -> None:
        replica.outstanding += 1
        waiter.ready.set_result(replica)
        self._waiters.pop(waiter, None)

    def dispatch(self) -> None:
        """Hand ready replicas to waiting requests in order of arrival, then start a wake if one is needed."""
        if self._closed is None:
            for waiter in list(self._waiters):
                if waiter.ready.done():
                    continue
                replica = self.ready()
                if replica is None:
                    break
                self._assign(waiter, replica)
            if self._waiters:
                self._speculate()
            if self._waiters:
                self.waker.demand()

    def end_waiting(self, error: ProxyError) -> None:
        """End all waiting requests with `error`."""
        for waiter in list(self._waiters):
            if not waiter.ready.done():
                waiter.ready.set_exception(error.fresh())
        self._waiters.clear()

    def close_idle(self, replica: Replica) -> None:
        """Close the unused connections to a replica."""
        idle, replica.idle = replica.idle, []
        for connection in idle:
            connection.abort()

    def _tick_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._ticking:
            self._ticking = True
            loop.call_later(_TICK_S, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Repeat while requests wait: retry suspect replicas, start a wake if needed, expire deadlines.

        A replica that serves is given out first: its start has just ended, perhaps in another thread.
        """
        self._ticking = False
        self.dispatch()
        if not self._waiters:
            return
        now, progress = time.monotonic(), self.progress()
        measured = self.history.deadline(progress.kind)
        for waiter in list(self._waiters):
            waiter.measured_s = max(waiter.measured_s, measured)
            limit = waiter.measured_s if waiter.limit_s is None else waiter.limit_s
            limit = min(self.max_hold_s, limit, waiter.at_most_s)
            if now - waiter.began >= limit and not waiter.ready.done():
                message = f"no replica was ready within {limit:.1f} s ({progress.sentence()})"
                waiter.ready.set_exception(Unavailable("hold-deadline", message, retry_after_s=progress.left_s))
                self._waiters.pop(waiter, None)
        if self._waiters:
            self._tick_soon(loop)
