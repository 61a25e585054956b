"""How several proxies in front of the same workloads agree that one of these may be scaled to 0.

Each proxy keeps one Lease in each namespace, renewed every 5 s, which names the workloads that it serves. A proxy whose
workload is idle writes into its Lease that it wants quiet; every other proxy that serves the workload then either says
no, since it has requests, or holds new requests for it and says yes. Once all have said yes, `scale` is written, and
the wish is withdrawn: the others send requests on, or wake the workload anew.

Guarantees: nobody scales a workload down under the requests of a proxy whose Lease is valid. A proxy that asked and was
killed delays the others by 15 s at most. One whose Lease has expired counts as dead: killed, or cut off from the API;
the requests of the latter still end in order, because a pod that is deleted finishes those that it has.
Validity is measured on the reader's own clock, from the last change that it saw; a reader that saw nothing for 10 s, not
even its own renewals, takes nobody for dead, and scales nothing down.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from lightkube.models.coordination_v1 import LeaseSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.coordination_v1 import Lease
from lightkube.types import PatchType

from plugin.proxy.errors import StartFailed
from plugin.proxy.kubernetes.address import WorkloadAddress
from plugin.proxy.kubernetes.background import Background
from plugin.proxy.kubernetes.cluster import Cluster
from plugin.proxy.kubernetes.informer import Informer

log = logging.getLogger("quickthaw.proxy")
_LABEL = "quickthaw.dev/proxy"
_NOTE = "quickthaw.dev/agreement"
RENEW_S = 5.0
VALID_S = 15.0
HEARD_S = 10.0
"""How long the copy of the Leases counts without a change; this proxy's own renewals are changes, too."""
ASK_S = 4.0
"""How long the others may take to answer."""
HOLD_S = 15.0
"""How long one that said yes holds its requests if it hears nothing more; longer than `ASK_S` and the writing of `scale`."""
SETTLE_S = 8.0
"""How long it then waits at most until the pods go, if the workload was scaled to 0."""


class Shared(Protocol):
    """The part of a workload (`workload.Workload`) that the agreement needs."""

    @property
    def address(self) -> WorkloadAddress:
        """Return its address."""

    @property
    def busy(self) -> bool:
        """Return True if requests are held or in flight here."""

    def hold(self, on: bool) -> None:
        """Hold new requests, or send them on."""

    async def settle(self) -> None:
        """Wait until its pods go, if it was scaled to 0."""


@dataclass
class _Other:
    """What another proxy's Lease says."""

    version: str
    seen_at: float
    serves: frozenset[str]
    wants: dict[str, str]
    """Shared → token of its wish."""
    answers: dict[str, str]
    """Token → `yes` or `no`."""

    @property
    def valid(self) -> bool:
        return time.monotonic() - self.seen_at < VALID_S


@dataclass(eq=False)
class _Circle:
    """The proxies of one namespace."""

    namespace: str
    leases: Informer
    workloads: dict[str, Shared] = field(default_factory=dict)
    others: dict[str, _Other] = field(default_factory=dict)
    wants: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    heard_at: float = -math.inf
    """When the copy of the Leases changed last (monotonic seconds)."""
    registered: bool = False
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def current(self) -> bool:
        """Return True if what others wrote is seen here."""
        return time.monotonic() - self.heard_at < HEARD_S


class Agreement:
    """This proxy's part of the agreement."""

    def __init__(self, cluster: Cluster, identity: str | None = None) -> None:
        self.cluster = cluster
        host = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname().lower()).strip("-")
        self.identity = identity or f"{host[:40] or 'proxy'}-{secrets.token_hex(3)}"
        self._circles: dict[str, _Circle] = {}
        self._background = Background("the agreement of several proxies failed", "agreement-failed")

    def join(self, workload: Shared) -> None:
        """Tell the others that this proxy serves a workload."""
        namespace = workload.address.namespace
        if namespace not in self._circles:
            leases = Informer(self.cluster, Lease, namespace, labels=[(_LABEL, None)], silent_s=HEARD_S)
            circle = self._circles[namespace] = _Circle(namespace, leases)
            leases.changed.append(lambda: self._heard(circle))
            self._background.run(leases.run())
            self._background.run(self._renew(circle))
        self._circles[namespace].workloads[_key(workload)] = workload

    @contextlib.asynccontextmanager
    async def quiet(self, workload: Shared) -> AsyncIterator[None]:
        """Run the block while no other proxy sends requests to the workload. Raises StartFailed (busy) if one has some."""
        circle, key = self._circles[workload.address.namespace], _key(workload)
        if not circle.registered or not circle.leases.listed.is_set():
            raise StartFailed("busy", "this proxy's Lease is not written yet, so others may not know of it")
        if not circle.current:
            raise StartFailed("busy", f"nothing was heard of the Leases for {HEARD_S:g} s, so others may have requests")
        if not self._serving(circle, key):
            yield
            return
        token = f"{self.identity}/{secrets.token_hex(4)}"
        circle.wants[key] = token
        try:
            async with asyncio.timeout(ASK_S):
                await self._write(circle)
                while True:
                    circle.heard.clear()
                    answers = [other.answers.get(token) for other in self._serving(circle, key)]
                    if "no" in answers:
                        raise StartFailed("busy", "another proxy has requests for the workload")
                    if all(answer == "yes" for answer in answers):
                        break
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            await circle.heard.wait()
            yield
        except TimeoutError:
            raise StartFailed("busy", f"another proxy did not answer within {ASK_S:g} s") from None
        finally:
            circle.wants.pop(key, None)
            self._background.run(self._write_quietly(circle))

    def _serving(self, circle: _Circle, key: str) -> list[_Other]:
        """Return the other proxies that serve a workload and are not dead."""
        return [other for other in circle.others.values() if other.valid and key in other.serves]

    def _heard(self, circle: _Circle) -> None:
        """Read the Leases; answer who wants quiet."""
        now, found = time.monotonic(), dict[str, _Other]()
        missed, circle.heard_at = not circle.current, now
        for name, lease in circle.leases.objects.items():
            if lease.spec is None or lease.spec.holderIdentity in (None, self.identity):
                continue
            before = circle.others.get(name)
            if before is not None and before.version == lease.metadata.resourceVersion:
                found[name] = before
                if missed:  # it may have been cut off just as this proxy was
                    before.seen_at = now
                continue
            # One that is seen for the first time may be dead already; it has its whole time again.
            found[name] = _Other(lease.metadata.resourceVersion, now, *_note_of(lease))
        circle.others = found
        circle.heard.set()
        for other in found.values():
            for key, token in other.wants.items():
                if key in circle.workloads and token not in circle.answers and other.valid:
                    self._answer(circle, circle.workloads[key], token)
        wished = {token for other in found.values() for token in other.wants.values()}
        for token in [token for token in circle.answers if token not in wished]:
            del circle.answers[token]

    def _answer(self, circle: _Circle, workload: Shared, token: str) -> None:
        circle.answers[token] = "no" if workload.busy else "yes"
        if circle.answers[token] == "yes":
            workload.hold(True)
            self._background.run(self._hold(circle, workload, token))
        else:
            self._background.run(self._write_quietly(circle))

    async def _hold(self, circle: _Circle, workload: Shared, token: str) -> None:
        """Hold new requests until the wish is withdrawn, its proxy is dead, or 15 s have passed."""
        until = time.monotonic() + HOLD_S
        try:
            await self._write_quietly(circle)
            while time.monotonic() < until:
                asking = [other for other in circle.others.values() if token in other.wants.values()]
                if not any(other.valid for other in asking):
                    break
                circle.heard.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await circle.heard.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await workload.settle()
        finally:
            workload.hold(False)

    async def _renew(self, circle: _Circle) -> None:
        """Renew this proxy's Lease until cancelled; remove those of proxies that are long dead."""
        while True:
            await self._write_quietly(circle)
            dead = [name for name, other in circle.others.items() if time.monotonic() - other.seen_at > 4 * VALID_S]
            for name in dead if circle.current else ():
                with contextlib.suppress(StartFailed):
                    async with self.cluster.errors():
                        await self.cluster.client.delete(Lease, name, namespace=circle.namespace)
            await asyncio.sleep(RENEW_S)

    async def _write_quietly(self, circle: _Circle) -> None:
        """Write this proxy's Lease; a failure is logged, and the next renewal tries again."""
        try:
            await self._write(circle)
        except StartFailed as error:
            level = logging.WARNING if error.code == "cluster-forbidden" else logging.DEBUG
            fields = {"namespace": circle.namespace, "code": error.code}
            text = "the Lease in %s was not written: %s; until it is, nothing is scaled to 0 from here"
            log.log(
                level,
                text,
                circle.namespace,
                error.detail or error.message,
                extra={"event": "lease-failed", "fields": fields},
            )

    async def _write(self, circle: _Circle) -> None:
        async with circle.writing:
            name = f"quickthaw-{self.identity}"
            note = {"serves": sorted(circle.workloads), "wants": circle.wants, "answers": circle.answers}
            now = datetime.now(UTC)
            labels, annotations = {_LABEL: "1"}, {_NOTE: json.dumps(note)}
            if circle.registered:
                change = {
                    "metadata": {"labels": labels, "annotations": annotations},
                    "spec": {"renewTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ")},
                }
                try:
                    async with self.cluster.errors():
                        await self.cluster.client.patch(
                            Lease, name, change, namespace=circle.namespace, patch_type=PatchType.MERGE
                        )
                    return
                except StartFailed as error:
                    if error.code != "workload-not-found":
                        raise
                    circle.registered = False  # removed by others; it is made again
            lease = Lease(
                metadata=ObjectMeta(name=name, namespace=circle.namespace, labels=labels, annotations=annotations),
                spec=LeaseSpec(
                    holderIdentity=self.identity, leaseDurationSeconds=int(VALID_S), acquireTime=now, renewTime=now
                ),
            )
            async with self.cluster.errors():
                await self.cluster.client.create(lease)
            circle.registered = True

    async def close(self) -> None:
        """Leave: the others need not wait for this proxy's Lease to expire."""
        await self._background.close()
        for circle in self._circles.values():
            if circle.registered:
                with contextlib.suppress(StartFailed):
                    async with self.cluster.errors():
                        await self.cluster.client.delete(
                            Lease, f"quickthaw-{self.identity}", namespace=circle.namespace
                        )


def _key(workload: Shared) -> str:
    address = workload.address
    return f"{address.kind}/{address.name}"


def _note_of(lease: Lease) -> tuple[frozenset[str], dict[str, str], dict[str, str]]:
    """Return what a proxy wrote into its Lease: what it serves, wants and answers. Whatever is not ours is left out."""
    meta = lease.metadata
    try:
        note = json.loads((meta.annotations or {}).get(_NOTE, "") if meta else "")
    except (ValueError, RecursionError):
        note = None
    note = note if isinstance(note, dict) else {}
    serves, wants, answers = (note.get(name) for name in ("serves", "wants", "answers"))
    named = frozenset(each for each in serves if isinstance(each, str)) if isinstance(serves, list) else frozenset()
    return named, _texts(wants), _texts(answers)


def _texts(value: Any) -> dict[str, str]:
    return {key: text for key, text in value.items() if isinstance(text, str)} if isinstance(value, dict) else {}
