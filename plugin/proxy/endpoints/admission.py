"""Decide which models may be awake: by their number, by the GPU memory that they take, and by the host's memory.

A wake makes room first, one at a time: others go to standby or to sleep, in the order of `evict`. A model awake takes its
`gpu_memory`; in standby and asleep it takes none. What a restore needs of the host's memory, and what a model moves from
its GPU into it on the way to standby, others in standby make room for by going to sleep, the longest idle first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from plugin.proxy.errors import ProxyError, StartFailed, Unavailable, Unneeded
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.pressure import longest_in_standby, memory_room
from plugin.proxy.pool.replica import STARTING
from plugin.runtime.phases import Phase, PhaseTracker

log = logging.getLogger("quickthaw.proxy")
Hook = Callable[[], Awaitable[None]]
_DOWN = frozenset({Phase.STANDBY, Phase.ASLEEP, Phase.FAILED, Phase.IDLE, Phase.STOPPED})


class Admitted(Protocol):
    """The part of an endpoint (`endpoint.Endpoint`, `kubernetes.workload.Workload`) that an admission needs."""

    name: str
    pool: ReplicaPool

    @property
    def tracker(self) -> PhaseTracker:
        """Return the phase of the endpoint."""


@dataclass(frozen=True)
class Member:
    """A model that takes part. `gpu_memory`: bytes of GPU memory that it takes while it is awake."""

    endpoint: Admitted
    priority: int = 0
    gpu_memory: int = 0

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.endpoint.name


class Admission:
    """Admit one wake at a time, once there is room for it."""

    def __init__(self, limit: int, order: str, min_awake_s: float, drain_s: float, gpu_memory: int = 0) -> None:
        """`limit`: models awake at once; `gpu_memory`: bytes that they may take together. 0 of either is no limit.

        `order`: `lru` or `priority`; `min_awake_s`, `drain_s`: seconds (see `models.Config`).
        """
        self.limit, self.order, self.min_awake_s, self.drain_s = limit, order, min_awake_s, drain_s
        self.gpu_memory = gpu_memory
        self.members: dict[str, Member] = {}
        self.up_since: dict[str, float] = {}
        self._one_wake = asyncio.Lock()
        self._reserved: set[str] = set()

    def add(self, member: Member) -> None:
        """Add a model; its way to standby then makes room for what it moves into the host's memory."""
        self.members[member.name] = member
        frozen = member.endpoint.pool.sleeper.frozen
        if frozen.hook is not None and member.gpu_memory:
            frozen.hook = self._guard_standby(member, frozen.hook)

    def guard(self, name: str, wake: Hook) -> Hook:
        """Return `wake`, wrapped to run only once there is room for `name`."""

        async def once_admitted() -> None:
            member = self.members[name]
            async with self._one_wake:
                await self._make_room(member)
                resting = member.endpoint.pool.sleeper.in_standby
                await self._free_memory(member, 0 if resting else member.endpoint.pool.facts().snapshot_bytes)
                self._reserved.add(name)
            try:
                await wake()
                self.up_since[name] = time.monotonic()
            finally:
                self._reserved.discard(name)

        return once_admitted

    def _guard_standby(self, member: Member, standby: Hook) -> Hook:
        async def once_it_fits() -> None:
            pool = member.endpoint.pool
            held = sum(replica.memory_bytes or 0 for replica in pool.replicas.values())
            await self._free_memory(member, max(0, pool.facts().snapshot_bytes - held))
            await standby()

        return once_it_fits

    def _awake(self, but: str) -> list[Member]:
        return [
            member
            for member in self.members.values()
            if member.name != but and (member.endpoint.tracker.phase not in _DOWN or member.name in self._reserved)
        ]

    def _short_of(self, wanted: Member, awake: list[Member]) -> Callable[[Member], bool] | None:
        """Return which of the models awake would make room for `wanted` by leaving; None if there is room."""
        if self.limit and len(awake) >= self.limit:
            return lambda member: True
        taken = sum(member.gpu_memory for member in awake)
        if self.gpu_memory and wanted.gpu_memory and taken + wanted.gpu_memory > self.gpu_memory:
            return lambda member: member.gpu_memory > 0
        return None

    async def _make_room(self, wanted: Member) -> None:
        """Move others to standby or to sleep until there is room for `wanted`. Raises Unavailable (no-room) when none of them sleeps."""
        pool = wanted.endpoint.pool
        until = time.monotonic() + self.drain_s
        refused: dict[str, ProxyError] = {}
        while (helps := self._short_of(wanted, awake := self._awake(wanted.name))) is not None:
            helpful = [member for member in awake if helps(member)]
            settled = [
                member
                for member in helpful
                if member.endpoint.tracker.phase not in STARTING and member.name not in self._reserved | refused.keys()
            ]
            if not settled:
                if all(member.name in refused for member in helpful):
                    raise self._no_room(refused)
                await asyncio.sleep(0.05)
                continue
            settled = [
                m for m in settled if not m.endpoint.pool.kept_awake or m.endpoint.pool.sleeper.evicts_to_standby
            ]
            if not settled:
                raise StartFailed(
                    "adapters-loaded", "each model that is awake has LoRA adapters, which no start restores"
                )
            victim = min(settled, key=self._rank).endpoint
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

    async def _free_memory(self, member: Member, needed: int) -> None:
        """Put other models in standby to sleep while `member` needs their host memory, in bytes."""
        others = (other.endpoint.pool for other in self.members.values() if other.name != member.name)
        for resting in longest_in_standby(others):
            room = await asyncio.to_thread(memory_room) if needed else None
            if room is None or room.available >= needed:
                return
            slept = await resting.sleep()
            text = "%s: memory-short: %s needs %d MiB, %d are available; it %s"
            what = "went from standby to sleep" if slept else "stays in standby"
            fields = {"pool": resting.name, "needed": needed, "available": room.available, "slept": slept}
            values = (resting.name, member.name, needed >> 20, room.available >> 20, what)
            log.info(text, *values, extra={"event": "memory-short", "fields": fields})

    def _no_room(self, refused: dict[str, ProxyError]) -> Unavailable:
        limits = [f"{self.limit} may be awake at once"] if self.limit else []
        limits += [f"they may take {self.gpu_memory / 1e9:.1f} GB of GPU memory together"] if self.gpu_memory else []
        why = "; ".join(f"{name} did not go to sleep: {error.message}" for name, error in refused.items())
        again = min(error.retry_after_s or 1.0 for error in refused.values())
        return Unavailable("no-room", f"{', '.join(limits)}, and {why}", retry_after_s=again)

    def _rank(self, member: Member) -> tuple[float, ...]:
        pool = member.endpoint.pool
        busy = float(pool.outstanding > 0)
        return (busy, member.priority, pool.last_active) if self.order == "priority" else (busy, pool.last_active)
