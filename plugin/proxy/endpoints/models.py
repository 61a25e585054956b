"""Several models behind one port: choose a request's endpoint, limit how many are awake (`admission`).

The configuration is a YAML file (`Config`); unknown keys are refused. A request's model comes from the JSON body's
`model`, a multipart form's field, `?model=` in the query (WebSockets), or the file's `default`. To find it, bodies are
buffered (up to `max_body`).

Guarantees: at most `max_awake` models are awake or waking, and together they take at most `gpu_memory`. A model goes to
standby or to sleep only when it answers no request, and new requests for it wait for its next wake. While it has requests,
it stays awake for at least `min_awake_s`, so that two models in demand alternate instead of thrashing. A model that still
answers after `evict_grace`, or fails to sleep, continues to serve, and the requests that need its place get an error.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import parse_qs, unquote

import msgspec

from plugin.bench.client import free_port
from plugin.options import invalid, limit, seconds
from plugin.proxy.endpoints import llama_swap
from plugin.proxy.endpoints.admission import Admission, Member
from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
from plugin.proxy.endpoints.forms import form_field
from plugin.proxy.endpoints.sizes import Bytes
from plugin.proxy.errors import ClientFault, Unavailable
from plugin.proxy.http.address import from_url
from plugin.proxy.http.client import Client
from plugin.proxy.http.path_rules import HEALTH
from plugin.proxy.http.request import Request
from plugin.proxy.kubernetes import address as k8s
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.pressure import relieve
from plugin.runtime.phases import Phase
from plugin.startup.own_module import own_module

if TYPE_CHECKING:
    from plugin.proxy.kubernetes.asking import WorkloadSpec
    from plugin.proxy.kubernetes.session import Session
    from plugin.proxy.kubernetes.workload import Workload


class Seconds(float):
    """A duration in the file: seconds, or with a unit as on the command line (`90`, `90s`, `10m`, `1h`)."""

    read = staticmethod(seconds)


class Limit(Seconds):
    """A duration, or `0` or `none` for no limit."""

    read = staticmethod(limit)


def _times(kind: type, value: object) -> Any:
    """Decode a type that msgspec does not know. Raises ValueError."""
    if not issubclass(kind, Seconds | Bytes) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise invalid(value)
    return kind(kind.read(str(value)))


_PLAIN_LEAST, _PLAIN_RATIO = 1 << 20, 32
"""Decompressed size that is always accepted, and the maximum compression ratio of a larger body. A body that grows a
thousandfold would block the event loop for a third of a second with 60 KB from the client."""
_LIST_PATHS = ("/v1/models", "/models")


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One model: exactly one of `snapshot` (restored by name), `command` (a server; `${PORT}` is its port), `upstream`.

    The upstream runs already, or is a workload of a cluster (k8s://…), which is scaled from zero.
    """

    snapshot: str | None = None
    command: str | None = None
    upstream: str | None = None
    wake: str | None = None
    sleep: str | None = None
    wake_url: str | None = None
    sleep_url: str | None = None
    aliases: tuple[str, ...] = ()
    served_name: str | None = None
    """The engine's own name of the model, which replaces the request's `model` in JSON bodies. None forwards the name unchanged."""
    ready_path: str = "/health"
    ready_model: str | None = None
    api_key: str | None = None
    """The key that the engine wants, for the readiness check; a snapshot's restore gets it for its canary."""
    sleep_after: Seconds | None = None
    standby_after: Seconds | None = None
    """Of a snapshot: time without a request after which its engine is frozen with its memory; it also makes room that way."""
    wake_timeout: Seconds = Seconds(600.0)
    upstream_timeout: Limit | None = None
    """Maximum time that the engine may send nothing while it answers; None uses the option --upstream-timeout."""
    priority: int = 0
    """Models with a lower priority are put to sleep first."""
    schedule_timeout: Seconds = Seconds(30.0)
    """Of a workload: how long its pod may be without a node or an image before held requests get the reason."""
    gpu_memory: Bytes | None = None
    """GPU memory that it takes while it is awake; None: of a snapshot, what it held at its dump, of others unknown."""
    rehearse: bool | None = None
    """--rehearse of the launch or restore that it starts. None: as QUICKTHAW_REHEARSE says, else not, since it would run
    beside the requests of the other models, of which that process knows nothing."""
    push: bool | None = None
    """--push of the launch or restore that it starts, to its --snapshot-store; None leaves that to QUICKTHAW_PUSH."""


SETTINGS = frozenset(
    {
        "listen",
        "root_path",
        "workers",
        "sleep_after",
        "standby_after",
        "grace",
        "hold_timeout",
        "early_stream",
        "upstream_timeout",
        "body_timeout",
        "max_held",
        "max_held_mb",
        "deny",
        "allow",
        "wake_on",
        "trust_forwarded",
        "admin_token",
        "admin_prefix",
        "admin_listen",
        "access_log",
        "log_level",
        "log_format",
        "quiet",
    }
)
"""Keys of the file that are options of `quickthaw proxy`, by their names (plugin/options.py)."""
_LISTS = ("deny", "allow", "wake_on")
"""Those that may be repeated; the file may give one without a list."""
_OLD_KEYS = {"drain": "evict_grace", "idle_timeout": "sleep_after"}
_OLD_MODEL_KEYS = {"idle_timeout": "sleep_after"}


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file, without the options of the command (`SETTINGS`)."""

    models: dict[str, ModelConfig]
    max_awake: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Maximum number of models awake at once; 0 is no limit."""
    gpu_memory: Bytes = Bytes(0)
    """GPU memory that the models awake may take together; 0 is no limit."""
    evict: Literal["lru", "priority"] = "lru"
    """Order of sleeping: `lru` is the longest idle first; `priority` is the lowest priority first, then the longest idle."""
    min_awake: Seconds = Seconds(5.0)
    evict_grace: Seconds = Seconds(60.0)
    """Time for a model to finish its requests before it sleeps for another; after that it continues to serve."""
    default: str | None = None
    max_body: Annotated[int, msgspec.Meta(ge=1024)] = 64 << 20


def _document(path: Path) -> dict[str, Any]:
    """Return the file's keys and values as they are written. Raises ValueError if it is not a YAML mapping, OSError."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as exc:
        raise ValueError(f"{path}: not YAML: {' '.join(str(exc).split())}") from exc
    if not isinstance(document, dict):
        raise ValueError(f"{path}: expected keys and values, such as `models:`; see examples/proxy_models.yaml")
    return document


def _read(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the file's keys and values, by their current names; a file of llama-swap as ours. Raises ValueError, OSError."""
    document = _document(path)
    if llama_swap.recognises(document):
        try:
            return llama_swap.convert(document, lambda text: warn(f"{path}: {text}"))
        except ValueError as exc:
            raise ValueError(f"{path}: {exc}") from exc
    _rename(document, _OLD_KEYS, f"{path}: ", warn)
    models = document.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        if isinstance(model, dict):
            _rename(model, _OLD_MODEL_KEYS, f"{path}: model {name!r}: ", warn)
    return document


def _rename(keys: dict[str, Any], old_names: dict[str, str], where: str, warn: Callable[[str], None]) -> None:
    """Give old keys their current names, with a warning. A current key that is there too takes precedence."""
    for old, new in old_names.items():
        if old in keys:
            warn(f"{where}{old} is now {new}; the next version drops the old name")
            keys.setdefault(new, keys.pop(old))


def settings_in(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return the options of `quickthaw proxy` that the file sets. `warn` is called for each old key. Raises ValueError, OSError."""
    found = {key: value for key, value in _read(path, warn).items() if key in SETTINGS}
    return {key: [value] if key in _LISTS and isinstance(value, str) else value for key, value in found.items()}


def check_import(path: Path, warn: Callable[[str], None]) -> None:
    """Call `warn` for what has no counterpart here. Raises ValueError unless the file is a configuration of llama-swap, OSError."""
    if not llama_swap.recognises(_document(path)):
        raise ValueError(f"{path} is no configuration of llama-swap; give it as --config")
    _read(path, warn)


def load(path: Path) -> Config:
    """Read and validate the file, without the options in it.

    Raises:
        ValueError: it is not YAML, or not this configuration; the message names the place.
        OSError: it cannot be read.
    """
    document = {key: value for key, value in _read(path, lambda _: None).items() if key not in SETTINGS}
    try:
        config = msgspec.convert(document, Config, dec_hook=_times)
    except msgspec.ValidationError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    if not config.models:
        raise ValueError(f"{path}: `models` names no model")
    names: dict[str, str] = {}
    for name, model in config.models.items():
        if sum(x is not None for x in (model.snapshot, model.command, model.upstream)) != 1:
            raise ValueError(f"{path}: model {name!r} needs exactly one of snapshot, command and upstream")
        if model.standby_after and model.snapshot is None:
            raise ValueError(f"{path}: model {name!r} is no snapshot, and only those have standby_after")
        if k8s.is_workload(model.upstream):
            k8s.parse(model.upstream or "")
            given = [key for key in ("wake", "sleep", "wake_url", "sleep_url") if getattr(model, key) is not None]
            if given:
                raise ValueError(f"{path}: model {name!r} is a workload, which is scaled: it has no {', '.join(given)}")
        elif model.upstream is not None:
            from_url(model.upstream)
        for alias in (name, *model.aliases):
            if alias in names:
                raise ValueError(f"{path}: {alias!r} names both {names[alias]!r} and {name!r}")
            names[alias] = name
        able = model.upstream is None or model.sleep or model.sleep_url or k8s.is_workload(model.upstream)
        for limit_name in ("max_awake", "gpu_memory"):
            if getattr(config, limit_name) and not able:
                raise ValueError(f"{path}: with {limit_name}, model {name!r} needs `sleep` or `sleep_url`")
        if config.gpu_memory and model.gpu_memory is None and model.snapshot is None:
            raise ValueError(f"{path}: model {name!r} needs its own gpu_memory, as the file limits it; 0 for none")
        if config.gpu_memory and (model.gpu_memory or 0) > config.gpu_memory:
            raise ValueError(f"{path}: gpu_memory of model {name!r} is more than that of all models")
    if config.default is not None and config.default not in names:
        raise ValueError(f"{path}: the default {config.default!r} is not one of the models")
    return config


def spec_of(model: ModelConfig, sleep_after: float, standby_after: float = 0.0) -> EndpointSpec:
    """Return the endpoint for a model's configuration, choosing the port of a command. The times are the command's, in seconds."""
    standby = model.standby_after if model.standby_after is not None else standby_after
    idle = model.sleep_after if model.sleep_after is not None else sleep_after
    wake, upstream, environment = model.wake, model.upstream, dict[str, str]()
    if model.rehearse is not None or "QUICKTHAW_REHEARSE" not in os.environ:
        environment["QUICKTHAW_REHEARSE"] = str(int(model.rehearse or False))
    if model.push is not None:
        environment["QUICKTHAW_PUSH"] = str(int(model.push))
    if upstream is None:
        port = free_port()
        upstream = f"http://127.0.0.1:{port}"
        environment["PORT"] = str(port)
        if model.command is not None:
            wake = model.command.replace("${PORT}", str(port))
        else:
            # No limit on silence: this proxy's own applies.
            options = ["--host", "127.0.0.1", "--port", str(port), "--upstream-timeout", "none"]
            # Only this proxy reads its admin endpoints, whatever token is in this process's environment.
            environment["QUICKTHAW_ADMIN_TOKEN"] = secrets.token_hex(16)
            if model.api_key is not None:
                environment["QUICKTHAW_API_KEY"] = model.api_key
            wake = "exec " + shlex.join([*own_module("plugin.restore"), *options, model.snapshot or ""])
    from plugin.records.about import facts_of_named  # only this mode needs what it imports

    facts = facts_of_named(model.snapshot)
    ready_path = (
        "/-/ready?strict=1" if model.snapshot is not None and model.ready_path == "/health" else model.ready_path
    )
    return EndpointSpec(
        upstream=from_url(upstream),
        wake=wake,
        sleep=model.sleep,
        wake_url=model.wake_url,
        sleep_url=model.sleep_url,
        ready_path=ready_path,
        ready_model=model.ready_model,
        api_key=model.api_key,
        wake_limit_s=model.wake_timeout,
        sleep_after_s=idle or None,
        standby_after_s=(standby or None) if model.snapshot is not None else None,
        environment=tuple(environment.items()),
        # The port differs on each run; the model is the same.
        key=f"{model.command}\n{model.snapshot}" if model.upstream is None else "",
        restores=model.snapshot is not None,
        admin_token=environment.get("QUICKTHAW_ADMIN_TOKEN"),
        exclusive_port=model.upstream is None,
        facts=facts if model.gpu_memory is None else replace(facts, gpu_memory=model.gpu_memory),
    )


def workload_of(model: ModelConfig, sleep_after: float, scales: bool) -> WorkloadSpec:
    """Return the workload for a model's configuration; `sleep_after` (seconds) is the command's."""
    from plugin.proxy.kubernetes.asking import WorkloadSpec

    return WorkloadSpec(
        address=k8s.parse(model.upstream or ""),
        ready_path=model.ready_path,
        ready_model=model.ready_model,
        api_key=model.api_key,
        wake_limit_s=model.wake_timeout,
        sleep_after_s=(model.sleep_after if model.sleep_after is not None else sleep_after) or None,
        schedule_grace_s=model.schedule_timeout,
        scales=scales,
        facts=Facts(gpu_memory=model.gpu_memory or 0),
    )


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
