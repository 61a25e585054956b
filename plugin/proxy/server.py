"""The proxy: answer each client's request, itself or through a replica, and shut down in order.

`Proxy` serves a `ReplicaPool`, or a `Router` of several, to clients of any front end. `ProxyServer` is the proxy behind its own
port: its owner provides the listening sockets, handles signals and calls `shutdown`. `serve` does the same as one
coroutine. `plugin.proxy.asgi` is the other front end.

Guarantees: every request that was read gets exactly one answer, or its connection is cut. A request is written to a
replica at most once, but for the exceptions in `plugin.proxy.retry_rules`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from plugin.proxy import probes
from plugin.proxy.admin.stats import Stats
from plugin.proxy.descriptor_limit import most_clients
from plugin.proxy.errors import ClientFault, ProxyError, Unavailable, UpstreamFault
from plugin.proxy.forwarding import forward
from plugin.proxy.http.client import Client
from plugin.proxy.http.downstream import ClientConnection
from plugin.proxy.http.exchange import Exchange
from plugin.proxy.http.path_rules import PathRules, Verdict
from plugin.proxy.http.request import Request
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.router import Router, SinglePool
from plugin.proxy.settings import Settings

if TYPE_CHECKING:
    from plugin.proxy.admin.access import Sessions
    from plugin.proxy.tls import Certificates
    from plugin.proxy.tls_listener import TlsListener

log = logging.getLogger("quickthaw.proxy")
_ACCEPTED_S = 0.2
"""Seconds in which connections that were accepted before the listener closed appear."""
_ORDINARY = frozenset({"forwarded", "own", "tunnel", "client-gone", probes.REMEMBERED, probes.NOT_AWAKE})
"""Outcomes of requests with which nothing went wrong."""


class Proxy:
    """Hold, forward and answer the requests of all clients; own their limits, counters and time limits."""

    def __init__(self, target: ReplicaPool | Router, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.router: Router = SinglePool(target) if isinstance(target, ReplicaPool) else target
        self.stats = Stats()
        self.clients: set[Client] = set()
        self.handshakes: set[Client] = set()
        """Clients whose TLS handshake is not done."""
        self.draining = False
        self.replaced = False
        """Whether another process serves on: this one drains without refusing what it has accepted."""
        self.buffered = 0
        """Bytes of request bodies that are kept here."""
        self.max_clients = self.settings.max_clients or most_clients()
        self.started_at = time.time()
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # set by begin
        self.rules = PathRules(
            self.settings.admin_prefix,
            self.settings.denied_paths,
            self.settings.root_path,
            self.settings.allowed_paths,
            self.settings.wake_on,
        )
        self.remembered: defaultdict[str, probes.Memory] = defaultdict(probes.Memory)
        """What each pool's engine answered last to probes, by the pool's name."""
        self.pages_app: Any = None
        self.sessions: Sessions | None = None
        self.listens_at = ""
        self.gather: Callable[[], Awaitable[dict[str, Any]]] | None = None
        """Set in a worker of several: returns the combined document of all workers."""
        self.act: Callable[[str, str], Awaitable[str]] | None = None
        """Set in a worker of several: moves a pool in the supervisor (`admin.actions`)."""
        self._single = target if isinstance(target, ReplicaPool) else None
        self._emptied: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._stopped: asyncio.Event | None = None

    async def document(self) -> dict[str, Any]:
        """Return the status document of the proxy, combined over all workers."""
        if self.gather is not None:
            return await self.gather()
        from plugin.proxy.admin.endpoints import status_document

        return await status_document(self)

    @property
    def begun(self) -> bool:
        """Return True once `begin` was called."""
        return self._sweeper is not None

    # -- begin and end -----------------------------------------------------------------------------

    def begin(self) -> None:
        """Bind the pools to the running loop, and start the tasks that watch them and enforce the time limits."""
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        for pool in self.router.pools():
            pool.bind(self.loop, max_held=self.settings.max_held, max_hold_s=self.settings.max_hold_s)
            self._tasks += [self.loop.create_task(background_task()) for background_task in pool.background]
            if pool.sleeper.watches:
                self._tasks.append(self.loop.create_task(pool.sleeper.watch_idle()))
        self._sweeper = self.loop.create_task(self._sweep())

    async def wait_stopped(self) -> None:
        """Return once `shutdown` is done."""
        assert self._stopped is not None, "begin comes first"
        await self._stopped.wait()

    def drain(self) -> None:
        """Answer held and new requests with 503 (shutting-down); those in flight continue, and if `replaced`, all do."""
        if self.draining:
            return
        self.draining = True
        if not self.replaced:
            self._refuse()
        for client in tuple(self.clients):
            client.drain()

    def _refuse(self) -> None:
        for task in self._tasks:
            task.cancel()
        ending = Unavailable("shutting-down", "the proxy is shutting down", retry_after_s=1.0)
        for pool in self.router.pools():
            pool.close(ending)

    async def shutdown(self, limit_s: float | None = None) -> None:
        """Drain, wait up to `limit_s` seconds for the requests in flight, then cut the rest. A second call waits for the first."""
        if self._emptied is not None:
            await self.wait_stopped()
            return
        self._emptied = asyncio.Event()
        self.drain()
        if self.replaced:
            await asyncio.sleep(_ACCEPTED_S)
            self._emptied.clear()
        if self.clients:
            try:
                async with asyncio.timeout(self.settings.drain_s if limit_s is None else limit_s):
                    await self._emptied.wait()
            except TimeoutError:
                left = len(self.clients)
                text = "shutdown: %d clients cut, still connected after the time limit"
                log.warning(text, left, extra={"event": "cut", "fields": {"clients": left}})
        if self.replaced:
            self._refuse()
        for client in tuple(self.clients):
            client.abort_answer()
        if self._sweeper is not None:  # stopped last: it closes idle keep-alive connections during the wait
            self._sweeper.cancel()
            self._tasks.append(self._sweeper)
        await asyncio.gather(
            *self._tasks, *(pool.wait_settled() for pool in self.router.pools()), return_exceptions=True
        )
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
                if exchange is None or exchange.connection is None or client.tunnel is not None:
                    continue
                connection = exchange.connection
                if connection.answer is exchange and not connection.reading_paused:
                    silent = now - max(connection.last_byte, client.last_in if not exchange.request.complete else 0.0)
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

    def forget(self, client: Client) -> None:
        """Remove a client whose connection has ended."""
        self.clients.discard(client)
        if not self.clients and self._emptied is not None:
            self._emptied.set()

    def no_room(self) -> ProxyError:
        """Return the error for request bodies that exceed the limit on held bytes."""
        left = min(pool.left_s() for pool in self.router.pools())
        return Unavailable("held-bytes", "held request bodies exceed the limit on held bytes", retry_after_s=left)

    async def serve_request(self, client: Client, request: Request) -> None:
        """Answer `request` exactly once. In every case, call the connection's `finished` and update the counters."""
        stats = self.stats
        stats.requests += 1
        exchange = client.exchange = client.exchange_type(client, request, self.loop)
        client.running = True
        try:
            if request.interrupt is not None or client.is_closing():
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
            log.exception(
                "proxy-defect: the proxy failed on a request; please report it",
                extra={"event": "defect", "fields": fields},
            )
            fault = ProxyError("proxy-defect", "the proxy failed on this request", status=500)
            self._answer_error(client, request, exchange, fault)
        finally:
            connection = exchange.connection
            if connection is not None and connection.answer is exchange and not exchange.tunnel:
                connection.abort()
            request.sink = None
            if exchange.early is not None:
                exchange.early.close()
            self._count(request, exchange)
            if exchange.close_after:
                request.keep_alive = False
            client.finished(request)

    def _answer_error(self, client: Client, request: Request, exchange: Exchange, error: ProxyError) -> None:
        exchange.outcome = error.code
        if isinstance(error, UpstreamFault):
            self.stats.upstream_errors[error.code] += 1
        if exchange.early is not None and not exchange.early.answered:
            exchange.early.error(error)
            exchange.status = error.status
        elif exchange.head_sent:
            client.abort_answer()
        else:
            exchange.status = error.status
            client.refuse(request, error)

    async def _serve(self, client: Client, request: Request, exchange: Exchange) -> None:
        if request.fault is not None:
            raise request.fault
        verdict = self.rules.classify(request.target)
        if (verdict is not Verdict.PASS and verdict is not Verdict.QUIET) or client.on_admin_port:
            await self._serve_admin(client, request, exchange, verdict)
            return
        if self.draining and not self.replaced:
            raise Unavailable("shutting-down", "the proxy is shutting down")
        if request.expect and not request.complete:
            client.send_continue()
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
        if verdict is Verdict.QUIET or not probes.announces_use(request):
            path = self.rules.engine_path(request.target)
            exchange.probe = probes.Probe(self.remembered[pool.name], request, path)
        await forward(self, client, request, exchange, pool)

    def _count(self, request: Request, exchange: Exchange) -> None:
        stats = self.stats
        stats.outcomes[exchange.outcome] += 1
        if exchange.pool_name and exchange.probe is None:
            stats.finished[exchange.pool_name] += 1
        stats.bytes_out += exchange.written
        if exchange.held_s:
            stats.held.add(exchange.held_s)
        if exchange.first_byte:
            stats.first_byte.add(exchange.first_byte - request.arrived)
        level = logging.INFO if self.settings.access_log or exchange.held_s else logging.DEBUG
        if exchange.outcome not in _ORDINARY:
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

    async def _serve_admin(self, client: Client, request: Request, exchange: Exchange, verdict: Verdict) -> None:
        if verdict is not Verdict.ADMIN or not (client.on_admin_port or self.settings.admin_on_public_port):
            raise ClientFault("not-found", "there is no such path", status=404)
        from plugin.proxy.admin.endpoints import serve_admin

        exchange.outcome = "own"
        exchange.status = await serve_admin(self, client, request)


class ProxyServer(Proxy):
    """The proxy behind a port of its own: one worker with its listeners."""

    def __init__(self, target: ReplicaPool | Router, settings: Settings | None = None) -> None:
        super().__init__(target, settings)
        self._servers: list[asyncio.Server] = []
        self._tls_listener: TlsListener | None = None

    async def start(
        self,
        sock: socket.socket,
        *,
        admin_sock: socket.socket | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """Accept clients on `sock` (bound and listening), over TLS with `certificates`.

        `admin_sock`, if given, serves the admin endpoints on a port of their own, without TLS.
        """
        from plugin.runtime.listening import url

        self.begin()
        self.listens_at = url(sock, certificates is not None)
        await self._listen(sock, certificates, on_admin_port=False)
        if certificates is not None and certificates.refresh:
            self._tasks.append(self.loop.create_task(certificates.watch()))
        if admin_sock is not None:
            await self._listen(admin_sock, None, on_admin_port=True)

    async def _listen(self, sock: socket.socket, certificates: Certificates | None, *, on_admin_port: bool) -> None:
        sock.setblocking(False)

        def protocol() -> ClientConnection:
            return ClientConnection(self, on_admin_port=on_admin_port)

        backlog = self.settings.backlog
        if certificates is not None:
            from plugin.proxy.tls_listener import TlsListener

            sock.listen(backlog)
            self._tls_listener = TlsListener(self, sock, certificates, protocol, self.settings.head_timeout_s)
        elif sock.family == socket.AF_UNIX:
            self._servers.append(await self.loop.create_unix_server(protocol, sock=sock, backlog=backlog))
        else:
            self._servers.append(await self.loop.create_server(protocol, sock=sock, backlog=backlog))

    def drain(self) -> None:
        """Stop accepting, close idle connections, answer held requests with 503; requests in flight continue."""
        for server in self._servers:
            server.close()
        if self._tls_listener is not None:
            self._tls_listener.close()
        super().drain()

    async def shutdown(self, limit_s: float | None = None) -> None:
        """Drain, wait up to `limit_s` seconds for the requests in flight, then cut the rest and the unfinished handshakes."""
        await super().shutdown(limit_s)
        if self._tls_listener is not None:
            self._tls_listener.cut()


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
