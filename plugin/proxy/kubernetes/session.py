"""What all workloads of one proxy share: the API's client, the copies of pods and EndpointSlices, and the agreement with other proxies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightkube.resources.core_v1 import Pod
from lightkube.resources.discovery_v1 import EndpointSlice

from plugin.proxy.kubernetes.address import WorkloadAddress
from plugin.proxy.kubernetes.agreement import Agreement
from plugin.proxy.kubernetes.background import Background
from plugin.proxy.kubernetes.cluster import Cluster
from plugin.proxy.kubernetes.informer import Informer, selector_of
from plugin.proxy.kubernetes.pods import Listed


class Session:
    """One proxy's connection to its cluster."""

    def __init__(self, cluster: Cluster, agreement: Agreement) -> None:
        self.cluster, self.agreement = cluster, agreement
        self._informers: dict[tuple[str, str, str], Informer] = {}
        self._background = Background("the cluster is not followed any more", "cluster-unfollowed")
        self._listed: dict[tuple[str, int | None], tuple[int, dict[str, Listed]]] = {}
        """By namespace and port: the change of the EndpointSlices, and what they said then. All workloads ask after each change."""

    @classmethod
    def from_environment(cls) -> Session:
        """Connect as the environment says. Raises ValueError (cluster-unknown)."""
        cluster = Cluster.from_environment()
        return cls(cluster, Agreement(cluster))

    def pods(self, namespace: str, selector: str) -> Informer:
        """Return the copy of the pods that a selector names."""
        return self._informer(Pod, namespace, selector)

    def slices(self, namespace: str) -> Informer:
        """Return the copy of a namespace's EndpointSlices."""
        return self._informer(EndpointSlice, namespace, "")

    def _informer(self, resource: Any, namespace: str, selector: str) -> Informer:
        key = (resource.__name__, namespace, selector)
        if key not in self._informers:
            labels = selector_of(selector) if selector else None
            self._informers[key] = informer = Informer(self.cluster, resource, namespace, labels=labels)
            self._background.run(informer.run())
        return self._informers[key]

    def listed(
        self, address: WorkloadAddress, read: Callable[[Iterable[EndpointSlice], int | None], dict[str, Listed]]
    ) -> dict[str, Listed]:
        """Return what the namespace's EndpointSlices say of each pod (`pods.listed_by_pod`)."""
        slices, key = self.slices(address.namespace), (address.namespace, address.port)
        known = self._listed.get(key)
        if known is None or known[0] != slices.changes:
            known = self._listed[key] = slices.changes, read(slices.objects.values(), address.port)
        return known[1]

    async def close(self) -> None:
        """Stop following the cluster and leave the agreement."""
        await self._background.close()
        await self.agreement.close()
        await self.cluster.close()
