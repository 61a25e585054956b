"""Wake one pool: run the owner's hook at most once at a time, pause after failures, report a start that finally failed.

The sleeping side is `sleeper`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from plugin.proxy.errors import ProxyError, StartFailed, Unneeded, start_failed
from plugin.proxy.pool.backoff import Backoff
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.pool.replica import Replica

log = logging.getLogger("quickthaw.proxy")
Hook = Callable[[], Awaitable[None]]
DIED_AT_ONCE = 3
"""Wakes in a row whose replica may die as soon as it serves before the waiting requests end."""


class WokenPool(Protocol):
    """The part of a pool (`pool.ReplicaPool`) that a `Waker` needs."""

    name: str
    replicas: dict[str, Replica]
    held_for_others: int

    @property
    def closed(self) -> bool:
        """Return True once the pool answers no more requests."""

    def ready(self) -> Replica | None:
        """Return the replica for the next request, or None."""

    def dispatch(self) -> None:
        """Hand ready replicas to waiting requests."""

    def end_waiting(self, error: ProxyError) -> None:
        """End all waiting requests with `error`."""


class Waker:
    """Wake one pool when a request needs it; at most one wake runs at a time."""

    def __init__(self, pool: WokenPool, hook: Hook | None, limit_s: float) -> None:
        """`hook` brings at least one replica to serving within `limit_s` seconds; None if the pool waits for others to do it."""
        self.pool, self.hook, self.limit_s = pool, hook, limit_s
        self.task: asyncio.Task[None] | None = None
        self.wakes = 0
        self.failed_starts = 0
        self.last_failure: ProxyError | None = None
        self.final: ProxyError | None = None
        """Why the last start has finally failed; None again once another start begins."""
        self._died = 0
        """Wakes in a row whose replica served and had died when they ended."""
        self.pause = Backoff(1.0, 30.0)
        self.on_failed: list[Callable[[ProxyError], None]] = []
        """Callbacks (error), run on the loop when a start has finally failed."""

    def refusal(self) -> ProxyError | None:
        """Return the error for a new request while the last start has failed and no other is due, or None."""
        if self.final is not None:
            return self.final.fresh()
        pause_s = self.pause.left_s
        if pause_s and self.last_failure is not None:
            return StartFailed(self.last_failure.code, self.last_failure.message, retry_after_s=pause_s)
        return None

    @property
    def refused_for_s(self) -> float:
        """Return for how many seconds new requests are still refused after a failed start; infinite until another start begins."""
        return math.inf if self.final is not None else self.pause.left_s

    def demand(self) -> None:
        """Start a wake, unless one is running or a replica serves or will soon serve by itself."""
        if self.hook is None or self.task is not None or self.pool.closed:
            return
        if self._returns() or self.pool.ready() is not None or self._refusing():
            return
        self.task = asyncio.get_running_loop().create_task(self._run(self.hook))

    async def _run(self, hook: Hook) -> None:
        replicas = self.pool.replicas
        failure: ProxyError | None = None
        before = {name: replica.generation for name, replica in replicas.items()}
        self.wakes += 1
        for replica in replicas.values():
            replica.woken_at = replica.refusals.failures
        try:
            async with asyncio.timeout(self.limit_s):
                await hook()
            await asyncio.sleep(0)  # a phase that the hook has just changed is queued on the loop
        except Unneeded as exc:
            log.debug("%s was not woken: %s", self.pool.name, exc.message)
            self.task = None
            self.pool.dispatch()
            return
        except TimeoutError:
            failure = StartFailed("wake-timeout", f"the wake was not done after {self.limit_s:.0f} s")
        except Exception as exc:  # noqa: BLE001 - an owner's hook may raise anything; waiting requests get its code
            failure = start_failed(exc)
        finally:
            self.task = None
        for replica in replicas.values():
            if replica.refusals.failures <= 1:  # a replica that keeps refusing stays paused
                replica.suspect_until = 0.0
        without = failure is None and self.pool.ready() is None and not self._paused() and not self._returns()
        # One that served and died at once, before this looked, is woken again, a few times.
        died = without and any(replica.generation != before.get(name, 0) for name, replica in replicas.items())
        self._died = self._died + 1 if died else 0
        if without and not 0 < self._died <= DIED_AT_ONCE:
            failure = StartFailed("wake-without-replica", "the wake ended, and no replica serves")
        if failure is not None:
            failure.retry_after_s = self.pause.failed()
            self.fail(failure)
        else:
            self.pool.dispatch()

    def _returns(self) -> bool:
        """Return True if a replica will take requests again by itself."""
        return self.pool.held_for_others > 0 or any(replica.will_recover for replica in self.pool.replicas.values())

    def _refusing(self) -> bool:
        """Return True if a replica refuses connections, and a wake since has not helped."""
        return any(replica.refuses_after_wake for replica in self.pool.replicas.values())

    def _paused(self) -> bool:
        """Return True if a serving replica refuses connections: its owner is about to notice its end, or it is tried again."""
        now = time.monotonic()
        replicas = self.pool.replicas.values()
        return any(replica.tracker.phase is Phase.SERVING and replica.suspect_until > now for replica in replicas)

    def fail_finally(self, error: ProxyError) -> None:
        """End waiting requests with `error`, and new ones until another start begins."""
        self.final = error
        self.fail(error)

    def fail_elsewhere(self, error: ProxyError) -> None:
        """End waiting requests because a wake in another process has failed, and pause for its `retry_after_s`."""
        self.pause.hold(error.retry_after_s or 0.0)
        self.fail(error)

    def fail(self, error: ProxyError) -> None:
        """Record that a start has failed, and end waiting requests with `error`."""
        self.last_failure = error
        for replica in self.pool.replicas.values():
            replica.start_ended = replica.start_ended or replica.tracker.phase is Phase.FAILED
        if not self.pool.closed:
            self.failed_starts += 1
            reason = error.detail or error.message
            fields = {"pool": self.pool.name, "code": error.code, "reason": reason}
            log.error("%s: %s", error.code, reason, extra={"event": "start-failed", "fields": fields})
            for notify in self.on_failed:
                notify(error)
        self.pool.end_waiting(error)
