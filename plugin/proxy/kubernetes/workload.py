"""A Deployment or StatefulSet as an endpoint of the proxy: its pool has one replica for each pod.

A request for a workload without a ready pod waits while `scale` goes from 0 to 1. The start of the pod is followed
(scheduled, pulled, running; of a quickthaw in it each phase), and the pod is asked itself whether it serves: the
kubelet's next probe, the EndpointSlice and the watch may come a second later. From then on EndpointSlices and pods say
who serves. The idle workload goes back to 0 once no other proxy has requests for it (`agreement`).

Guarantees: a pod that leaves gets no new request and finishes those it has. What is known of pods stays in use while
the API is away. `scale` is written only if the workload is still as it was read, so two proxies make one wake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plugin.proxy.endpoints.readiness import pause_s
from plugin.proxy.errors import ProxyError, StartFailed
from plugin.proxy.http.address import tcp
from plugin.proxy.kubernetes.address import WorkloadAddress
from plugin.proxy.kubernetes.asking import COLD, RESTORED, Asker, WorkloadSpec, advance
from plugin.proxy.kubernetes.background import Background
from plugin.proxy.kubernetes.pods import Fault, PodState, listed_by_pod, state_of
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import FOUND_UP, STARTING, Replica
from plugin.proxy.pool.start_times import History
from plugin.runtime.phases import Phase, PhaseTracker

if TYPE_CHECKING:
    from plugin.proxy.kubernetes.informer import Informer
    from plugin.proxy.kubernetes.session import Session

log = logging.getLogger("quickthaw.proxy")
_WRITE_LIMIT_S = 8.0
"""How long a scale-down may take; the other proxies hold their requests for `agreement.HOLD_S`."""
_LEAVE_LIMIT_S = 5.0
"""How long a sleep waits for the first sign that its pods go."""
_AWAY_PAUSE_S = 1.0
_CONFLICT_PAUSE_S = 0.02


@dataclass(eq=False)
class Member:
    """One pod, its replica, and the task that asks it whether it serves."""

    replica: Replica
    pod: PodState
    proven: bool = False
    """True once it has answered a probe, or the cluster said that it is ready."""
    prober: asyncio.Task[None] | None = None
    waits: bool = False
    """True if the cluster called it ready and took that back: its own answer does not count then."""
    fault: Fault | None = None
    """Why it will not serve, found by asking it."""
    faulty_since: float | None = None


class Workload:
    """Own the pool of one workload."""

    def __init__(
        self,
        name: str,
        spec: WorkloadSpec,
        session: Session,
        *,
        room: Callable[[str, Any], Any] | None = None,
        history: History | None = None,
        owns_session: bool = False,
    ) -> None:
        """`session` is shared by this proxy's workloads, or closed by this one (`owns_session`).

        `room` and `history`: see `endpoints.endpoint.Endpoint`.
        """
        self.name, self.spec, self._session, self._owns_session = name, spec, session, owns_session
        self.pool = ReplicaPool(
            name=name,
            wake=(self._wake if room is None else room(name, self._wake)) if spec.scales else None,
            sleep=self._sleep if spec.scales else None,
            suspect=self._suspect,
            sleep_after_s=spec.sleep_after_s,
            wake_limit_s=(spec.wake_limit_s + 5.0) if room is None else 86400.0,
            sleep_limit_s=60.0,
            history=history,
        )
        self.pool.facts = lambda: spec.facts
        self._members: dict[str, Member] = {}
        """By the pods' uid."""
        self._pods: Informer | None = None
        self._selector = ""
        self._changed, self._found = asyncio.Event(), asyncio.Event()
        self._background = Background(f"{name}: a task of its own failed", "workload-failed", pool=name)
        self._waking_since: float | None = None
        self._rest()

    # -- the owner's side ------------------------------------------------------------------------

    @property
    def tracker(self) -> PhaseTracker:
        """Return the phase of the replica that is nearest to serving."""
        order = {Phase.SERVING: 3, Phase.SUSPECT: 2}
        best = max(self.pool.replicas.values(), key=lambda r: order.get(r.tracker.phase, r.tracker.phase in STARTING))
        return best.tracker

    async def start(self) -> None:
        """Begin to follow the workload's pods. The API may be away: requests then wait until it answers."""
        if self.spec.scales:
            self._session.agreement.join(self)
        self._background.run(self._follow())
        if self.spec.sleep_after_s is not None and self.spec.scales:
            self._background.run(self._watch_unserved(self.spec.sleep_after_s))

    def kill(self) -> None:
        """End at once; nothing runs here."""

    async def close(self) -> None:
        """Stop following the pods. The workload stays as it is: another proxy may use it."""
        await self._background.close()
        for replica in self.pool.replicas.values():
            replica.tracker.to(Phase.STOPPED)
        if self._owns_session:
            await self._session.close()

    @property
    def address(self) -> WorkloadAddress:
        """Return the workload's address."""
        return self.spec.address

    @property
    def busy(self) -> bool:
        """Return True if requests are held or in flight here."""
        return bool(self.pool.held or self.pool.outstanding)

    def hold(self, on: bool) -> None:
        """Hold new requests while another proxy scales the workload to 0 (`agreement`), or send them on."""
        self.pool.held_for_others += 1 if on else -1
        if not on:
            self.pool.dispatch()

    async def settle(self) -> None:
        """Wait, after another proxy wanted quiet, until the pods go if it has scaled the workload to 0."""
        try:
            scale = await self._session.cluster.scale(self.spec.address)
        except StartFailed as error:
            log.debug("%s: %s", self.name, error.message)
            return
        if not scale.spec.replicas:
            await self._until_gone()

    async def _follow(self) -> None:
        """Find the workload's selector, then keep its replicas as its pods are."""
        address, pause = self.spec.address, _AWAY_PAUSE_S
        while True:
            try:
                scale = await self._session.cluster.scale(address)
                if scale.status is None or not scale.status.selector:  # it would name all pods of the namespace
                    raise StartFailed("workload-not-found", "the workload's scale names no pods yet")
                break
            except StartFailed as error:
                log.warning("%s: %s", self.name, error.detail or error.message, extra={"event": "cluster-away"})
                if not self._members:
                    self._resting().step = error.message
                self._found.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._found.wait()  # a wake reads `scale`, too
                pause = min(30.0, pause * 2)
        if scale.spec.replicas:
            self._begin("scaled already")
        self._follow_pods(scale.status.selector)
        self._session.slices(address.namespace).changed.append(self._update)

    def _follow_pods(self, selector: str) -> None:
        """Follow the pods that a selector names; another one than before is that of a workload that was made anew."""
        if selector == self._selector:
            return
        if self._pods is not None:
            self._pods.changed.remove(self._update)
        self._selector, self._pods = selector, self._session.pods(self.spec.address.namespace, selector)
        self._pods.changed.append(self._update)
        self._update()

    # -- pods and replicas -----------------------------------------------------------------------

    def _update(self) -> None:
        """Bring the pool's replicas up to date with what is known of pods and endpoints."""
        if self._pods is None or not self._pods.listed.is_set():
            return
        listed = self._session.listed(self.spec.address, listed_by_pod)
        states = [state_of(pod, listed, self.spec.address) for pod in self._pods.objects.values()]
        seen = set()
        for state in states:
            if state.leaving:
                continue
            seen.add(state.uid)
            member = self._members.get(state.uid)
            if member is None:
                member = self._join(state)
            self._move(member, state)
        for uid in [uid for uid in self._members if uid not in seen]:
            self._leave(uid)
        self._changed.set()

    def _rest(self) -> Replica:
        """Add the replica that stands for the workload while it has no pod."""
        return self.pool.add(self.name, PhaseTracker(phase=Phase.ASLEEP))

    def _resting(self) -> Replica:
        """Return a replica that has no pod; add one if there is none."""
        taken = {member.replica for member in self._members.values()}
        for replica in self.pool.replicas.values():
            if replica not in taken:
                return replica
        number = 1
        while f"{self.name}-{number}" in self.pool.replicas:
            number += 1
        name = self.name if self.name not in self.pool.replicas else f"{self.name}-{number}"
        return self.pool.add(name, PhaseTracker(phase=Phase.ASLEEP))

    def _begin(self, why: str) -> None:
        """Begin a start, unless one is under way or a replica serves."""
        phases = {replica.tracker.phase for replica in self.pool.replicas.values()}
        if phases & (STARTING | {Phase.SERVING, Phase.SUSPECT}):
            return
        replica = self._resting() if not self._members else next(iter(self.pool.replicas.values()))
        replica.step = "waiting for a pod"
        replica.tracker.to(Phase.MOUNTING, why)

    def _join(self, state: PodState) -> Member:
        replica = self._resting()
        replica.upstream = tcp(state.address, state.port) if state.address else None
        replica.address = lambda: f"{state.name} {replica.upstream.name if replica.upstream else ''}".strip()
        # As if it had been seen before it was ready: `_move` then takes what it is now as news.
        member = self._members[state.uid] = Member(replica, replace(state, ready=False))
        return member

    def _leave(self, uid: str) -> None:
        """Forget a pod that goes or has gone; its requests in flight continue to their end."""
        member = self._members.pop(uid)
        if member.prober is not None:
            member.prober.cancel()
        replica = member.replica
        fields = {"pool": self.name, "replica": replica.name, "pod": member.pod.name}
        log.info("%s: pod %s leaves", self.name, member.pod.name, extra={"event": "pod-leaves", "fields": fields})
        self.pool.remove(replica.name)
        if not self.pool.replicas:
            self._rest()
        if replica.tracker.phase in STARTING and self._waking_since is not None:
            self._begin("its pod left; the next is awaited")
        self.pool.dispatch()

    def _move(self, member: Member, state: PodState) -> None:
        """Move a pod's replica by what is known of the pod now."""
        before, member.pod = member.pod, state
        replica, tracker = member.replica, member.replica.tracker
        if state.address and (replica.upstream is None or replica.upstream.name != f"{state.address}:{state.port}"):
            replica.upstream = tcp(state.address, state.port)
        if state.restarts != before.restarts:
            self._unproven(member, "its container started again")
        fault = member.fault or state.fault
        if fault is None:
            member.faulty_since = None
        elif member.faulty_since is None:
            member.faulty_since = time.monotonic()
            asyncio.get_running_loop().call_later(self.spec.schedule_grace_s + 0.01, self._give_up)
        if state.ready and not before.ready:
            self._serve(member)
        elif before.ready and not state.ready and tracker.phase is Phase.SERVING:
            member.proven, member.waits = False, True  # what it has in flight goes on
            tracker.to(Phase.SUSPECT, "the cluster says that the pod is not ready")
        elif not member.proven:
            if tracker.phase in (Phase.ASLEEP, Phase.IDLE) or (tracker.phase is Phase.FAILED and fault is None):
                tracker.to(Phase.MOUNTING, f"pod {state.name}")
            if tracker.phase in STARTING and (member.prober is None or state.step != before.step):
                replica.step = state.step if fault is None else f"{state.step}: {fault.message}"
            if state.running and state.address and member.prober is None and not member.waits:
                member.prober = self._background.run(self._probe(member))

    def _unproven(self, member: Member, why: str) -> None:
        """Stop sending requests to a pod until it answers again."""
        member.proven = member.waits = False
        member.fault = None
        if member.prober is not None and member.prober.done():
            member.prober = None  # it had found a fault
        if member.replica.tracker.phase in (Phase.SERVING, Phase.SUSPECT):
            member.replica.tracker.to(Phase.FAILED, why)

    def _serve(self, member: Member) -> None:
        """Send requests to a pod."""
        replica, tracker = member.replica, member.replica.tracker
        member.proven, member.waits, member.fault, member.faulty_since = True, False, None, None
        if member.prober is not None and member.prober is not asyncio.current_task():
            member.prober.cancel()
        member.prober = None
        if replica.upstream is None:
            return
        replica.step = ""
        phase = tracker.phase
        if phase is Phase.ASLEEP or phase is Phase.SUSPECT:
            tracker.to(Phase.SERVING, FOUND_UP if phase is Phase.ASLEEP else "ready again")
        elif phase is not Phase.SERVING:
            if phase in (Phase.FAILED, Phase.IDLE):
                tracker.to(Phase.MOUNTING)
            steps = RESTORED if tracker.phase in RESTORED[1:] else COLD
            advance(tracker, steps, steps[-1])
            tracker.to(Phase.SERVING)
        self._changed.set()

    async def _probe(self, member: Member) -> None:
        """Ask a pod until it serves."""
        began, asker = time.monotonic(), Asker(member.replica, self.spec)
        while True:
            try:
                why = await asker.not_ready()
            except StartFailed as error:  # the engine wants a key; waiting does not help
                member.fault = Fault(error.code, error.message)
                member.faulty_since = time.monotonic() - self.spec.schedule_grace_s
                self._give_up()
                return
            if why is None:
                self._serve(member)
                return
            await asyncio.sleep(pause_s(time.monotonic() - began))

    def _suspect(self, replica: Replica, why: str) -> None:
        """A pod refused a connection: ask it until it answers again, or the cluster says that it has gone."""
        for member in self._members.values():
            if member.replica is replica and member.prober is None:
                self._unproven(member, f"it refuses connections: {why}")
                member.prober = self._background.run(self._probe(member))

    # -- wake and sleep --------------------------------------------------------------------------

    async def _wake(self) -> None:
        """Set `scale` to 1 if it is 0, and return when a pod serves.

        Raises StartFailed: the API refuses (cluster-forbidden, workload-not-found), or no pod can start (pod-unschedulable,
        pod-image, pod-config, pod-crashes), or none is made (pod-refused).
        """
        self._waking_since = began = time.monotonic()
        self._begin("woken")
        try:
            await self._scale_up()
            looked, every = time.monotonic(), min(2.0, max(0.5, self.spec.schedule_grace_s))
            while self.pool.ready() is None:
                if not self._members and time.monotonic() - looked > every:
                    await self._scale_up()  # somebody may have set it to 0 in the meantime
                    if time.monotonic() - began > self.spec.schedule_grace_s:
                        await self._check_refusal()
                    looked, every = time.monotonic(), min(30.0, every * 2)
                if (fault := self._stuck() or (self._pods.refused if self._pods is not None else None)) is not None:
                    raise fault.fresh()
                if time.monotonic() - began > self.spec.wake_limit_s:
                    raise StartFailed("wake-timeout", f"no pod was ready after {self.spec.wake_limit_s:g} s")
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await self._changed.wait()
        except BaseException as error:
            why = "cancelled" if isinstance(error, asyncio.CancelledError) else getattr(error, "code", repr(error))
            for replica in self.pool.replicas.values():
                if replica.tracker.phase in STARTING:
                    replica.tracker.to(Phase.FAILED, why)
            raise
        finally:
            self._waking_since = None

    async def _check_refusal(self) -> None:
        """Raise StartFailed (pod-refused) if the cluster makes no pod of the workload, and says why."""
        try:
            refusal = await self._session.cluster.refusal(self.spec.address)
        except StartFailed as error:  # a role without the verb, or an API that is away: the wake goes on
            log.debug("%s: why it has no pod is unknown: %s", self.name, error.detail or error.message)
            return
        if refusal is not None:
            said = f"the cluster makes no pod of {self.spec.address.name}"
            raise StartFailed("pod-refused", f"{said}: {refusal.partition(':')[0]}", detail=f"{said}: {refusal}")

    async def _scale_up(self) -> None:
        """Set `scale` from 0 to 1. A proxy that was quicker is as good; an API that is away is tried again."""
        cluster, pause = self._session.cluster, 0.1
        until = time.monotonic() + self.spec.wake_limit_s
        while True:
            try:
                scale = await cluster.scale(self.spec.address)
                self._found.set()
                if self._pods is not None and scale.status is not None and scale.status.selector:
                    self._follow_pods(scale.status.selector)
                if scale.spec.replicas:
                    return
                await cluster.set_scale(self.spec.address, scale, 1)
                fields = {"pool": self.name, "workload": str(self.spec.address), "replicas": 1}
                log.info("%s: scaled to 1", self.name, extra={"event": "scaled", "fields": fields})
                return
            except StartFailed as error:
                from plugin.proxy.kubernetes.cluster import is_final

                if is_final(error) or time.monotonic() > until:
                    raise
                if self.pool.ready() is not None:
                    return
                if error.code == "busy":  # changed since it was read
                    await asyncio.sleep(_CONFLICT_PAUSE_S * random.uniform(0.5, 1.0))
                    continue
                self._resting_step(error.message)
                await asyncio.sleep(pause)
                pause = min(5.0, pause * 2)

    def _resting_step(self, text: str) -> None:
        for replica in self.pool.replicas.values():
            if replica.tracker.phase in STARTING:
                replica.step = text

    def _stuck(self) -> StartFailed | None:
        """Return why no pod will serve, once each has been faulty for the grace; None while one may still."""
        if not self._members:
            return None
        now, faults = time.monotonic(), []
        for member in self._members.values():
            since, fault = member.faulty_since, member.fault or member.pod.fault
            if since is None or fault is None or now - since < self.spec.schedule_grace_s:
                return None
            faults.append(fault)
        first = faults[0]
        said = f"no pod of {self.spec.address.name} starts"
        return StartFailed(first.code, f"{said}: {first.message}", detail=f"{said}: {first.whole}")

    def _give_up(self) -> None:
        """End the start of pods that have been faulty for the grace; requests that wait get the reason."""
        if (stuck := self._stuck()) is None:
            return
        self._changed.set()
        if self._waking_since is None:
            for member in self._members.values():
                fault = member.fault or member.pod.fault
                if member.replica.tracker.phase in STARTING and fault is not None:
                    member.replica.tracker.to(Phase.FAILED, f"{fault.code}: {fault.whole}")
            if self.pool.held and not self.spec.scales:
                self.pool.waker.fail(stuck)

    async def _sleep(self, *, drained: bool = True) -> None:
        """Set `scale` to 0 once no other proxy has requests for the workload, and wait until its pods go.

        Raises StartFailed: `busy` if another has requests or has changed the workload, or as `cluster_error` says.
        """
        address, cluster = self.spec.address, self._session.cluster
        async with self._session.agreement.quiet(self):
            try:
                async with asyncio.timeout(_WRITE_LIMIT_S):
                    scale = await cluster.scale(address)
                    if not drained and self.busy:
                        raise StartFailed("busy", "a request came")
                    if scale.spec.replicas:
                        await cluster.set_scale(address, scale, 0)
            except TimeoutError:
                raise StartFailed("cluster-unreachable", "the cluster's API was too slow to scale down") from None
            if scale.spec.replicas:
                fields = {"pool": self.name, "workload": str(address), "replicas": 0}
                log.info("%s: scaled to 0", self.name, extra={"event": "scaled", "fields": fields})
            await self._until_gone()

    async def _until_gone(self) -> None:
        """Wait until the pods that are there now are being deleted, so that none of them takes the next request; at most 5 s.

        One that stays although `scale` is 0 serves on. One that comes meanwhile is another wake's, and is not waited for.
        """
        until, going = time.monotonic() + _LEAVE_LIMIT_S, set(self._members)
        while going & self._members.keys() and time.monotonic() < until:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.25):
                    await self._changed.wait()

    async def _watch_unserved(self, idle_s: float) -> None:
        """Set `scale` back to 0 where a pod was wanted, never served, and nobody has waited for it for `idle_s` seconds."""
        while True:
            await asyncio.sleep(min(5.0, max(0.05, idle_s / 4)))
            idle = time.monotonic() - self.pool.last_active
            if self.busy or self.pool.waking or idle < idle_s or self.pool.ready() is not None or not self._members:
                continue
            if self.pool.sleeper.task is not None or self.pool.sleeper.pause.left_s:
                continue
            self.pool.last_active = time.monotonic()
            try:
                await self._sleep(drained=False)
            except ProxyError as error:
                log.debug("%s stays as it is: %s", self.name, error.message)
