"""Bring one request to a replica and its answer back: hold it, get a connection, write it, relay the answer.

`forward` does all of it. Which requests may be written more than once is decided in `plugin.proxy.retry_rules`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Protocol

from plugin.proxy import probes, retry_rules
from plugin.proxy.descriptor_limit import SHORTAGE
from plugin.proxy.errors import ProxyError, Unavailable, UpstreamFault
from plugin.proxy.http import wire
from plugin.proxy.http.upstream_connection import UpstreamConnection, connect
from plugin.proxy.pool import adapters

if TYPE_CHECKING:
    from plugin.proxy.admin.stats import Stats
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.path_rules import PathRules
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.replica import Replica
    from plugin.proxy.settings import Settings


class Host(Protocol):
    """The part of the server (`server.Proxy`) that forwarding needs."""

    settings: Settings
    rules: PathRules
    stats: Stats
    buffered: int

    def no_room(self) -> ProxyError:
        """Return the error for request bodies that exceed the limit on held bytes."""


async def forward(host: Host, client: Client, request: Request, exchange: Exchange, pool: ReplicaPool) -> None:
    """Hold the request until a replica serves, send it, and return once its answer was relayed.

    A request that does not count as use (`Exchange.probe`) is answered here while no replica serves. Raises ProxyError, or
    CancelledError when the client has disconnected.
    """
    probe = exchange.probe
    while True:
        replica = pool.try_acquire()
        if replica is None:
            if probe is not None and not probes.should_wait(pool):
                exchange.status, headers, body, exchange.outcome = probe.answer(host, pool)
                client.respond(request, exchange.status, headers, body, close=not request.complete)
                return
            replica = await hold(host, client, request, exchange, pool)
        if probe is not None:
            pool.probes += 1
        try:
            if replica.check is not None:
                if await send_speculatively(host, client, request, exchange, replica, replica.check):
                    return
                continue
            if retry_rules.needs_whole_body(request, replica, host.settings.body_buffer):
                # Costs little: most clients send the body right after the head.
                await client.wait_body(request, host.settings.body_buffer)
            connection = await open_connection(host, pool, replica)
            if connection is not None and not client.is_closing():
                exchange.replica_name = replica.name
                forwarding: Awaitable[bool] = send(host, client, request, exchange, replica, connection)
                if adapters.changes_adapters(request):
                    forwarding = adapters.forward_and_note(forwarding, pool, replica, request, exchange)
                if await forwarding:
                    return
                continue
            if connection is not None:
                connection.abort()
                raise asyncio.CancelledError
        finally:
            if probe is not None:
                pool.probes -= 1
            pool.release(replica, used=probe is None)


async def hold(host: Host, client: Client, request: Request, exchange: Exchange, pool: ReplicaPool) -> Replica:
    """Return a replica once one serves, or one under check for a speculative request."""
    began = time.monotonic()
    if host.buffered > host.settings.max_held_bytes:
        raise host.no_room()
    host.stats.held_total += exchange.held_s == 0.0
    if host.settings.early_stream and exchange.early is None:
        from plugin.proxy.http.early_stream import begin_early

        await begin_early(client, request, exchange, pool, host.settings)
    try:
        speculative = retry_rules.may_be_speculative(request, exchange)
        replica = await pool.acquire(
            host.settings.hold_timeout_s, at_most_s=request.hold_s, since=request.arrived, speculative=speculative
        )
    finally:
        exchange.held_s += time.monotonic() - began
    if client.is_disconnected():
        pool.release(replica)
        raise asyncio.CancelledError
    return replica


async def open_connection(host: Host, pool: ReplicaPool, replica: Replica) -> UpstreamConnection | None:
    """Return an open connection, reused or new; None if the replica could not be reached, in which case nothing was sent."""
    idle = replica.idle
    generation = replica.generation
    now = time.monotonic()
    while idle:
        connection = idle.pop()
        if now - connection.idle_since <= host.settings.upstream_keepalive_s and connection.alive():
            return connection
        connection.abort()
    if replica.connecting is None:
        replica.connecting = asyncio.Semaphore(host.settings.max_connecting)
    async with replica.connecting:
        try:
            connection = await connect(replica, host.settings.connect_timeout_s)
            if connection.alive():
                replica.clear_refusals()
                return connection
            why = "it closed the connection before anything was sent"
            connection.abort()
        except OSError as exc:
            if exc.errno in SHORTAGE:
                raise Unavailable(
                    "no-connection", f"this host has no descriptor or port left for a connection: {exc}"
                ) from exc
            why = f"{type(exc).__name__}: {exc}"
    host.stats.upstream_errors["upstream-refused"] += 1
    pool.refused(replica, generation, why)
    return None


async def send(
    host: Host, client: Client, request: Request, exchange: Exchange, replica: Replica, connection: UpstreamConnection
) -> bool:
    """Write the request once and relay its answer. Return True when it was answered.

    False means that the owner killed the replica without an answer: its pages will not come (the page server failed),
    or it was silent. Nothing reached the client, and the request waits until the replica is back.
    """
    exchange.cautious = retry_rules.is_cautious(request, exchange, replica)
    body = bytes(request.body) if retry_rules.keeps_body(request, exchange, replica) else None
    _write(host, client, request, exchange, replica, connection)
    return await _answered(host, client, request, exchange, replica, body)


async def _answered(
    host: Host, client: Client, request: Request, exchange: Exchange, replica: Replica, body: bytes | None
) -> bool:
    """Return True when answered; False if `body` must be sent again."""
    try:
        await exchange.done
    except UpstreamFault:
        if body is None or not retry_rules.may_resend(exchange, replica, client):
            raise
        exchange.forget()
        host.buffered += request.put_back(body)
        return False
    except asyncio.CancelledError:
        replica.served += exchange.answered  # stream readers leave at the last token, before the end
        raise
    replica.served += 1
    return True


async def send_speculatively(
    host: Host,
    client: Client,
    request: Request,
    exchange: Exchange,
    replica: Replica,
    check: asyncio.Future[bool],
) -> bool:
    """Let a replica under check answer already, and withhold the answer until the check passes.

    Return False if the check did not pass: nothing reached the client, and the request waits for this or another replica.
    """
    began = time.monotonic()
    body = bytes(request.body)
    try:
        connection = await connect(replica, host.settings.connect_timeout_s)
    except OSError:
        await _checked(host, request, check)
        return False
    if client.is_disconnected():
        connection.abort()
        raise asyncio.CancelledError
    exchange.withheld, exchange.replica_name = True, replica.name
    _write(host, client, request, exchange, replica, connection)
    passed = False
    try:
        passed = await _checked(host, request, check)
    finally:
        exchange.held_s += time.monotonic() - began
        if not passed:
            exchange.forget()
    if not passed:
        host.buffered += request.put_back(body)
        return False
    cautious = retry_rules.is_cautious(request, exchange, replica)
    exchange.release(cautious)
    return await _answered(
        host, client, request, exchange, replica, body if cautious or replica.killed_when_silent else None
    )


async def _checked(host: Host, request: Request, check: asyncio.Future[bool]) -> bool:
    """Return True if the check passed. Raises Unavailable (hold-deadline) at the request's deadline, as in the pool."""
    least = min(request.hold_s, math.inf if host.settings.hold_timeout_s is None else host.settings.hold_timeout_s)
    left = max(0.0, request.arrived + least - time.monotonic())
    try:
        async with asyncio.timeout(None if left == math.inf else left):
            return await asyncio.shield(check)
    except TimeoutError:
        message = f"no replica was ready within {least:.1f} s (it was being checked)"
        raise Unavailable("hold-deadline", message, retry_after_s=1.0) from None


def _write(
    host: Host, client: Client, request: Request, exchange: Exchange, replica: Replica, connection: UpstreamConnection
) -> None:
    upstream = replica.upstream
    assert upstream is not None
    exchange.connection = connection
    drop = request.drop if exchange.early is None else request.drop | {b"accept-encoding"}
    head = wire.request_head(
        request.method,
        request.target,
        request.headers,
        drop=drop,
        host=upstream.authority or request.host or b"localhost",
        client_host=request.host,
        peer=client.peer,
        scheme=request.scheme,
        request_id=request.id,
        trust_forwarded=host.settings.trust_forwarded,
        chunked=request.chunked,
        upgrade=request.upgrade,
    )
    host.buffered -= request.buffered
    connection.begin(exchange, head, chunked=request.chunked)
    client.pause("body", False)
    if client.writing_paused:
        connection.pause(True)
