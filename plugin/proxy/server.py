"""The port: accept clients, hold or forward their requests, shut down in order.

`ProxyServer(target, settings)` serves a `ReplicaPool`, or a `Router` of several, on listening sockets that the owner
provides. The owner handles signals and calls `shutdown`. `serve` does the same as one coroutine.

Guarantees: every request that was read gets exactly one answer, or its connection is cut. A request is written to a
replica at most once. There are three exceptions, each without an answer sent to the client: the connection could not be
made, the request was speculative and the check failed (`_run_ahead`), or the owner killed the replica because pages
will not come or it was silent (`_forward`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from plugin.proxy.admin.stats import Stats
from plugin.proxy.errors import ClientFault, ProxyError, Unavailable, UpstreamFault
from plugin.proxy.http import wire
from plugin.proxy.http.downstream import ClientConnection
from plugin.proxy.http.exchange import Exchange
from plugin.proxy.http.path_rules import PathRules, Verdict
from plugin.proxy.http.request import Request
from plugin.proxy.http.upstream_connection import BackConnection, connect
from plugin.proxy.limits import SHORTAGE, most_clients
from plugin.proxy.pool import adapters
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.proxy.settings import Settings

log = logging.getLogger("quickthaw.proxy")
GENERATIONS = frozenset(
    {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/generate"}
)
"""Paths whose requests may run speculatively beside a restored replica's check."""


class Router(Protocol):
    """Choose the pool that answers a request; a single `ReplicaPool` uses `SinglePool`."""

    def pools(self) -> Sequence[ReplicaPool]:
        """Return every pool, for status and metrics."""

    def answer(self, request: Request) -> dict[str, Any] | None:
        """Return the router's own JSON answer, or None."""

    async def route(self, client: ClientConnection, request: Request) -> ReplicaPool:
        """Return the pool for `request`. Raises ProxyError if there is none."""


class SinglePool:
    """A router of one pool."""

    def __init__(self, pool: ReplicaPool) -> None:
        self.pool = pool

    def pools(self) -> Sequence[ReplicaPool]:
        """Return the one pool."""
        return (self.pool,)

    def answer(self, request: Request) -> dict[str, Any] | None:
        """Return None: there is no answer of its own."""
        return None

    async def route(self, client: ClientConnection, request: Request) -> ReplicaPool:
        """Return the one pool."""
        return self.pool


class ProxyServer:
    """One worker: its listeners, its clients, its counters."""

    def __init__(self, target: ReplicaPool | Router, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.router: Router = SinglePool(target) if isinstance(target, ReplicaPool) else target
        self.stats = Stats()
        self.clients: set[ClientConnection] = set()
        self.draining = False
        self.buffered = 0
        self.max_clients = self.settings.max_clients or most_clients()
        self.emptied: asyncio.Event | None = None
        self.started_at = time.time()
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by start
        self.rules = PathRules(self.settings.admin_prefix, self.settings.denied_paths, self.settings.root_path)
        self._servers: list[asyncio.Server] = []
        self._chores: list[asyncio.Task[None]] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._stopped: asyncio.Event | None = None
        self._single = target if isinstance(target, ReplicaPool) else None

        self.pages_app: Any = None
        self.gather: Callable[[], Awaitable[dict[str, Any]]] | None = None
        """Set in a worker of several: returns the combined document of all workers."""

    async def document(self) -> dict[str, Any]:
        """Return the status document of the proxy, combined over all workers."""
        if self.gather is not None:
            return await self.gather()
        from plugin.proxy.admin.endpoints import status_document

        return status_document(self)

    # -- the owner's API ---------------------------------------------------------------------------

    async def start(self, sock: socket.socket, *, admin_sock: socket.socket | None = None) -> None:
        """Accept clients on `sock` (bound and listening). `admin_sock`, if given, serves the admin endpoints on a port of their own."""
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for pool in self.router.pools():
            pool.bind(self.loop, max_held=self.settings.max_held, max_hold_s=self.settings.max_hold_s)
            self._chores += [self.loop.create_task(chore()) for chore in pool.chores]
            if pool.idle_timeout_s is not None:
                self._chores.append(self.loop.create_task(pool.sleeper.watch_idle()))
        await self._listen(sock, own_port=False)
        if admin_sock is not None:
            await self._listen(admin_sock, own_port=True)
        self._sweeper = self.loop.create_task(self._sweep())

    async def _listen(self, sock: socket.socket, *, own_port: bool) -> None:
        sock.setblocking(False)

        def protocol() -> ClientConnection:
            return ClientConnection(self, own_port=own_port)

        if sock.family == socket.AF_UNIX:
            server = await self.loop.create_unix_server(protocol, sock=sock, backlog=self.settings.backlog)
        else:
            server = await self.loop.create_server(protocol, sock=sock, backlog=self.settings.backlog)
        self._servers.append(server)

    async def wait_stopped(self) -> None:
        """Return once `shutdown` is done."""
        assert self._stopped is not None, "start comes first"
        await self._stopped.wait()

    async def shutdown(self, limit_s: float | None = None) -> None:
        """Stop accepting, answer held requests with 503, wait up to `limit_s` seconds for those in flight, then close everything."""
        if self.draining:
            await self.wait_stopped()
            return
        self.draining = True
        for server in self._servers:
            server.close()
        for task in self._chores:
            task.cancel()
        ending = Unavailable("shutting-down", "the proxy is shutting down", retry_after_s=1.0)
        for pool in self.router.pools():
            pool.close(ending)
        for client in tuple(self.clients):
            client.drain()
        self.emptied = asyncio.Event()
        if self.clients:
            try:
                async with asyncio.timeout(self.settings.drain_s if limit_s is None else limit_s):
                    await self.emptied.wait()
            except TimeoutError:
                left = len(self.clients)
                log.warning("%d clients cut at the end", left, extra={"event": "cut", "fields": {"clients": left}})
        for client in tuple(self.clients):
            client.cut()
        if self._sweeper is not None:  # stopped last: it closes idle keep-alive connections during the wait
            self._sweeper.cancel()
            self._chores.append(self._sweeper)
        await asyncio.gather(*self._chores, *(pool.settled() for pool in self.router.pools()), return_exceptions=True)
        await asyncio.sleep(0)
        if self._stopped is not None:
            self._stopped.set()

    async def _sweep(self) -> None:
        settings = self.settings
        limits = [settings.keepalive_s, settings.head_timeout_s, settings.body_timeout_s, settings.upstream_keepalive_s]
        limits.append(settings.body_total_s)
        limits += [self._upstream_limit(pool) for pool in self.router.pools()]
        every = min(1.0, max(0.02, min(limits) / 4))
        while True:
            await asyncio.sleep(every)
            now = time.monotonic()
            for client in tuple(self.clients):
                client.sweep(now)
                exchange = client.exchange
                if exchange is None or exchange.back is None or client.tunnel is not None:
                    continue
                back = exchange.back
                if back.answer is exchange and not back.reading_paused:
                    silent = now - max(back.last_byte, client.last_in if not exchange.request.complete else 0.0)
                    limit = exchange.upstream_limit_s
                    if silent > limit:
                        text = f"the replica sent nothing for {limit:g} s (--upstream-timeout)"
                        client.interrupt(UpstreamFault("upstream-timeout", text, status=504))
            for pool in self.router.pools():
                for replica in pool.replicas.values():
                    for connection in tuple(replica.idle):
                        if now - connection.idle_since > settings.upstream_keepalive_s:
                            replica.idle.remove(connection)
                            connection.abort()

    def _upstream_limit(self, pool: ReplicaPool) -> float:
        own = pool.upstream_timeout_s
        return self.settings.upstream_timeout_s if own is None else own

    # -- one request -------------------------------------------------------------------------------

    def forget(self, client: ClientConnection) -> None:
        """Remove a client whose connection has ended."""
        self.clients.discard(client)
        if not self.clients and self.emptied is not None:
            self.emptied.set()

    def no_room(self) -> ProxyError:
        """Return the error for request bodies that exceed the limit on held bytes."""
        left = min(pool.left_s() for pool in self.router.pools())
        return Unavailable("held-bytes", "the held requests' bodies take all the room there is", retry_after_s=left)

    async def serve_request(self, client: ClientConnection, request: Request) -> None:
        """Answer `request` exactly once. In every case, call the connection's `finished` and update the counters."""
        stats = self.stats
        stats.requests += 1
        exchange = client.exchange = Exchange(client, request, self.loop)
        client.running = True
        try:
            if request.interrupt is not None or client.transport is None or client.transport.is_closing():
                raise asyncio.CancelledError
            await self._serve(client, request, exchange)
            exchange.outcome = exchange.outcome or ("tunnel" if exchange.tunnel else "forwarded")
        except ProxyError as error:
            self._answer_error(client, request, exchange, error)
        except asyncio.CancelledError:
            if request.interrupt is None:
                exchange.outcome = "tunnel" if exchange.tunnel else "client-gone"
            else:
                self._answer_error(client, request, exchange, request.interrupt)
        except Exception:
            fields = {"request_id": request.id.decode()}
            log.exception("a defect of the proxy", extra={"event": "defect", "fields": fields})
            fault = ProxyError("proxy-defect", "the proxy failed on this request", status=500)
            self._answer_error(client, request, exchange, fault)
        finally:
            back = exchange.back
            if back is not None and back.answer is exchange and not exchange.tunnel:
                back.abort()
            request.sink = None
            if exchange.early is not None:
                exchange.early.close()
            self._count(request, exchange)
            if exchange.close_after:
                request.keep_alive = False
            client.finished(request)

    def _answer_error(self, client: ClientConnection, request: Request, exchange: Exchange, error: ProxyError) -> None:
        exchange.outcome = error.code
        if isinstance(error, UpstreamFault):
            self.stats.upstream_errors[error.code] += 1
        if exchange.early is not None and not exchange.early.answered:
            exchange.early.error(error)
            exchange.status = error.status
        elif exchange.head_sent:
            client.cut()
        else:
            exchange.status = error.status
            client.refuse(request, error)

    async def _serve(self, client: ClientConnection, request: Request, exchange: Exchange) -> None:
        if request.fault is not None:
            raise request.fault
        verdict = self.rules.judge(request.target)
        if verdict is not Verdict.PASS or client.own_port:
            await self._serve_own(client, request, exchange, verdict)
            return
        if self.draining:
            raise Unavailable("shutting-down", "the proxy is shutting down")
        if request.expect and not request.complete:
            client.write(wire.CONTINUE)
        pool = self._single
        if pool is None:
            own = self.router.answer(request)
            if own is not None:
                exchange.outcome, exchange.status = "own", 200
                client.respond(request, 200, [(b"content-type", b"application/json")], json.dumps(own).encode())
                return
            pool = await self.router.route(client, request)
        exchange.pool_name = pool.name
        exchange.upstream_limit_s = self._upstream_limit(pool)
        while True:
            replica = pool.try_acquire()
            if replica is None:
                replica = await self._hold(client, request, exchange, pool)
            try:
                if replica.check is not None:
                    if await self._run_ahead(client, request, exchange, replica, replica.check):
                        return
                    continue
                if self._worth_keeping(request, replica):
                    # Only a complete body can be retried; most clients send the body right after the head.
                    await client.whole_body(request, self.settings.body_buffer)
                back = await self._connection(pool, replica)
                if back is not None and client.transport is not None and not client.transport.is_closing():
                    exchange.replica_name = replica.name
                    forwarding: Awaitable[bool] = self._forward(client, request, exchange, replica, back)
                    if adapters.changed_by(request):
                        forwarding = adapters.watched(forwarding, pool, replica, request, exchange)
                    if await forwarding:
                        return
                    continue
                if back is not None:
                    back.abort()
                    raise asyncio.CancelledError
            finally:
                pool.release(replica)

    async def _hold(self, client: ClientConnection, request: Request, exchange: Exchange, pool: ReplicaPool) -> Replica:
        began = time.monotonic()
        if self.buffered > self.settings.max_held_bytes:
            raise self.no_room()
        self.stats.held_total += exchange.held_s == 0.0
        if self.settings.early_stream and exchange.early is None:
            from plugin.proxy.http.early_stream import begin_early

            await begin_early(client, request, exchange, pool, self.settings)
        try:
            ahead = request.complete and exchange.early is None and request.path in GENERATIONS
            replica = await pool.acquire(
                self.settings.hold_timeout_s, at_most_s=request.hold_s, since=request.arrived, ahead=ahead
            )
        finally:
            exchange.held_s += time.monotonic() - began
        if client.gone():
            pool.release(replica)
            raise asyncio.CancelledError
        return replica

    async def _connection(self, pool: ReplicaPool, replica: Replica) -> BackConnection | None:
        """Return an open connection, reused or new; None if the replica could not be reached, in which case nothing was sent."""
        idle = replica.idle
        generation = replica.generation
        now = time.monotonic()
        while idle:
            back = idle.pop()
            if now - back.idle_since <= self.settings.upstream_keepalive_s and back.alive():
                return back
            back.abort()
        if replica.connecting is None:
            replica.connecting = asyncio.Semaphore(self.settings.max_connecting)
        async with replica.connecting:
            try:
                back = await connect(replica, self.settings.connect_timeout_s)
                if back.alive():
                    replica.accepts()
                    return back
                why = "it closed the connection before anything was sent"
                back.abort()
            except OSError as exc:
                if exc.errno in SHORTAGE:
                    raise Unavailable("no-connection", f"this host has no connection to give: {exc}") from exc
                why = f"{type(exc).__name__}: {exc}"
        self.stats.upstream_errors["upstream-refused"] += 1
        pool.refused(replica, generation, why)
        return None

    async def _forward(
        self, client: ClientConnection, request: Request, exchange: Exchange, replica: Replica, back: BackConnection
    ) -> bool:
        """Write the request once and relay its answer. Return True when it was answered.

        False means that the owner killed the replica without an answer: its pages will not come (the page server died),
        or it was silent. Nothing reached the client, and the request waits until the replica is back.
        """
        exchange.cautious = self._may_be_lost(request, exchange, replica)
        kept = exchange.cautious or (replica.guarded and self._repeatable(request, exchange))
        body = bytes(request.body) if kept else None
        self._write(client, request, exchange, replica, back)
        return await self._answered(client, request, exchange, replica, body)

    def _worth_keeping(self, request: Request, replica: Replica) -> bool:
        """Return True if the whole body must be here before the request is sent, because the request may have to be retried."""
        if request.path not in GENERATIONS:
            return False
        small = request.length is not None and request.length <= self.settings.body_buffer
        return replica.coming() or (replica.guarded and small)

    @staticmethod
    def _repeatable(request: Request, exchange: Exchange) -> bool:
        """Return True if a request can be retried: only a generation, which leaves no state in an engine."""
        return request.complete and request.http11 and exchange.early is None and request.path in GENERATIONS

    def _may_be_lost(self, request: Request, exchange: Exchange, replica: Replica) -> bool:
        """Return True if a request may lose its replica to missing pages, and can be retried."""
        return replica.coming() and self._repeatable(request, exchange)

    async def _answered(
        self, client: ClientConnection, request: Request, exchange: Exchange, replica: Replica, body: bytes | None
    ) -> bool:
        """Return True when answered; False if the owner killed the replica (`Replica.lost`) and `body` can be sent again."""
        try:
            await self._see_through(exchange, replica)
        except UpstreamFault:
            if body is None or exchange.head_sent or not replica.lost() or client.gone():
                raise
            exchange.forget()
            self.buffered += request.put_back(body)
            return False
        return True

    @staticmethod
    async def _see_through(exchange: Exchange, replica: Replica) -> None:
        """Wait for the end of an answer. A client that leaves after a part counts as served: stream readers leave at the last token."""
        try:
            await exchange.done
        except asyncio.CancelledError:
            replica.served += exchange.answered
            raise
        replica.served += 1

    async def _run_ahead(
        self,
        client: ClientConnection,
        request: Request,
        exchange: Exchange,
        replica: Replica,
        check: asyncio.Future[bool],
    ) -> bool:
        """Let a replica under check answer already (a speculative request), and withhold the answer until the check passes.

        False means that the check did not pass: nothing reached the client, and the request waits for this or another
        replica. Only for generations, which leave no state in an engine whose answer is dropped.
        """
        began = time.monotonic()
        body = bytes(request.body)
        try:
            back = await connect(replica, self.settings.connect_timeout_s)
        except OSError:
            await self._checked(request, check)
            return False
        if client.gone():
            back.abort()
            raise asyncio.CancelledError
        exchange.withheld, exchange.replica_name = True, replica.name
        self._write(client, request, exchange, replica, back)
        passed = False
        try:
            passed = await self._checked(request, check)
        finally:
            exchange.held_s += time.monotonic() - began
            if not passed:
                exchange.forget()
        if not passed:
            self.buffered += request.put_back(body)
            return False
        cautious = self._may_be_lost(request, exchange, replica)
        exchange.let_go(cautious)
        return await self._answered(client, request, exchange, replica, body if cautious or replica.guarded else None)

    async def _checked(self, request: Request, check: asyncio.Future[bool]) -> bool:
        """Return True if the check passed. Raises Unavailable (hold-deadline) at the request's deadline, as in the pool."""
        least = min(request.hold_s, math.inf if self.settings.hold_timeout_s is None else self.settings.hold_timeout_s)
        left = max(0.0, request.arrived + least - time.monotonic())
        try:
            async with asyncio.timeout(None if left == math.inf else left):
                return await asyncio.shield(check)
        except TimeoutError:
            message = f"no replica was ready within {least:.1f} s (it was being checked)"
            raise Unavailable("hold-deadline", message, retry_after_s=1.0) from None

    def _write(
        self, client: ClientConnection, request: Request, exchange: Exchange, replica: Replica, back: BackConnection
    ) -> None:
        upstream = replica.upstream
        assert upstream is not None
        exchange.back = back
        drop = request.drop if exchange.early is None else request.drop | {b"accept-encoding"}
        head = wire.request_head(
            request.method,
            request.target,
            request.headers,
            drop=drop,
            host=upstream.authority or request.host or b"localhost",
            client_host=request.host,
            peer=client.peer,
            request_id=request.id,
            trust_forwarded=self.settings.trust_forwarded,
            chunked=request.chunked,
            upgrade=request.upgrade,
        )
        self.buffered -= request.buffered
        back.begin(exchange, head, chunked=request.chunked)
        client.hold("body", False)
        if client.writing_paused:
            back.pause(True)

    def _count(self, request: Request, exchange: Exchange) -> None:
        stats = self.stats
        stats.outcomes[exchange.outcome] += 1
        stats.bytes_out += exchange.written
        if exchange.held_s:
            stats.held.add(exchange.held_s)
        if exchange.first_byte:
            stats.first_byte.add(exchange.first_byte - request.arrived)
        level = logging.INFO if self.settings.access_log or exchange.held_s else logging.DEBUG
        if exchange.outcome not in ("forwarded", "own", "tunnel", "client-gone"):
            level = logging.WARNING
        if log.isEnabledFor(level):
            now = time.monotonic()
            fields = {
                "request_id": request.id.decode("ascii", "replace"),
                "method": request.method.decode("ascii", "replace"),
                "path": request.path,
                "status": exchange.status,
                "outcome": exchange.outcome,
                "pool": exchange.pool_name,
                "replica": exchange.replica_name,
                "held_s": round(exchange.held_s, 4),
                "first_byte_s": round(exchange.first_byte - request.arrived, 4) if exchange.first_byte else None,
                "total_s": round(now - request.arrived, 4),
                "bytes_in": request.body_bytes,
                "bytes_out": exchange.written,
            }
            text = "{method} {path}: {status} {outcome}, held {held_s:.2f} s, {total_s:.2f} s in all".format_map(fields)
            log.log(level, "%s", text, extra={"event": "request", "fields": fields})

    async def _serve_own(
        self, client: ClientConnection, request: Request, exchange: Exchange, verdict: Verdict
    ) -> None:
        if verdict is not Verdict.OWN or not (client.own_port or self.settings.admin_on_public_port):
            raise ClientFault("not-found", "there is no such path", status=404)
        from plugin.proxy.admin.endpoints import serve_own

        exchange.outcome = "own"
        exchange.status = await serve_own(self, client, request)


async def serve(
    target: ReplicaPool | Router,
    sock: socket.socket,
    settings: Settings | None = None,
    *,
    admin_sock: socket.socket | None = None,
) -> None:
    """Serve until this coroutine is cancelled, then shut down in order."""
    server = ProxyServer(target, settings)
    await server.start(sock, admin_sock=admin_sock)
    try:
        await server.wait_stopped()
    finally:
        await server.shutdown()
