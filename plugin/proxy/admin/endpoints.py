"""The admin endpoints. `live`, `ready` and `status` are answered here, so that a probe during a restore costs no import.

A Starlette app, imported in a thread on first use, answers the rest (`bridge`).
`POST models/NAME/{wake,standby,sleep}` moves a model by hand (`actions`).

`live`: this process answers. `ready`: a request sent now is accepted, and will be held or answered. `ready?strict=1`: a
replica answers it at once. `live` and `ready` are open to every client; the rest is restricted (`access`). `sign-in`
and `sign-out` begin and end a browser's session. A browser that may not read the page gets it without data: it shows
the sign-in form, or why the client is refused.
"""

from __future__ import annotations

import json
import math
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from plugin.proxy.admin import costs
from plugin.proxy.admin.access import Sessions, check_access
from plugin.proxy.errors import ClientFault
from plugin.proxy.pool.start_times import Kind
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.admin.source import StatusSource
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool

_ALLOW = ((b"allow", b"GET, HEAD"),)
_MAX_FORM = 4096
_JSON = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]


def pool_document(pool: ReplicaPool) -> dict[str, Any]:
    """Return the state of one pool as plain data."""
    progress = pool.progress()
    left_s = round(progress.left_s, 3) if progress.started_here else None
    failure, facts, refused_s = pool.waker.last_failure, pool.facts(), pool.waker.refused_for_s
    return {
        "name": pool.name,
        "model": facts.model,
        "engine": facts.engine,
        "snapshot": {"name": facts.snapshot, "bytes": facts.snapshot_bytes or None} if facts.snapshot else None,
        "gpus": list(facts.gpus),
        "gpu_memory_bytes": facts.gpu_memory or None,
        "wake_s": 0.0 if serves(pool) else left_s,
        "ready": serves(pool),
        "held": pool.held,
        "outstanding": pool.outstanding,
        "wakes": pool.waker.wakes,
        "sleeps": pool.sleeper.sleeps,
        "standbys": pool.sleeper.standbys,
        "failed_starts": pool.waker.failed_starts,
        "sleep_after_s": pool.sleep_after_s,
        "idle_timeout_s": pool.sleep_after_s,  # its former name, for one version
        "standby_after_s": pool.standby_after_s,
        "idle_s": round(time.monotonic() - pool.last_active, 3),
        "woken_by_requests": pool.waker.hook is not None and pool.started_here,
        "refused_for_s": None if refused_s == math.inf else round(refused_s, 1),
        "usual": {
            kind: {"median_s": round(median, 4), "starts": len(pool.history.seen(kind))}
            for kind in Kind
            if (median := pool.history.median(kind)) is not None
        },
        "progress": {
            "phase": progress.phase,
            "step": progress.step,
            "kind": progress.kind,
            "elapsed_s": round(progress.elapsed_s, 3),
            "expected_s": round(progress.expected_s, 3) if progress.started_here else None,
            "left_s": 0.0 if progress.phase is Phase.SERVING else left_s,
        },
        "last_failure": None
        if failure is None
        else {"code": failure.code, "message": failure.detail or failure.message},
        "starts": {
            str(kind): [{"phase": s.phase, "at_s": round(s.at_s, 4), "took_s": round(s.took_s, 4)} for s in spans]
            for kind, spans in pool.history.last.items()
        },
        "replicas": [
            {
                "name": replica.name,
                "phase": replica.tracker.phase,
                "reason": replica.tracker.reason,
                "step": replica.step,
                "seconds_in_phase": round(replica.tracker.seconds_in_phase, 3),
                "upstream": replica.upstream.name if replica.upstream else None,
                "address": replica.address(),
                "pid": replica.engine_pid(),
                "memory_bytes": replica.memory_bytes,
                "gpu_bytes": replica.gpu_bytes,
                "outstanding": replica.outstanding,
                "served": replica.served,
                "held_back": replica.draining,
                "pages": {name: round(value, 6) for name, value in replica.pages().items()},
                "timeline": [
                    {"phase": s.phase, "at_s": round(s.at_s, 4), "took_s": round(s.took_s, 4)} for s in replica.spans
                ],
                "work": [
                    {"name": w.name, "at_s": round(w.at_s, 4), "took_s": round(w.took_s, 4)}
                    for w in replica.tracker.work
                ],
            }
            for replica in pool.replicas.values()
        ],
    }


async def status_document(server: StatusSource) -> dict[str, Any]:
    """Return the state of this worker as plain data, for `/-/status`, the page and the metrics."""
    await costs.measure(server.router.pools())
    return {
        "host": socket.gethostname(),
        "listens_at": server.listens_at,
        "uptime_s": round(time.time() - server.started_at, 1),
        "draining": server.draining,
        "clients": len(server.clients),
        "held_bytes": server.buffered,
        **server.stats.document(),
        "pools": [pool_document(pool) for pool in server.router.pools()],
    }


def serves(pool: ReplicaPool) -> bool:
    """Return True if a replica of the pool answers requests at once."""
    return any(r.tracker.phase is Phase.SERVING and not r.draining for r in pool.replicas.values())


def is_ready(server: StatusSource, *, strict: bool = False) -> bool:
    """Return True if a request sent now is accepted, and will be held or answered; with `strict`, answered at once.

    An engine that sleeps or has not started is ready, because a request wakes it.
    """
    if server.draining:
        return False
    if strict:
        return any(serves(pool) for pool in server.router.pools())
    full = server.buffered > server.settings.max_held_bytes
    return any(serves(pool) or (pool.accepts() and not full) for pool in server.router.pools())


async def serve_admin(server: StatusSource, client: Client, request: Request) -> int:
    """Answer one admin request and return the status."""
    settings = server.settings
    name = request.path.removeprefix(settings.admin_prefix).strip("/")
    if settings.admin_token is not None and server.sessions is None:
        server.sessions = Sessions(settings)
    if server.sessions is not None and request.method == b"POST" and name in ("sign-in", "sign-out"):
        return await _serve_session(server.sessions, client, request, name)
    if request.method == b"POST" and name.startswith("models/"):
        from plugin.proxy.admin.actions import serve_action

        return await serve_action(server, client, request, name.removeprefix("models/"))
    if request.method not in (b"GET", b"HEAD"):
        raise ClientFault("method-not-allowed", "the admin endpoints are read with GET", status=405, headers=_ALLOW)
    if name == "live":
        client.respond(request, 200, _JSON, b'{"live":true}')
        return 200
    if name == "ready":
        query = parse_qs(request.target.partition(b"?")[2].decode("ascii", "replace"), keep_blank_values=True)
        strict = query.get("strict", ["0"])[-1].lower() not in ("0", "false", "no")
        ready = is_ready(server, strict=strict)
        client.respond(request, 200 if ready else 503, _JSON, json.dumps(_readiness(server, ready)).encode())
        return 200 if ready else 503
    from plugin.proxy.admin.bridge import serve_page

    try:
        check_access(server.sessions, request, client.peer, on_admin_port=client.on_admin_port)
    except ClientFault as fault:
        if name == "" and b"text/html" in request.header(b"accept"):
            return await serve_page(server, client, request, name, status=fault.status)
        raise
    if name == "status":
        client.respond(request, 200, _JSON, json.dumps(await server.document()).encode())
        return 200
    return await serve_page(server, client, request, name)


def _readiness(server: StatusSource, ready: bool) -> dict[str, Any]:
    """Return the document of `ready`. Where one model is starting it says how far: the proxy in front of a pod shows that."""
    pools = list(server.router.pools())
    if ready or len(pools) != 1:
        return {"ready": ready}
    progress = pools[0].progress()
    return {"ready": False, "phase": progress.phase, "progress": progress.sentence().removeprefix("waking, ")}


async def _serve_session(sessions: Sessions, client: Client, request: Request, name: str) -> int:
    """Begin a session for the token in the form, or end the request's session. Raises ClientFault: 401, 413 or 429."""
    if not await client.wait_body(request, _MAX_FORM):
        raise ClientFault("body-too-large", f"a sign-in has at most {_MAX_FORM} bytes", status=413)
    if name == "sign-in":
        form = parse_qs(bytes(request.body).decode("utf-8", "replace"))
        sessions.check_token(form.get("token", [""])[0].encode(), client.peer)
        cookie = sessions.begin(request)
    else:
        cookie = sessions.sign_out(request)
    client.respond(
        request, 200, [*_JSON, (b"set-cookie", cookie)], json.dumps({"signed_in": name == "sign-in"}).encode()
    )
    return 200
