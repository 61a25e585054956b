"""Several models behind one port: choose a request's endpoint, limit how many are awake (`admission`).

A request's model comes from the JSON body's `model`, a multipart form's field, `?model=` in the query (WebSockets), or
the configuration's `default` (`endpoints.models_file`). To find it, bodies are buffered (up to `max_body`).

Guarantees: at most `max_awake` models are awake or waking, and together they take at most `gpu_memory`. A model goes to
standby or to sleep only when it answers no request, and new requests for it wait for its next wake. While it has requests,
it stays awake for at least `min_awake_s`, so that two models in demand alternate instead of thrashing. A model that still
answers after `evict_grace`, or fails to sleep, continues to serve, and the requests that need its place get an error.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import msgspec

from plugin.proxy.endpoints.admission import Admission, Member
from plugin.proxy.endpoints.endpoint import Endpoint
from plugin.proxy.endpoints.forms import form_field
from plugin.proxy.endpoints.models_file import Config, spec_of, workload_of
from plugin.proxy.errors import ClientFault, Unavailable
from plugin.proxy.http.client import Client
from plugin.proxy.http.path_rules import HEALTH
from plugin.proxy.http.request import Request
from plugin.proxy.kubernetes import address as k8s
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.pressure import relieve
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.kubernetes.session import Session
    from plugin.proxy.kubernetes.workload import Workload


_PLAIN_LEAST, _PLAIN_RATIO = 1 << 20, 32
"""Decompressed size that is always accepted, and the maximum compression ratio of a larger body. A body that grows a
thousandfold would block the event loop for a third of a second with 60 KB from the client."""
_LIST_PATHS = ("/v1/models", "/models")


class Models:
    """Own the endpoints of all models, and the limit that they share."""

    def __init__(
        self, config: Config, sleep_after: float = 0.0, standby_after: float = 0.0, *, scales: bool = True
    ) -> None:
        """`sleep_after` and `standby_after` (seconds; 0 never) apply to models that set none; `scales`: see `WorkloadSpec`.

        Raises ValueError (kubernetes-missing, cluster-unknown) if a model is a workload and its cluster cannot be reached.
        """
        from plugin.records.lead_times import history_of_snapshot  # only this mode needs what it imports

        room = Admission(config.max_awake, config.evict, config.min_awake, config.evict_grace, config.gpu_memory)
        self.endpoints: dict[str, Endpoint | Workload] = {}
        self._session: Session | None = None
        for name, model in config.models.items():
            endpoint: Endpoint | Workload
            if k8s.is_workload(model.upstream):
                from plugin.proxy.kubernetes.extra import connect

                workload, self._session = connect(self._session)
                endpoint = workload(name, workload_of(model, sleep_after, scales), self._session, room=room.guard)
            else:
                endpoint = Endpoint(
                    name,
                    spec_of(model, sleep_after, standby_after),
                    room=room.guard,
                    history=history_of_snapshot(model.snapshot),
                )
            self.endpoints[name] = endpoint
            needed = endpoint.spec.facts.gpu_memory
            if config.gpu_memory and needed > config.gpu_memory:
                raise ValueError(
                    f"model {name!r} takes {needed / 1e9:.1f} GB of GPU memory, more than gpu_memory allows"
                )
            room.add(Member(endpoint, model.priority, needed))
        self._relieving: asyncio.Task[None] | None = None

    @property
    def pools(self) -> dict[str, ReplicaPool]:
        """Return every model's pool by its name."""
        return {name: endpoint.pool for name, endpoint in self.endpoints.items()}

    async def start(self) -> None:
        """Start every endpoint, which checks if it is up already."""
        await asyncio.gather(*(endpoint.start() for endpoint in self.endpoints.values()))
        self._relieving = asyncio.get_running_loop().create_task(relieve(lambda: self.pools.values()))

    def kill(self) -> None:
        """Kill all processes started here, at once."""
        for endpoint in self.endpoints.values():
            endpoint.kill()

    async def close(self) -> None:
        """End all processes started here."""
        if self._relieving is not None:
            self._relieving.cancel()
            await asyncio.gather(self._relieving, return_exceptions=True)
        await asyncio.gather(*(endpoint.close() for endpoint in self.endpoints.values()))
        if self._session is not None:
            await self._session.close()


class ModelRouter:
    """The router of several models (`server.Router`). It only chooses a pool, so each worker can have its own."""

    def __init__(self, config: Config, pools: dict[str, ReplicaPool]) -> None:
        self.config, self._pools = config, pools
        for name, model in config.models.items():
            if name in pools:  # this also runs in a worker, whose pools are mirrors
                pools[name].upstream_timeout_s = model.upstream_timeout
        self._names = {alias: name for name, model in config.models.items() for alias in (name, *model.aliases)}

    def pools(self) -> Sequence[ReplicaPool]:
        """Return every model's pool."""
        return list(self._pools.values())

    def answer(self, request: Request) -> dict[str, Any] | None:
        """Answer the list of models, or one of them, or a probe that names none, without waking any.

        Raises Unavailable (no-model-ready) if no model would take a request.
        """
        if request.method not in (b"GET", b"HEAD"):
            return None
        if (
            request.path in HEALTH
            and b"?" not in request.target
            and self.config.default is None
            and len(self._pools) > 1
        ):
            if not any(pool.ready() is not None or pool.accepts() for pool in self._pools.values()):
                raise Unavailable("no-model-ready", "no model takes requests now; see the status page")
            return {"status": "ok"}
        if request.path in _LIST_PATHS:
            return {"object": "list", "data": [self._described(name) for name in self._pools]}
        for folder in _LIST_PATHS:
            if request.path.startswith(folder + "/"):
                asked = unquote(request.path.removeprefix(folder + "/"))
                if asked not in self._names:
                    raise ClientFault("model-not-found", f"there is no model {asked[:100]!r}", status=404)
                return self._described(self._names[asked])
        return None

    def _described(self, name: str) -> dict[str, Any]:
        replicas = self._pools[name].replicas.values()
        phase = str(max(replicas, key=lambda each: each.tracker.phase is Phase.SERVING).tracker.phase)
        return {"id": name, "object": "model", "created": 0, "owned_by": "quickthaw", "phase": phase}

    async def route(self, client: Client, request: Request) -> ReplicaPool:
        """Return the pool of the model that the request names, reading the whole body if needed.

        Raises ClientFault when the request names no model or an unknown one.
        """
        name = await self._name(client, request)
        if name is None:
            name = self.config.default
        if name is None and len(self._pools) == 1:
            name = next(iter(self._pools))
        if name is None:
            raise ClientFault("model-missing", "the request names no model, and there is no default")
        if name not in self._names:
            raise ClientFault("model-not-found", f"there is no model {name[:100]!r}", status=404)
        chosen = self._names[name]
        served = self.config.models[chosen].served_name
        if served is not None and served != name and request.complete:
            before = request.buffered
            await self._rename(request, served)
            client.host.buffered += request.buffered - before
        return self._pools[chosen]

    async def _rename(self, request: Request, served: str) -> None:
        """Replace the model's name with the engine's. All other values stay as written; a content coding is removed."""
        try:
            document = msgspec.json.decode(await self._plain(request), type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        document["model"] = msgspec.Raw(msgspec.json.encode(served))
        body = msgspec.json.encode(document)
        request.body[:] = body
        request.buffered = len(body)
        gone = (b"content-length", b"content-encoding")
        request.headers = [field for field in request.headers if field[0] not in gone]
        if not request.chunked:
            request.length = len(body)
            request.headers.append((b"content-length", b"Content-Length", b"%d" % len(body)))

    async def _plain(self, request: Request) -> bytes:
        """Return the body without its content coding; decompression runs in a thread."""
        coding = request.header(b"content-encoding").lower().strip()
        body = bytes(request.body)
        if coding in (b"", b"identity"):
            return body
        return await asyncio.to_thread(_decoded, body, coding, self.config.max_body)

    async def _name(self, client: Client, request: Request) -> str | None:
        query = request.target.partition(b"?")[2]
        if query:
            given = parse_qs(query.decode("ascii", "replace")).get("model")
            if given:
                return given[0]
        if not request.has_body:
            return None
        if not await client.wait_body(request, self.config.max_body):
            raise ClientFault(
                "body-too-large",
                f"over {self.config.max_body} bytes (max_body), the limit of a body in which the model is looked up",
                status=413,
            )
        kind = request.header(b"content-type")
        if kind.lower().startswith(b"multipart/form-data"):
            if request.header(b"content-encoding"):
                raise ClientFault("content-encoding", "a form must come without a content coding", status=415)
            return await form_field(kind, bytes(request.body), "model")
        body = await self._plain(request)
        try:
            document = msgspec.json.decode(body, type=_Named)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None
        return document.model


class _Named(msgspec.Struct):
    model: str | None = None


def _decoded(body: bytes, coding: bytes, limit: int) -> bytes:
    """Return a copy of the body without its content coding, to read; the body that is forwarded stays unchanged.

    Raises ClientFault (content-encoding, body-too-large).
    """
    if coding not in (b"gzip", b"x-gzip", b"deflate"):
        raise ClientFault(
            "content-encoding",
            "to find the model, the body must have the content coding gzip, deflate or none",
            status=415,
        )
    try:
        engine = zlib.decompressobj(wbits=47 if coding != b"deflate" else zlib.MAX_WBITS)
        plain = engine.decompress(body, min(limit, max(_PLAIN_LEAST, _PLAIN_RATIO * len(body))))
    except zlib.error as exc:
        raise ClientFault("content-encoding", f"the body is not {coding.decode()}: {exc}") from exc
    if engine.unconsumed_tail:
        raise ClientFault(
            "body-too-large",
            "the decompressed body exceeds the limit of a body in which the model is looked up",
            status=413,
        )
    return plain
