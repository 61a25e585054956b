"""A worker's pools, which mirror those of the supervisor: phases and addresses come from there, wakes are requested there."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

from plugin.proxy.http.address import from_spec
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.proxy.pool.start_times import Kind
from plugin.proxy.workers.control import ControlChannel, error_of
from plugin.runtime.phases import Phase, PhaseTracker


class Mirror:
    """The pools of one worker."""

    def __init__(self, control: ControlChannel) -> None:
        self.control = control
        self.pools: dict[str, ReplicaPool] = {}
        self._reported: tuple[dict[str, int], dict[str, list[str]]] = ({}, {})

    def build(self, pools: list[dict[str, Any]]) -> None:
        """Create the mirrors that the hello message describes."""
        for description in pools:
            name = description["name"]
            pool = ReplicaPool(
                name=name,
                wake=self._waker(name) if description["wakes"] else None,
                wake_limit_s=86400.0,
            )
            pool.started_here = description["started_here"]
            for kind, seconds in description["history"].items():
                for value in seconds:
                    pool.history.record(Kind(kind), value)
            for r in description["replicas"]:
                replica = pool.add(r["name"], PhaseTracker(phase=Phase(r["phase"])))
                self._place(replica, r)
            self.pools[name] = pool

    @staticmethod
    def _place(replica: Replica, message: dict[str, Any]) -> None:
        replica.generation = message["generation"]
        if message["spec"] is not None:
            authority = message["authority"].encode() or None
            replica.upstream = dataclasses.replace(from_spec(message["spec"]), authority=authority)

    def _waker(self, name: str) -> Callable[[], Awaitable[None]]:
        async def wake() -> None:
            now = time.monotonic()
            pool = self.pools[name]
            refused = [(r.name, r.generation) for r in pool.replicas.values() if r.suspect_until > now]
            error = await self.control.request(86400.0, op="wake", pool=name, refused=refused)
            if error is not None:
                raise error_of(error)

        return wake

    def handle(self, message: dict[str, Any]) -> Awaitable[Any] | None:
        """Handle a message from the supervisor."""
        op, pool = message["op"], self.pools[message["pool"]]
        if op == "phase":
            replica = pool.replicas[message["replica"]]
            self._place(replica, message)  # set its address before it may serve
            replica.tracker.to(Phase(message["to"]), message["reason"])
            replica.generation = message["generation"]
        elif op == "failed":
            pool.waker.fail_elsewhere(error_of(message))
        elif op == "quiet":
            return self._quiet(pool, wait=message["wait"])
        elif op == "release":
            for replica in pool.replicas.values():
                replica.draining = False
            pool.dispatch()
        return None

    async def _quiet(self, pool: ReplicaPool, *, wait: bool) -> bool:
        """Drain the pool and return True once no request is in flight. Without `wait`, return False if any is held or in flight."""
        if not wait and (pool.held or pool.outstanding):
            return False
        for replica in pool.replicas.values():
            replica.draining = True
        for replica in pool.replicas.values():
            await replica.wait_idle()
        self._report()  # before the answer: what the last requests did to the engine
        return True

    async def report(self, every_s: float = 0.1) -> None:
        """Send the supervisor each pool's number of requests here, probes aside: on every change, and repeatedly while there are any."""
        while True:
            self._report()
            await asyncio.sleep(every_s)

    def _report(self) -> None:
        counts = {name: pool.held + pool.outstanding - pool.probes for name, pool in self.pools.items()}
        loaded = {
            name: [replica.name for replica in pool.replicas.values() if replica.adapters_loaded]
            for name, pool in self.pools.items()
            if any(replica.adapters_loaded for replica in pool.replicas.values())
        }
        if (counts, loaded) != self._reported or any(counts.values()):
            self.control.send(op="busy", pools=counts, adapters=loaded)
            self._reported = (counts, loaded)
