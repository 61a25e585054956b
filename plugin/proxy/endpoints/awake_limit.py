"""Limit how many models are awake, and how much memory those in standby may keep from others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from plugin.proxy.endpoints.endpoint import Endpoint
from plugin.proxy.errors import ProxyError, StartFailed, Unavailable, Unneeded
from plugin.proxy.pool.pressure import longest_in_standby, memory_room
from plugin.proxy.pool.replica import STARTING
from plugin.runtime.phases import Phase

log = logging.getLogger("quickthaw.proxy")


class AwakeLimit:
    """Limit the number of endpoints awake: make room for one by moving others to standby or to sleep, one wake at a time."""

    def __init__(self, limit: int, order: str, min_awake_s: float, drain_s: float) -> None:
        self.limit, self.order, self.min_awake_s, self.drain_s = limit, order, min_awake_s, drain_s
        self.endpoints: list[tuple[Endpoint, int]] = []
        self.up_since: dict[str, float] = {}
        self._one_wake = asyncio.Lock()
        self._reserved: set[str] = set()

    def guard(self, name: str, wake: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
        """Return `wake`, wrapped to run only once there is room for `name`."""

        async def within_limit() -> None:
            async with self._one_wake:
                await self._make_room(name)
                await self._free_memory(name)
                self._reserved.add(name)
            try:
                await wake()
                self.up_since[name] = time.monotonic()
            finally:
                self._reserved.discard(name)

        return within_limit

    def _awake(self, but: str) -> list[tuple[Endpoint, int]]:
        down = (Phase.STANDBY, Phase.ASLEEP, Phase.FAILED, Phase.IDLE, Phase.STOPPED)
        return [
            (endpoint, priority)
            for endpoint, priority in self.endpoints
            if endpoint.name != but and (endpoint.tracker.phase not in down or endpoint.name in self._reserved)
        ]

    async def _make_room(self, name: str) -> None:
        """Move others to standby or to sleep until there is room for `name`. Raises Unavailable (no-room) when none of them sleeps."""
        pool = next(endpoint.pool for endpoint, _ in self.endpoints if endpoint.name == name)
        until = time.monotonic() + self.drain_s
        refused: dict[str, ProxyError] = {}
        while self.limit:
            awake = self._awake(name)
            if len(awake) < self.limit:
                return
            settled = [
                pair
                for pair in awake
                if pair[0].tracker.phase not in STARTING and pair[0].name not in self._reserved | refused.keys()
            ]
            if not settled:
                if len(refused) >= len(awake):
                    raise self._no_room(refused)
                await asyncio.sleep(0.05)
                continue
            settled = [p for p in settled if not p[0].pool.kept_awake or p[0].pool.sleeper.evicts_to_standby]
            if not settled:
                raise StartFailed(
                    "adapters-loaded", "each model that is awake has LoRA adapters, which no start restores"
                )
            victim, _ = min(settled, key=self._rank)
            young = self.min_awake_s - (time.monotonic() - self.up_since.get(victim.name, 0.0))
            if young > 0 and (victim.pool.outstanding or victim.pool.held):
                await asyncio.sleep(min(young, 0.25))
                continue
            try:
                await victim.pool.sleeper.evict(max(0.0, until - time.monotonic()), lambda: pool.wanted)
            except Unneeded:
                raise
            except ProxyError as error:
                refused[victim.name] = error

    async def _free_memory(self, name: str) -> None:
        """Put models in standby to sleep while the one that will be restored needs their memory."""
        pool = next(endpoint.pool for endpoint, _ in self.endpoints if endpoint.name == name)
        needed = 0 if pool.sleeper.in_standby else pool.facts().snapshot_bytes
        for resting in longest_in_standby(endpoint.pool for endpoint, _ in self.endpoints if endpoint.name != name):
            room = await asyncio.to_thread(memory_room) if needed else None
            if room is None or room.available >= needed:
                return
            slept = await resting.sleep()
            text = "%s: memory-short: %s needs %d MiB, %d are available; it %s"
            what = "went from standby to sleep" if slept else "stays in standby"
            fields = {"pool": resting.name, "needed": needed, "available": room.available, "slept": slept}
            values = (resting.name, name, needed >> 20, room.available >> 20, what)
            log.info(text, *values, extra={"event": "memory-short", "fields": fields})

    def _no_room(self, refused: dict[str, ProxyError]) -> Unavailable:
        why = "; ".join(f"{name} did not go to sleep: {error.message}" for name, error in refused.items())
        again = min(error.retry_after_s or 1.0 for error in refused.values())
        return Unavailable("no-room", f"{self.limit} may be awake at once, and {why}", retry_after_s=again)

    def _rank(self, pair: tuple[Endpoint, int]) -> tuple[float, ...]:
        endpoint, priority = pair
        busy = float(endpoint.pool.outstanding > 0)
        idle_since = endpoint.pool.last_active
        return (busy, priority, idle_since) if self.order == "priority" else (busy, idle_since)
