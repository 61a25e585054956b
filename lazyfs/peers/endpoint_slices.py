"""The peers of a Service, as Kubernetes' EndpointSlices list them: `--peers k8s://NAMESPACE/SERVICE[:PORT]`.

A list and a watch, through lightkube (the extra `kubernetes`) and whatever names the cluster: a pod's service account, else
`KUBECONFIG`. A watch is opened at most once a second and a list after a pause that grows to half a minute; while the API is
away the peers are as they were.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lazyfs.errors import Usage
from lazyfs.logs import RepeatLimiter

log = logging.getLogger("lazyfs.peers.endpoint_slices")
SCHEME = "k8s://"
_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"
_FORM = re.compile(rf"k8s://(?P<namespace>{_LABEL})/(?P<name>{_LABEL})(?::(?P<port>\d{{1,5}}))?")
_SERVICE = "kubernetes.io/service-name"
# The API ends a watch after _WATCH_S, and one that is silent for longer has lost its connection.
_WATCH_S, _SILENT_S, _REOPEN_S = 55, 65.0, 1.0
_PAUSE_S, _PAUSE_MOST_S, _CALL_S = 1.0, 30.0, 10.0


@dataclass(frozen=True)
class Service:
    """A Service whose endpoints are peers. `port`: theirs; None takes the one that the EndpointSlice names."""

    namespace: str
    name: str
    port: int | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.namespace}/{self.name}" + (f":{self.port}" if self.port else "")


def parse_service(word: str) -> Service:
    """Read k8s://NAMESPACE/SERVICE[:PORT]. Raises Usage, also without lightkube (kubernetes-missing)."""
    found = _FORM.fullmatch(word)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or (port is not None and not 0 < port < 65536):
        raise Usage(f"{word!r} names no Service; write k8s://NAMESPACE/SERVICE[:PORT]")
    if importlib.util.find_spec("lightkube") is None:
        what = f"{word} needs lightkube; install it with: pip install 'quickthaw[kubernetes]'"
        raise Usage(what, code="kubernetes-missing")
    return Service(found["namespace"], found["name"], port)


def endpoints(slices: Iterable[Any], port: int | None, default_port: int) -> list[tuple[str, int]]:
    """Return (address, port) of each ready endpoint, sorted; of a dual-stack Service the IPv4 ones, so that each pod counts once.

    Without `port`, it is the slice's port named `peer`, else its only one, else `default_port`.
    """
    found: dict[str, set[tuple[str, int]]] = {}
    for one in slices:
        named = {each.name or "": each.port for each in one.ports or () if each.port}
        at = port or named.get("peer") or (next(iter(named.values())) if len(named) == 1 else default_port)
        for endpoint in one.endpoints or ():
            # Without a condition it is unknown, which the API defines as ready.
            if endpoint.conditions is None or endpoint.conditions.ready is not False:
                found.setdefault(one.addressType, set()).update((address, at) for address in endpoint.addresses[:1])
    return sorted(found.get("IPv4") or found.get("IPv6") or ())


class EndpointSlices:
    """Follow a Service in a thread; `on_change` gets the endpoints after each change, in that thread."""

    def __init__(self, service: Service, default_port: int, on_change: Callable[[list[tuple[str, int]]], None]) -> None:
        self.service, self._default_port, self._on_change = service, default_port, on_change
        self._ended = threading.Event()
        threading.Thread(target=self._run, name=f"peers-{service.name}", daemon=True).start()

    def close(self) -> None:
        """Report no change from now on; the thread ends with its watch, within a minute."""
        self._ended.set()

    def _run(self) -> None:
        import httpx2
        from lightkube.core.exceptions import ConfigError
        from yaml import YAMLError

        # The last ones: of an answer, or a kubeconfig, that is not what it should be.
        errors = (httpx2.HTTPError, ConfigError, YAMLError, OSError, ValueError, TypeError, LookupError, AttributeError)
        client, failures, repeats = None, 0, RepeatLimiter(log, every_s=600.0)
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                client = client or _client()
                self._follow(client)
            except errors as error:
                failures = failures + 1 if time.monotonic() - began < _SILENT_S else 1
                why = " ".join(str(error).split()) or type(error).__name__
                refused = getattr(getattr(error, "status", None), "code", None) in (401, 403)
                remedy = (
                    "; its service account needs list and watch of endpointslices (docs/lazyfs.md)" if refused else ""
                )
                if failures > 1 or refused:  # a watch that was cut once is nothing
                    repeats.log(logging.WARNING, "api", f"the peers of {self.service} are as before: {why}{remedy}")
                # Spread, so that not every host lists in the moment in which the API is back.
                pause = min(_PAUSE_MOST_S, _PAUSE_S * 2 ** min(failures - 1, 10))
                self._ended.wait(pause * random.uniform(0.5, 1.0))
        if client is not None:
            client.close()

    def _follow(self, client: Any) -> None:
        """Report the peers, and each change. Returns when closed; raises the client's errors."""
        from lightkube.resources.discovery_v1 import EndpointSlice

        where: dict[str, Any] = {"namespace": self.service.namespace, "labels": {_SERVICE: self.service.name}}
        listing = client.list(EndpointSlice, **where)
        slices = {one.metadata.name: one for one in listing}
        self._report(slices)
        version = listing.resourceVersion
        for what, one in client.watch(EndpointSlice, **where, resource_version=version, server_timeout=_WATCH_S):
            if self._ended.is_set():
                return
            if what == "DELETED":
                slices.pop(one.metadata.name, None)
            elif what != "BOOKMARK":
                slices[one.metadata.name] = one
            self._report(slices)

    def _report(self, slices: dict[str, Any]) -> None:
        if not self._ended.is_set():
            self._on_change(endpoints(slices.values(), self.service.port, self._default_port))


def _client() -> Any:
    """Return a client of the cluster that the environment names. Raises what lightkube raises, and ValueError for damaged certificates."""
    import httpx2
    from lightkube import Client, KubeConfig
    from lightkube.config.client_adapter import verify_cluster

    class Paced(httpx2.BaseTransport):
        """Open the watch at most once a second, and give up one that is silent for longer than the API keeps it open."""

        def __init__(self, inner: httpx2.BaseTransport) -> None:
            self.inner, self.opened = inner, -_REOPEN_S

        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            if request.url.params.get("watch"):
                time.sleep(max(0.0, self.opened + _REOPEN_S - time.monotonic()))
                self.opened = time.monotonic()
                request.extensions["timeout"] = {**request.extensions.get("timeout", {}), "read": _SILENT_S}
            return self.inner.handle_request(request)

        def close(self) -> None:
            self.inner.close()

    config = KubeConfig.from_env().get()
    if config is None or config.user is None:
        raise ValueError("no cluster is named: run in a pod, or set KUBECONFIG")
    try:
        trust = verify_cluster(config.cluster, config.user, config.abs_file)
    except (OSError, ValueError) as error:  # which name no file
        where = config.cluster.certificate_auth or config.fname or "the kubeconfig"
        raise ValueError(f"the certificates of {where} cannot be read: {error}") from error
    transport = Paced(httpx2.HTTPTransport(verify=trust))
    return Client(config, timeout=httpx2.Timeout(_CALL_S), transport=transport, trust_env=False)
