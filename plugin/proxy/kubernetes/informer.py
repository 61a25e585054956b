"""A copy of the objects of one kind, kept by a list and a watch; the copy stays, as it was, while the API is away.

A watch that breaks is opened again where it ended. It begins anew with a list after 410 Gone, and whatever was missed
then shows as a change. A watch that is silent for 55 s is opened again, too: a dead connection has no other sign.
A line that was cut off is a watch that broke. A callback that fails is logged, and ends neither the copy nor the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Callable
from typing import Any

import httpx2
from lightkube import ApiError, operators
from lightkube.core.exceptions import ConfigError

from plugin.proxy.errors import StartFailed
from plugin.proxy.kubernetes.cluster import Cluster, cluster_error, is_final, is_gone
from plugin.proxy.pool.backoff import Backoff

log = logging.getLogger("quickthaw.proxy")
SILENT_S = 55.0
_CHUNK = 500
_SETS = re.compile(r"(?P<key>\S+) (?P<op>in|notin) \((?P<values>[^)]*)\)")


def selector_of(text: str) -> list[tuple[str, Any]]:
    """Return the selector that a `scale` has as text (`app=x,tier in (a,b),!old`), in lightkube's form."""
    found: list[tuple[str, Any]] = []
    for part in re.split(r",(?![^(]*\))", text):
        sets = _SETS.fullmatch(part.strip())
        if sets is not None:
            values = [value.strip() for value in sets["values"].split(",")]
            found.append((sets["key"], operators.in_(values) if sets["op"] == "in" else operators.not_in(values)))
        elif "!=" in part:
            key, _, value = part.partition("!=")
            found.append((key.strip(), operators.not_equal(value.strip())))
        elif "=" in part:
            key, _, value = part.partition("=")
            found.append((key.strip(), operators.equal(value.lstrip("=").strip())))
        elif part.strip().startswith("!"):
            found.append((part.strip()[1:], operators.not_exists()))
        elif part.strip():
            found.append((part.strip(), operators.exists()))
    return found


class Informer:
    """Keep a copy of the objects of one kind in one namespace."""

    def __init__(
        self,
        cluster: Cluster,
        resource: Any,
        namespace: str,
        *,
        labels: Any = None,
        silent_s: float = SILENT_S,
    ) -> None:
        """`labels`: a selector as `selector_of` returns it. `silent_s`: seconds without a change after which a watch is opened again."""
        self.cluster, self.resource, self.namespace, self.labels = cluster, resource, namespace, labels
        self.silent_s = silent_s
        self.objects: dict[str, Any] = {}
        """The objects by name."""
        self.changes = 0
        """How often the copy has changed."""
        self.changed: list[Callable[[], None]] = []
        """Called on the loop after each change."""
        self.listed = asyncio.Event()
        """Set once the objects were listed for the first time."""
        self.away_since: float | None = None
        """When the API stopped answering (monotonic seconds); None while it answers."""
        self.refused: StartFailed | None = None
        """Why the API refuses this kind altogether; None while it does not."""
        self._version: str | None = None

    async def run(self) -> None:
        """Keep the copy until cancelled."""
        pause = Backoff(0.25, 10.0)
        while True:
            try:
                if self._version is None:
                    await self._list()
                await self._watch(pause)
            except (httpx2.HTTPError, ApiError, ConfigError, OSError, ValueError) as error:
                if is_gone(error):
                    self._version = None
                    continue
                if pause.failures:  # more than a watch that was cut: whatever was missed shows in a list
                    self._version = None
                    self.away_since = self.away_since or time.monotonic()
                said = cluster_error(error)
                self.refused = said if is_final(said) else self.refused
                text = "%s in %s: %s; what is known of them stays in use"
                # Once for each time that the API is away, not for each of the copies.
                first = pause.failures == 3 and not self.cluster.reported_away
                self.cluster.reported_away = self.cluster.reported_away or first
                level = logging.WARNING if first else logging.DEBUG
                what = self.resource.__name__
                fields = {"kind": what, "namespace": self.namespace, "code": said.code}
                reason = said.detail or said.message
                log.log(level, text, what, self.namespace, reason, extra={"event": "cluster-away", "fields": fields})
                # Spread, so that not everybody lists in the moment in which the API is back.
                await asyncio.sleep(pause.failed() * random.uniform(0.5, 1.0))

    async def _list(self) -> None:
        found: dict[str, Any] = {}
        listing = self.cluster.client.list(
            self.resource, namespace=self.namespace, labels=self.labels, chunk_size=_CHUNK
        )
        async for one in listing:
            found[one.metadata.name] = one
        self._version = listing.resourceVersion
        self.objects = found
        self.away_since = self.refused = None
        self.cluster.reported_away = False
        self.listed.set()
        self._notify()

    async def _watch(self, pause: Backoff) -> None:
        """Apply changes until the watch breaks (raises the client's errors) or is silent."""
        events = self.cluster.client.watch(
            self.resource, namespace=self.namespace, labels=self.labels, resource_version=self._version
        )
        iterator = aiter(events)
        try:
            while True:
                try:
                    async with asyncio.timeout(self.silent_s):
                        what, one = await anext(iterator)
                except (TimeoutError, StopAsyncIteration):
                    return
                pause.succeeded()
                self._version = one.metadata.resourceVersion
                if what == "BOOKMARK":
                    continue
                if what == "DELETED":
                    self.objects.pop(one.metadata.name, None)
                else:
                    self.objects[one.metadata.name] = one
                self._notify()
        finally:
            with contextlib.suppress(httpx2.HTTPError, OSError):
                await iterator.aclose()  # type: ignore[attr-defined]

    def _notify(self) -> None:
        self.changes += 1
        for callback in tuple(self.changed):
            try:
                callback()
            except Exception:  # the next change calls it again, with all that is known by then
                fields = {"kind": self.resource.__name__, "namespace": self.namespace}
                text = "a change of %s in %s was not taken in"
                extra = {"event": "change-failed", "fields": fields}
                log.exception(text, self.resource.__name__, self.namespace, extra=extra)
