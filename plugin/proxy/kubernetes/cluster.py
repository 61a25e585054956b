"""The cluster's API: one client for all workloads, with pauses where the API asks for them, and coded errors.

lightkube is the client: asynchronous, typed, maintained, 4 MB with its models, imported in 0.12 s; kubernetes-asyncio is
larger by far (generated), kr8s had no release for most of a year. Its HTTP client gets a transport that counts calls,
waits as long as a 429 says, and keeps a watch that ends at once from being opened again in a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient, KubeConfig
from lightkube.config.client_adapter import verify_cluster
from lightkube.core.exceptions import ConfigError
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.apps_v1 import Deployment, StatefulSet
from yaml import YAMLError

from plugin.proxy.errors import StartFailed
from plugin.proxy.kubernetes.address import WorkloadAddress

CALL_LIMIT_S = 10.0
_WATCH_PAUSE_S = 1.0
"""Least time between two openings of the same watch."""
_THROTTLED_TRIES = 4
_THROTTLED_MOST_S = 10.0
KINDS: dict[str, Any] = {"deployment": Deployment, "statefulset": StatefulSet}


class Paced(httpx2.AsyncBaseTransport):
    """Send requests to the API: count them, wait as long as a 429 says, and open the same watch at most once a second."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        """How many requests were sent, by method; a watch counts as WATCH."""
        self._opened: dict[str, float] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; the answer to a 429 is awaited up to four times."""
        watch = request.url.params.get("watch") in ("true", "True", "1")
        if watch:
            where = f"{request.url.path}?{request.url.params.get('labelSelector', '')}"
            early = self._opened.get(where, -_WATCH_PAUSE_S) + _WATCH_PAUSE_S - time.monotonic()
            if early > 0:
                await asyncio.sleep(early)
            self._opened[where] = time.monotonic()
        for attempt in range(_THROTTLED_TRIES + 1):
            self.calls["WATCH" if watch else request.method] += 1
            response = await self.inner.handle_async_request(request)
            if response.status_code != 429 or attempt == _THROTTLED_TRIES:
                break
            await response.aread()
            await response.aclose()
            try:
                pause = float(response.headers.get("retry-after", ""))
            except ValueError:
                pause = 0.5 * 2**attempt
            # Not all who were refused come back in the same moment.
            await asyncio.sleep(min(_THROTTLED_MOST_S, pause) * random.uniform(1.0, 1.25))
        return response

    async def aclose(self) -> None:
        """Close all connections."""
        await self.inner.aclose()


def cluster_error(error: Exception) -> StartFailed:
    """Return the error of a failed call, with a stable code and the remedy where there is one."""
    if isinstance(error, StartFailed):
        return error
    status = _status(error)
    said = " ".join(str(error).split()) or type(error).__name__
    if status in (401, 403):
        remedy = "give its service account the role of docs/kubernetes.md"
        return StartFailed("cluster-forbidden", f"the cluster's API refused: {remedy}", detail=f"{said}; {remedy}")
    if status == 404:
        return StartFailed("workload-not-found", "the cluster has no such workload; see the proxy's log", detail=said)
    if status == 409:
        return StartFailed("busy", "the workload was changed by others meanwhile", detail=said)
    what = "the cluster's API does not answer" if status is None else f"the cluster's API answers {status}"
    if isinstance(error, ValueError):
        what = "the cluster's API sends what cannot be read"
    return StartFailed("cluster-unreachable", what, detail=f"{what}: {said}")


def _status(error: Exception) -> int | None:
    if isinstance(error, ApiError) and error.status is not None and error.status.code:
        return error.status.code
    return error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else None


def is_gone(error: Exception) -> bool:
    """Return True if a watch must begin with a new list: its resource version is too old (410)."""
    return _status(error) == 410


def is_conflict(error: Exception) -> bool:
    """Return True if an object changed since it was read (409)."""
    return _status(error) == 409


def is_final(error: StartFailed) -> bool:
    """Return True if trying again does not help: no permission, or no such workload."""
    return error.code in ("cluster-forbidden", "workload-not-found")


class Cluster:
    """The API of one cluster, as the environment names it: in a pod its service account, else `KUBECONFIG`."""

    def __init__(self, client: AsyncClient, transport: Paced, namespace: str) -> None:
        self.client, self._transport, self.namespace = client, transport, namespace
        self.reported_away = False
        """True once the log says that the API does not answer; False again once it does."""

    @classmethod
    def from_environment(cls) -> Cluster:
        """Connect to the cluster that the environment names. Raises ValueError (cluster-unknown) if it names none."""
        try:
            config = KubeConfig.from_env().get()
        except (ConfigError, OSError, KeyError, ValueError, YAMLError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"cluster-unknown: {said}; run in a pod, or set KUBECONFIG") from error
        if config is None or config.user is None:
            raise ValueError("cluster-unknown: the kubeconfig names no cluster or no user; set KUBECONFIG")
        try:
            trust = verify_cluster(config.cluster, config.user, config.abs_file)
        except (ConfigError, OSError, ValueError) as error:  # damaged certificates are OSErrors that name no file
            where = config.cluster.certificate_auth or config.fname or "the kubeconfig"
            said = " ".join(str(error).split())
            raise ValueError(f"cluster-unknown: the certificates of {where} cannot be read: {said}") from error
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=8)
        transport = Paced(httpx2.AsyncHTTPTransport(verify=trust, limits=limits))
        client = AsyncClient(
            config,
            timeout=httpx2.Timeout(CALL_LIMIT_S),
            transport=transport,
            field_manager="quickthaw",
            trust_env=False,
        )
        return cls(client, transport, config.namespace or "default")

    @property
    def calls(self) -> dict[str, int]:
        """Return how many requests were sent to the API, by method."""
        return dict(self._transport.calls)

    async def scale(self, address: WorkloadAddress) -> Any:
        """Return the workload's `scale`: how many replicas are wanted, its selector, its resource version. Raises StartFailed."""
        kind = KINDS[address.kind].Scale
        async with self.errors():
            return await self.client.get(kind, address.name, namespace=address.namespace)

    async def refusal(self, address: WorkloadAddress) -> str | None:
        """Return why the cluster makes no pods of a Deployment (a quota, an admission webhook), None if it says nothing.

        A StatefulSet says it in events only, which are not read. Raises StartFailed.
        """
        if address.kind != "deployment":
            return None
        async with self.errors():
            found = await self.client.get(Deployment, address.name, namespace=address.namespace)
        for each in (found.status.conditions if found.status else None) or ():
            if each.type == "ReplicaFailure" and each.status == "True":
                return " ".join(f"{each.reason}: {each.message}".split())[:1000]
        return None

    async def set_scale(self, address: WorkloadAddress, seen: Any, replicas: int) -> None:
        """Set how many replicas are wanted, if the workload is still as it was `seen`.

        Raises StartFailed: `busy` if it changed since, or as `cluster_error` says.
        """
        kind = KINDS[address.kind].Scale
        meta = ObjectMeta(name=address.name, namespace=address.namespace, resourceVersion=seen.metadata.resourceVersion)
        wanted = kind(metadata=meta, spec=type(seen.spec)(replicas=replicas))
        async with self.errors():
            await self.client.replace(wanted, address.name, namespace=address.namespace)

    @contextlib.asynccontextmanager
    async def errors(self) -> AsyncIterator[None]:
        """Limit a call to 10 s and convert its errors. Raises StartFailed."""
        try:
            async with asyncio.timeout(CALL_LIMIT_S + 5.0):
                yield
        except (httpx2.HTTPError, ApiError, ConfigError, TimeoutError, OSError, ValueError) as error:
            raise cluster_error(error) from error

    async def close(self) -> None:
        """Close all connections to the API."""
        await self.client.close()
