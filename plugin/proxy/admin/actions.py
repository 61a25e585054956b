"""Move a model by hand: `POST PREFIX/models/NAME/{wake,standby,sleep}`.

NAME is a pool's name, or the name of the model that it serves. A move drains the requests in flight (bounded), and new
ones wait. The answer comes when the move is done: `{"name": …, "phase": …}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from plugin.proxy.admin.access import check_access
from plugin.proxy.errors import ClientFault, StartFailed, Unavailable
from plugin.runtime.phases import Phase

if TYPE_CHECKING:
    from plugin.proxy.admin.source import StatusSource
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool

ACTIONS = ("wake", "standby", "sleep")
_JSON = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_REACHED = {
    "standby": frozenset({Phase.STANDBY, Phase.ASLEEP, Phase.IDLE, Phase.FAILED}),
    "sleep": frozenset({Phase.ASLEEP, Phase.IDLE, Phase.FAILED}),
}
"""Phases in which an action has nothing to do: the model holds no more than what was asked for."""


async def serve_action(server: StatusSource, client: Client, request: Request, target: str) -> int:
    """Answer one request for a move and return the status. Raises ProxyError."""
    check_access(server.sessions, request, client.peer, on_admin_port=client.on_admin_port)
    _refuse_foreign_page(request)
    name, _, action = unquote(target).rpartition("/")
    if action not in ACTIONS:
        raise ClientFault("not-found", f"there is no action {action[:100]!r}; one of {', '.join(ACTIONS)}", status=404)
    pool = pool_named(server.router.pools(), name)
    if server.draining:
        raise Unavailable("shutting-down", "the proxy is shutting down")
    phase = await (act(pool, action) if server.act is None else server.act(pool.name, action))
    client.respond(request, 200, _JSON, json.dumps({"name": pool.name, "phase": phase}).encode())
    return 200


def _refuse_foreign_page(request: Request) -> None:
    """Raise ClientFault if a browser sends this for a page of another site, which needs no permission to send a POST."""
    origin = request.header(b"origin").decode("ascii", "replace")
    if origin and urlsplit(origin).netloc.lower() != request.host.decode("ascii", "replace").lower():
        raise ClientFault("admin-foreign-page", "a page of another site must not move models", status=403)


def pool_named(pools: Sequence[ReplicaPool], name: str) -> ReplicaPool:
    """Return the pool with this name, or the only one that serves a model with it. Raises ClientFault (model-not-found)."""
    found = [pool for pool in pools if pool.name == name] or [pool for pool in pools if pool.facts().model == name]
    if len(found) != 1:
        raise ClientFault("model-not-found", f"there is no model {name[:100]!r}; see the status page", status=404)
    return found[0]


async def act(pool: ReplicaPool, action: str) -> str:
    """Wake a pool, or put it in standby or to sleep, and return its phase then. Raises ProxyError."""
    if action == "wake":
        await pool.wake()
    elif any(replica.tracker.phase not in _REACHED[action] for replica in pool.replicas.values()):
        if pool.waking or (pool.ready() is None and not pool.sleeper.in_standby and pool.sleeper.task is None):
            raise StartFailed("busy", f"{pool.name} is not serving yet", retry_after_s=pool.left_s())
        await pool.sleeper.evict(standby=action == "standby")
    return str(next(iter(sorted(replica.tracker.phase for replica in pool.replicas.values())), Phase.IDLE))
