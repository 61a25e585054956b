"""Put a pool to sleep, when it is idle or to make room for another, with a limit on draining and a backoff after failures.

Guarantees: new requests wait from the beginning of a sleep to its end; none is lost in between. A pool that does not
drain in time or fails to sleep continues to serve, and `evict` raises the reason. Each reason is logged once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

from plugin.proxy.errors import ProxyError, StartFailed, Unavailable, Unneeded, start_failed
from plugin.proxy.pool.backoff import Backoff

if TYPE_CHECKING:
    from plugin.proxy.pool.replica import Replica

log = logging.getLogger("quickthaw.proxy")
Hook = Callable[[], Awaitable[None]]


class SleepingPool(Protocol):
    """The part of a pool (`pool.ReplicaPool`) that a `Sleeper` needs."""

    name: str
    replicas: dict[str, Replica]
    idle_timeout_s: float | None
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


class Sleeper:
    """Put one pool to sleep; at most one attempt runs at a time."""

    def __init__(self, pool: SleepingPool, hook: Hook | None, limit_s: float, drain_limit_s: float) -> None:
        """Limits in seconds: `limit_s` for the hook; `drain_limit_s` for requests in flight when another pool needs the room."""
        self.pool, self.hook, self.limit_s, self.drain_limit_s = pool, hook, limit_s, drain_limit_s
        self.task: asyncio.Task[ProxyError | None] | None = None
        self.sleeps = 0
        self.evicting = False
        self.pause = Backoff(1.0, 300.0)
        self.failure: ProxyError | None = None
        """Why the last sleep failed; None after one that succeeded."""
        self._until = math.inf
        self._wanted: Callable[[], bool] = lambda: True

    async def sleep(self) -> bool:
        """Put the pool to sleep if no request is in flight or held. Return True if it went to sleep."""
        if self.hook is None or self.task is not None or self.pool.waking:
            return False
        if (
            self.pool.held
            or self.pool.outstanding
            or self.pool.busy_elsewhere()
            or self.pool.kept_awake
            or self.pool.ready() is None
        ):
            return False
        if self.pause.left_s:
            return False
        self.task = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(self.task) is None

    async def evict(self, limit_s: float | None = None, wanted: Callable[[], bool] = lambda: True) -> None:
        """Drain the pool and put it to sleep, to make room for another. New requests wait meanwhile.

        Args:
            limit_s: maximum seconds for requests in flight; None uses `drain_limit_s`.
            wanted: polled while draining; if it returns False, the pool continues to serve.

        Raises:
            Unneeded: the room is no longer needed.
            ProxyError: the pool did not go to sleep and continues to serve; or it failed moments ago and is in its backoff.
        """
        if self.hook is None:
            raise StartFailed("no-way-to-sleep", f"{self.pool.name} cannot be put to sleep")
        if self.task is None:
            if self.pause.left_s and self.failure is not None:
                raise self.failure.fresh()
            sleep = self._run(self.drain_limit_s if limit_s is None else limit_s, wanted)
            self.task = asyncio.get_running_loop().create_task(sleep)
        self.evicting = True
        try:
            failure = await asyncio.shield(self.task)
        finally:
            self.evicting = False
        if failure is not None:
            raise failure

    def refuse_loaded(self) -> None:
        """Raise StartFailed if the requests that were drained loaded adapters."""
        if self.pool.kept_awake:
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
        """Replace the sleep hook with `wrap(hook)`, for an owner that must drain other processes first."""
        inner = self.hook
        if inner is not None:
            self.hook = lambda: wrap(inner)

    async def _run(self, drain_s: float = math.inf, wanted: Callable[[], bool] = lambda: True) -> ProxyError | None:
        """Drain, then sleep. Return the failure, if any; the pool then continues to serve."""
        assert self.hook is not None
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
                await self.hook()
            self.sleeps += 1
            self.failure = None
            self.pause.succeeded()
        except TimeoutError:
            failure = StartFailed("sleep-timeout", f"the sleep was not done after {self.limit_s:.0f} s")
        except Exception as exc:  # noqa: BLE001 - an owner's hook may raise anything; its code is logged
            failure = start_failed(exc)
        finally:
            for replica in self.pool.replicas.values():
                replica.draining = False
            self.task = None
            self.pool.last_active = time.monotonic()
            self.pool.dispatch()
        # Otherwise a new request has won over the sleep.
        if failure is not None and failure.code not in ("busy", Unneeded.CODE):
            self._failed(failure, drain_s)
        return failure

    def _failed(self, failure: ProxyError, drain_s: float) -> None:
        """Increase the pause before the next attempt; log each reason once."""
        known, self.failure = self.failure, failure
        still = failure.code == "still-answering"
        pause = self.pause.failed(drain_s if still else 0.0)
        failure.retry_after_s = pause
        fields = {"pool": self.pool.name, "code": failure.code, "reason": failure.message}
        level = logging.DEBUG if known is not None and known.code == failure.code else logging.WARNING
        text = "%s did not go to sleep: %s; it continues to serve, and is tried again after growing pauses"
        log.log(level, text, self.pool.name, failure.message, extra={"event": "sleep-failed", "fields": fields})

    async def watch_idle(self) -> None:
        """Put the pool to sleep whenever it was idle for `idle_timeout_s` seconds. Runs until the server's shutdown cancels it."""
        while self.pool.idle_timeout_s is not None:
            idle = time.monotonic() - self.pool.last_active
            if self.pool.outstanding or self.pool.held or self.pool.busy_elsewhere() or self.pool.ready() is None:
                idle = 0.0
            if idle >= self.pool.idle_timeout_s:
                await self.sleep()
                idle = 0.0
            await asyncio.sleep(max(0.02, min(self.pool.idle_timeout_s - idle, 5.0)))
