"""Put a pool to standby or to sleep, when it is idle or to make room for another, with a limit on draining and a backoff after failures.

Standby keeps the engine's memory and gives it no processor time; asleep, no engine runs. A pool that is asked to make
room goes to standby where it has a way there, else to sleep.

Guarantees: new requests wait from the beginning of a move to its end; none is lost in between. A pool that does not
drain in time or fails to move continues as it was, and `evict` raises the reason. Each reason is logged once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from plugin.proxy.errors import ProxyError, StartFailed, Unavailable, Unneeded, start_failed
from plugin.proxy.pool.backoff import Backoff
from plugin.proxy.pool.replica import STARTING, Replica
from plugin.runtime.phases import Phase

log = logging.getLogger("quickthaw.proxy")
Hook = Callable[[], Awaitable[None]]


class SleepingPool(Protocol):
    """The part of a pool (`pool.ReplicaPool`) that a `Sleeper` needs."""

    name: str
    replicas: dict[str, Replica]
    sleep_after_s: float | None
    standby_after_s: float | None
    last_active: float
    busy_elsewhere: Callable[[], int]

    @property
    def held(self) -> int:
        """Return the number of requests waiting for a replica."""

    @property
    def outstanding(self) -> int:
        """Return the number of requests that replicas are answering."""

    @property
    def kept_awake(self) -> bool:
        """Return True if an engine holds state that no start restores."""

    @property
    def waking(self) -> bool:
        """Return True while a wake is running."""

    def ready(self) -> Replica | None:
        """Return the replica for the next request, or None."""

    def close_idle(self, replica: Replica) -> None:
        """Close the unused connections to a replica."""

    def dispatch(self) -> None:
        """Retry the waiting requests."""


@dataclass(eq=False)
class Rung:
    """One way down: standby, which keeps the engine, or sleep, which ends it."""

    name: str
    hook: Hook | None
    """None if there is no way."""
    ends_engine: bool
    pause: Backoff = field(default_factory=lambda: Backoff(1.0, 300.0))
    failure: ProxyError | None = None
    """Why the last attempt failed; None after one that succeeded."""
    moves: int = 0


class Sleeper:
    """Put one pool in standby or to sleep; at most one attempt runs at a time."""

    def __init__(
        self, pool: SleepingPool, hook: Hook | None, limit_s: float, drain_limit_s: float, standby: Hook | None = None
    ) -> None:
        """`hook` ends the engine, `standby` freezes it; None if there is no way.

        Limits in seconds: `limit_s` for a hook; `drain_limit_s` for requests in flight when another pool needs the room.
        """
        self.pool, self.limit_s, self.drain_limit_s = pool, limit_s, drain_limit_s
        self.down, self.frozen = Rung("sleep", hook, True), Rung("standby", standby, False)
        self.evicts_to_standby = False
        """True if `evict` moves the pool to standby."""
        self.task: asyncio.Task[ProxyError | None] | None = None
        self.evicting = False
        self._until = math.inf
        self._wanted: Callable[[], bool] = lambda: True
        self._rung = self.down
        """Where the last move went."""

    @property
    def pause(self) -> Backoff:
        """Return the pause after sleeps that failed."""
        return self.down.pause

    @property
    def sleeps(self) -> int:
        """Return how often it went to sleep."""
        return self.down.moves

    @property
    def standbys(self) -> int:
        """Return how often it went to standby."""
        return self.frozen.moves

    @property
    def watches(self) -> bool:
        """Return True if the pool goes to standby or to sleep when it is idle."""
        return self.pool.sleep_after_s is not None or self.pool.standby_after_s is not None

    @property
    def in_standby(self) -> bool:
        """Return True if no replica serves or starts, and one is in standby."""
        phases = {replica.tracker.phase for replica in self.pool.replicas.values()}
        return Phase.STANDBY in phases and not phases & (STARTING | {Phase.SERVING, Phase.SUSPECT})

    async def sleep(self) -> bool:
        """Put the pool to sleep if no request is in flight or held. Return True if it went to sleep."""
        if self._busy(self.down) or self.pool.kept_awake or not (self.pool.ready() is not None or self.in_standby):
            return False
        return await self._begin(self._run(self.down)) is None

    async def standby(self) -> bool:
        """Put the pool in standby if it serves and no request is in flight or held. Return True if it is in standby now."""
        if self._busy(self.frozen) or self.pool.ready() is None:
            return False
        return await self._begin(self._run(self.frozen)) is None

    def _busy(self, rung: Rung) -> bool:
        """Return True if requests use the pool, a move or a pause is under way, or there is no such way down."""
        pool = self.pool
        moving = self.task is not None or pool.waking or rung.hook is None or rung.pause.left_s > 0
        return moving or bool(pool.held or pool.outstanding or pool.busy_elsewhere())

    async def _begin(self, move: Coroutine[Any, Any, ProxyError | None]) -> ProxyError | None:
        self.task = asyncio.get_running_loop().create_task(move)
        return await asyncio.shield(self.task)

    async def evict(
        self,
        limit_s: float | None = None,
        wanted: Callable[[], bool] = lambda: True,
        *,
        standby: bool | None = None,
    ) -> None:
        """Drain the pool and put it in standby or to sleep, to make room for another. New requests wait meanwhile.

        Args:
            limit_s: maximum seconds for requests in flight; None uses `drain_limit_s`.
            wanted: polled while draining; if it returns False, the pool continues to serve.
            standby: to standby; None where `evicts_to_standby` says so, and to sleep if that fails.

        Raises:
            Unneeded: the room is no longer needed.
            ProxyError: the pool did not go to sleep and continues to serve; or it failed moments ago and is in its backoff.
        """
        until = time.monotonic() + (self.drain_limit_s if limit_s is None else limit_s)
        if standby or (standby is None and self.evicts_to_standby and self.frozen.hook is not None):
            try:
                return await self._evict(self.frozen, until, wanted)
            except (Unneeded, Unavailable):
                raise
            except ProxyError:
                if standby or self.pool.kept_awake:
                    raise
        return await self._evict(self.down, until, wanted)

    async def _evict(self, rung: Rung, until: float, wanted: Callable[[], bool]) -> None:
        if rung.hook is None:
            raise StartFailed(f"no-way-to-{rung.name}", f"{self.pool.name} cannot be put to {rung.name}")
        while self.task is not None and rung.ends_engine and not self._rung.ends_engine:
            await asyncio.wait((self.task,))  # standby is under way, which keeps what this move must end
            while self.pool.waking:  # for a request that came meanwhile; it is answered first
                if time.monotonic() > until:
                    raise StartFailed("busy", f"{self.pool.name} is waking for a request")
                await asyncio.sleep(0.05)
        if self.task is None:
            if rung.pause.left_s and rung.failure is not None:
                raise rung.failure.fresh()
            left_s = max(0.0, until - time.monotonic())
            self.task = asyncio.get_running_loop().create_task(self._run(rung, left_s, wanted))
        self.evicting = True
        try:
            failure = await asyncio.shield(self.task)
        finally:
            self.evicting = False
        if failure is not None:
            raise failure

    def forget_failures(self) -> None:
        """End all pauses: another engine serves."""
        self.down.pause.succeeded()
        self.frozen.pause.succeeded()

    def refuse_loaded(self) -> None:
        """Raise StartFailed if the requests that were drained loaded adapters, which only standby keeps."""
        if self._rung.ends_engine and self.pool.kept_awake:
            raise StartFailed("adapters-loaded", f"{self.pool.name} has LoRA adapters, which no start restores")

    async def wait_drained(self, quiet: Awaitable[Any]) -> Any:
        """Await `quiet` within the limits of the current sleep. Raises the same errors as `evict`."""
        task = asyncio.ensure_future(quiet)
        try:
            while True:
                left = self._until - time.monotonic()
                await asyncio.wait((task,), timeout=max(0.0, min(left, 0.25)))
                if task.done():
                    return task.result()
                if left <= 0:
                    raise Unavailable("still-answering", f"{self.pool.name} did not finish its requests in time")
                if not self._wanted():
                    raise Unneeded(f"no request waits for the place of {self.pool.name} any more")
        finally:
            task.cancel()

    def wrap_hook(self, wrap: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> None:
        """Replace each hook with `wrap(hook)`, for an owner that must drain other processes first."""

        def wrapped(inner: Hook | None) -> Hook | None:
            return None if inner is None else lambda: wrap(inner)

        for rung in (self.down, self.frozen):
            rung.hook = wrapped(rung.hook)

    async def _run(
        self, rung: Rung, drain_s: float = math.inf, wanted: Callable[[], bool] = lambda: True
    ) -> ProxyError | None:
        """Drain, then call the hook. Return the failure, if any; the pool then continues as it was."""
        assert rung.hook is not None
        self._rung = rung
        for replica in self.pool.replicas.values():
            replica.draining = True
        self._until, self._wanted = time.monotonic() + drain_s, wanted
        failure: ProxyError | None = None
        try:
            for replica in self.pool.replicas.values():
                if replica.outstanding:
                    await self.wait_drained(replica.wait_idle())
                self.pool.close_idle(replica)
            self.refuse_loaded()
            # An owner with other processes drains them in its hook, so the hook gets that time too.
            limit_s = self.limit_s + (0.0 if drain_s == math.inf else drain_s)
            async with asyncio.timeout(limit_s):
                await rung.hook()
            rung.moves += 1
            rung.failure = None
            rung.pause.succeeded()
        except TimeoutError:
            failure = StartFailed(f"{rung.name}-timeout", f"the {rung.name} was not done after {self.limit_s:.0f} s")
        except Exception as exc:  # noqa: BLE001 - an owner's hook may raise anything; its code is logged
            failure = start_failed(exc)
        finally:
            for replica in self.pool.replicas.values():
                replica.draining = False
            self.task = None
            if rung.ends_engine:
                self.pool.last_active = time.monotonic()  # standby counts on towards the sleep
            self.pool.dispatch()
        # Otherwise a new request has won over the sleep.
        if failure is not None and failure.code not in ("busy", Unneeded.CODE):
            self._failed(rung, failure, drain_s)
        return failure

    def _failed(self, rung: Rung, failure: ProxyError, drain_s: float) -> None:
        """Increase the pause before the next attempt; log each reason once."""
        known, rung.failure = rung.failure, failure
        still = failure.code == "still-answering"
        pause = rung.pause.failed(drain_s if still else 0.0)
        failure.retry_after_s = pause
        fields = {"pool": self.pool.name, "code": failure.code, "reason": failure.message}
        level = logging.DEBUG if known is not None and known.code == failure.code else logging.WARNING
        text = "%s did not go to %s: %s; it continues as it was, and is tried again after growing pauses"
        log.log(
            level, text, self.pool.name, rung.name, failure.message, extra={"event": "sleep-failed", "fields": fields}
        )

    async def watch_idle(self) -> None:
        """Put the pool in standby, then to sleep, whenever it was idle for as long. Runs until the server's shutdown cancels it.

        `standby_after_s` and `sleep_after_s` of the pool are in seconds from the last request; None never.
        """
        pool = self.pool
        standby_s, sleep_s = (math.inf if s is None else s for s in (pool.standby_after_s, pool.sleep_after_s))
        while True:
            idle, serving = time.monotonic() - pool.last_active, pool.ready() is not None
            if pool.outstanding or pool.held or pool.busy_elsewhere() or not (serving or self.in_standby):
                idle = 0.0
            elif idle >= sleep_s:
                await self.sleep()
                idle = 0.0
            elif serving and idle >= standby_s:
                await self.standby()
            next_s = standby_s if serving and idle < standby_s < sleep_s else sleep_s
            await asyncio.sleep(max(0.02, min(next_s - idle, standby_s, 5.0)))
