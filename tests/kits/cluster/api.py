"""A double of the Kubernetes API for the few kinds that the proxy uses.

kmock (PyPI) was read and not taken: it has no resource versions, so neither 409 nor a watch that begins where a list
ended, and no `scale`. What this double keeps: one version for the whole store, which each change raises; 409 for a
write with an old version; a list with its version, in chunks; watches that begin at any version which is still known,
and 410 Gone for older ones; label selectors, also for what moves in or out of them; `scale`; roles.

Faults are asked for on `faults`.
"""

import asyncio
import contextlib
import copy
import itertools
import json
import random
import re
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

KEPT = 3000
"""How many changes are remembered for watches."""
GROUPS = {
    "pods": "",
    "endpointslices": "discovery.k8s.io",
    "leases": "coordination.k8s.io",
    "deployments": "apps",
    "statefulsets": "apps",
    "nodes": "",
    "capacitybuffers": "autoscaling.x-k8s.io",
}
KINDS = {
    "pods": "Pod",
    "endpointslices": "EndpointSlice",
    "leases": "Lease",
    "deployments": "Deployment",
    "statefulsets": "StatefulSet",
    "nodes": "Node",
    "capacitybuffers": "CapacityBuffer",
}


def selected(selector, labels):
    """Whether labels match a selector, in the form that it has in a URL."""
    for part in re.split(r",(?![^(]*\))", selector or ""):
        if sets := re.fullmatch(r"(\S+) (in|notin) \((.*)\)", part):
            inside = labels.get(sets[1]) in sets[3].split(",")
            if inside != (sets[2] == "in"):
                return False
        elif "!=" in part:
            key, value = part.split("!=")
            if labels.get(key) == value:
                return False
        elif "=" in part:
            key, value = part.split("=", 1)
            if labels.get(key) != value.lstrip("="):
                return False
        elif part.startswith("!"):
            if part[1:] in labels:
                return False
        elif part and part not in labels:
            return False
    return True


@dataclass
class Faults:
    """What goes wrong. Each is off at first."""

    throttled: int = 0
    """So many requests get 429."""
    conflicts: int = 0
    """Before so many writes of `scale` somebody else changes the workload."""
    throttled_after_scale: int = 0
    """After the next write of `scale` so many requests get 429."""
    failing: int = 0
    """So many requests get 500."""
    gone_as_status: bool = False
    """410 is the answer's status, in place of an event."""
    random_rate: float = 0.0
    """Share of requests with which something of the above happens."""
    rng: random.Random = field(default_factory=lambda: random.Random(7))


class Cut(Exception):
    """Ends a connection in the middle of an answer."""


class Api:
    """The API, on a port of loopback."""

    def __init__(self, namespace="models"):
        self.namespace = namespace
        self.objects = {}
        self.version = 100
        self.known_from = 100
        """The oldest version at which a watch may begin."""
        self.log = deque()
        self.faults = Faults()
        self.calls = Counter()
        """(verb, resource) → how often."""
        self.writes = []
        """(when, verb, resource, name, what) of each write that took effect."""
        self.allowed = None
        """Verbs by resource, as a role gives them; None allows everything."""
        self.port = 0
        self._watching = set()
        self._server = self._task = None
        self._changed = asyncio.Event()
        self._snapshots = {}

    # -- the store -------------------------------------------------------------------------------

    def put(self, plural, obj, what=None):
        """Create or replace an object; a change raises the version, an equal object does not."""
        key = (plural, obj["metadata"].setdefault("namespace", self.namespace), obj["metadata"]["name"])
        before = self.objects.get(key)
        same = dict(obj, metadata={k: v for k, v in obj["metadata"].items() if k != "resourceVersion"})
        if before is not None:
            old = dict(before, metadata={k: v for k, v in before["metadata"].items() if k != "resourceVersion"})
            if old == same:
                return before
        self.version += 1
        stored = copy.deepcopy(same)
        stored["metadata"]["resourceVersion"] = str(self.version)
        stored["metadata"].setdefault("uid", f"uid-{self.version}")
        stored.setdefault("kind", KINDS[plural])
        stored.setdefault("apiVersion", f"{GROUPS[plural]}/v1".lstrip("/"))
        self.objects[key] = stored
        self._event("ADDED" if before is None else "MODIFIED", plural, stored, before)
        return stored

    def change(self, plural, name, edit, namespace=None):
        """Edit an object in place; return it, or None if there is none."""
        found = self.objects.get((plural, namespace or self.namespace, name))
        if found is None:
            return None
        edited = copy.deepcopy(found)
        edit(edited)
        return self.put(plural, edited)

    def remove(self, plural, name, namespace=None):
        """Remove an object for good."""
        found = self.objects.pop((plural, namespace or self.namespace, name), None)
        if found is not None:
            self.version += 1
            found = copy.deepcopy(found)
            found["metadata"]["resourceVersion"] = str(self.version)
            self._event("DELETED", plural, found, found)

    def of(self, plural, namespace=None):
        """Return the objects of a kind."""
        return [
            obj for (kind, where, _), obj in self.objects.items()
            if kind == plural and where == (namespace or self.namespace)
        ]  # fmt: skip

    def get(self, plural, name):
        return self.objects.get((plural, self.namespace, name))

    def _event(self, what, plural, obj, before):
        self.log.append((self.version, what, plural, obj, before))
        if len(self.log) > KEPT:
            self.known_from = self.log.popleft()[0]
        self.notify()

    def notify(self):
        """Wake whoever waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def compact(self):
        """Forget the past: a watch may begin only now."""
        self.log.clear()
        self.known_from = self.version

    # -- HTTP ------------------------------------------------------------------------------------

    async def start(self):
        """Listen; the second time on the same port."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", self.port))
        self.port = sock.getsockname()[1]
        base = "/{root:path}/namespaces/{namespace}/{plural}"
        routes = [
            Route("/api/v1/{plural}", self._many, methods=["GET"]),
            Route(base, self._many, methods=["GET", "POST"]),
            Route(base + "/{name}", self._one, methods=["GET", "PUT", "PATCH", "DELETE"]),
            Route(base + "/{name}/scale", self._scale, methods=["GET", "PUT", "PATCH"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]))
        async with asyncio.timeout(10):
            while not self._server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)

    async def stop(self):
        """Be away: nothing listens, and every watch is cut."""
        self.drop_watches()
        self._server.should_exit = self._server.force_exit = True
        await self._task

    def drop_watches(self):
        """Cut every open watch."""
        for cut in self._watching:
            cut.set()

    def kubeconfig(self, folder):
        """Write a kubeconfig that leads here; return its path."""
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "contexts": [
                {"name": "double", "context": {"cluster": "double", "user": "proxy", "namespace": self.namespace}}
            ],
            "clusters": [{"name": "double", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "proxy", "user": {"token": "secret"}}],
        }
        path = folder / "kubeconfig"
        path.write_text(json.dumps(document))
        return path

    async def _begin(self, request, verb, resource):
        """Count a request, check the role, and let faults happen. Return an answer in its place, or None."""
        faults = self.faults
        self.calls[verb, resource] += 1
        if request.headers.get("authorization") != "Bearer secret":
            return failure(401, "Unauthorized", "no token")
        if self.allowed is not None and verb not in self.allowed.get(resource, ()):
            return failure(403, "Forbidden", f"cannot {verb} {resource}")
        unlucky = faults.random_rate and faults.rng.random() < faults.random_rate
        kind = faults.rng.choice(["latency", "429", "500", "cut"]) if unlucky else ""
        if kind == "latency":
            await asyncio.sleep(faults.rng.uniform(0, 0.2))
        if faults.throttled or kind == "429":
            faults.throttled = max(0, faults.throttled - 1)
            return failure(429, "TooManyRequests", "slow down", {"retry-after": "0.05"})
        if faults.failing or kind == "500":
            faults.failing = max(0, faults.failing - 1)
            return failure(500, "InternalError", "etcd has no leader")
        if kind == "cut":
            return StreamingResponse(_cut())
        return None

    async def _many(self, request):
        plural, namespace = request.path_params["plural"], request.path_params.get("namespace", self.namespace)
        if request.method == "POST":
            if (early := await self._begin(request, "create", plural)) is not None:
                return early
            obj = await request.json()
            if (plural, namespace, obj["metadata"]["name"]) in self.objects:
                return failure(409, "AlreadyExists", "it exists")
            obj["metadata"]["namespace"] = namespace
            made = self.put(plural, obj)
            self.writes.append((time.monotonic(), "create", plural, obj["metadata"]["name"], obj))
            return JSONResponse(made, 201)
        query = request.query_params
        selector = query.get("labelSelector", "")
        if query.get("watch", "").lower() in ("1", "true"):
            if (early := await self._begin(request, "watch", plural)) is not None:
                return early
            since = int(query.get("resourceVersion") or 0)
            if since and since < self.known_from and self.faults.gone_as_status:
                return failure(410, "Expired", "too old resource version")
            return StreamingResponse(self._stream(plural, namespace, selector, since), media_type="application/json")
        if (early := await self._begin(request, "list", plural)) is not None:
            return early
        return self._list(plural, namespace, selector, query)

    def _list(self, plural, namespace, selector, query):
        token, limit = query.get("continue"), int(query.get("limit") or 0)
        if token:
            name, _, at = token.partition(":")
            if name not in self._snapshots:
                return failure(410, "Expired", "the list is too old")
            version, items = self._snapshots[name]
            start = int(at)
        else:
            items = [obj for obj in self.of(plural, namespace) if selected(selector, obj["metadata"].get("labels", {}))]
            version, start, name = self.version, 0, f"s{self.version}-{len(self._snapshots)}"
            self._snapshots[name] = (version, items)
        part = items[start : start + limit] if limit else items[start:]
        meta = {"resourceVersion": str(version)}
        if start + len(part) < len(items):
            meta["continue"] = f"{name}:{start + len(part)}"
        group = f"{GROUPS[plural]}/v1".lstrip("/")
        return JSONResponse({"kind": f"{KINDS[plural]}List", "apiVersion": group, "metadata": meta, "items": part})

    async def _stream(self, plural, namespace, selector, since):
        cut = asyncio.Event()
        self._watching.add(cut)
        try:
            if since and since < self.known_from:
                status = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}
                yield json.dumps({"type": "ERROR", "object": status}) + "\n"
                return
            if not since:
                since = self.version
                for obj in self.of(plural, namespace):
                    if selected(selector, obj["metadata"].get("labels", {})):
                        yield json.dumps({"type": "ADDED", "object": obj}) + "\n"
            while True:
                changed, at = self._changed, self.version  # what changes while this is sent comes in the next round
                new = list(itertools.takewhile(lambda event, since=since: event[0] > since, reversed(self.log)))
                for _, what, kind, obj, before in reversed(new):
                    if kind != plural or obj["metadata"]["namespace"] != namespace:
                        continue
                    inside = selected(selector, obj["metadata"].get("labels", {}))
                    was = before is not None and selected(selector, before["metadata"].get("labels", {}))
                    kind_of = {(True, True): what, (True, False): "ADDED", (False, True): "DELETED"}.get((inside, was))
                    if kind_of is not None:
                        yield json.dumps({"type": kind_of, "object": obj}) + "\n"
                since = at
                waits = [asyncio.ensure_future(changed.wait()), asyncio.ensure_future(cut.wait())]
                try:
                    await asyncio.wait(waits, timeout=60.0, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                if cut.is_set():
                    raise Cut
        finally:
            self._watching.discard(cut)

    async def _one(self, request):
        plural, namespace, name = (request.path_params[key] for key in ("plural", "namespace", "name"))
        verb = {"GET": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]
        if (early := await self._begin(request, verb, plural)) is not None:
            return early
        found = self.objects.get((plural, namespace, name))
        if found is None:
            return failure(404, "NotFound", f"{plural} {name!r} not found")
        if verb == "get":
            return JSONResponse(found)
        if verb == "delete":
            self.remove(plural, name, namespace)
            self.writes.append((time.monotonic(), "delete", plural, name, None))
            return JSONResponse({"kind": "Status", "status": "Success"})
        body = await request.json()
        version = body.get("metadata", {}).get("resourceVersion")
        if version is not None and version != found["metadata"]["resourceVersion"]:
            return failure(409, "Conflict", "the object has been modified")
        made = self.put(plural, merged(found, body) if verb == "patch" else body)
        self.writes.append((time.monotonic(), verb, plural, name, body))
        return JSONResponse(made)

    async def _scale(self, request):
        plural, namespace, name = (request.path_params[key] for key in ("plural", "namespace", "name"))
        verb = {"GET": "get", "PUT": "update", "PATCH": "patch"}[request.method]
        if (early := await self._begin(request, verb, f"{plural}/scale")) is not None:
            return early
        if (plural, namespace, name) not in self.objects:
            return failure(404, "NotFound", f"{plural} {name!r} not found")
        if verb != "get":
            body = await request.json()
            if self.faults.conflicts:
                self.faults.conflicts -= 1
                note = str(self.version)
                self.change(plural, name, lambda obj: obj["metadata"].setdefault("annotations", {}).update(other=note))
            found = self.objects[plural, namespace, name]
            version = body.get("metadata", {}).get("resourceVersion")
            if version is not None and version != found["metadata"]["resourceVersion"]:
                return failure(409, "Conflict", "the object has been modified")
            before, wanted = found["spec"]["replicas"], body["spec"].get("replicas", 0)
            self.put(plural, dict(copy.deepcopy(found), spec=dict(found["spec"], replicas=wanted)))
            self.writes.append((time.monotonic(), verb, f"{plural}/scale", name, (before, wanted)))
            self.faults.throttled, self.faults.throttled_after_scale = (
                self.faults.throttled_after_scale or self.faults.throttled,
                0,
            )
        found = self.objects[plural, namespace, name]
        labels = found["spec"]["selector"]["matchLabels"]
        meta = {key: found["metadata"][key] for key in ("name", "namespace", "uid", "resourceVersion")}
        status = {
            "replicas": found.get("status", {}).get("replicas", 0),
            "selector": ",".join(f"{key}={value}" for key, value in labels.items()),
        }
        spec = {"replicas": found["spec"]["replicas"]} if found["spec"]["replicas"] else {}
        return JSONResponse(
            {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": meta, "spec": spec, "status": status}
        )

    def scalings(self, name=None):
        """Return (before, after) of each change of `scale`, in order."""
        return [
            what for _, _, resource, of, what in self.writes
            if resource.endswith("/scale") and name in (None, of) and what[0] != what[1]
        ]  # fmt: skip


async def _cut():
    yield b"{"
    raise Cut


def failure(status, reason, message, headers=None):
    document = {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": status,
        "reason": reason, "message": message,
    }  # fmt: skip
    return JSONResponse(document, status, headers=headers)


def merged(found, change):
    """Return an object with a JSON merge patch applied."""
    if not isinstance(change, dict):
        return change
    result = dict(found) if isinstance(found, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result
