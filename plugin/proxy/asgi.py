"""The proxy as part of a Starlette or FastAPI gateway: an application to mount, and a middleware.

`hold_app(pool)` is a Starlette application that holds, forwards and streams as `quickthaw proxy` does: the same pool,
deadlines, path rules, errors, retries and admin endpoints. `HoldMiddleware(app, pool)` only holds: a request waits until
a replica serves, and then `app` forwards and answers it.

Both work in the event loop of any ASGI server. `launch` does not use them: its own port (`plugin.proxy.server`) needs no
Starlette at a restore, and is several times faster (docs/proxy.md).

Known limits of `hold_app`: no WebSockets (501 `websocket-unsupported`), no trailers, no informational responses. An
answer that breaks off raises an exception, and the server closes the connection. Starlette's BaseHTTPMiddleware would
end an answer without a length as if it were complete: use plain ASGI middleware around `hold_app`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from plugin.proxy import probes
from plugin.proxy.errors import ProxyError, Unavailable, render
from plugin.proxy.http.asgi_client import AsgiClient, Message, Receive, Send, request_of, websocket_fault
from plugin.proxy.http.path_rules import Verdict
from plugin.proxy.http.request import Request
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.proxy.pool.router import Router
from plugin.proxy.server import Proxy
from plugin.proxy.settings import Settings

Scope = MutableMapping[str, Any]


def hold_app(target: ReplicaPool | Router, settings: Settings | None = None) -> Starlette:
    """Return an application that holds, forwards and streams every request that reaches it.

    Its lifespan starts and stops the proxy. A server runs no lifespan of a mounted application, so the outer application
    must enter it (`async with inner.router.lifespan_context(inner)`). Without a lifespan the first request starts the
    proxy. `app.state.proxy` is the `Proxy`. Call its `drain` when the server receives a stop signal, because an ASGI
    server ends the lifespan only after the last request.
    """
    proxy = Proxy(target, settings)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        proxy.begin()
        yield
        await proxy.shutdown()

    app = Starlette(routes=[Mount("/", app=_Forwarding(proxy))], lifespan=lifespan)
    app.state.proxy = proxy
    return app


class _Forwarding:
    """The innermost ASGI application of `hold_app`."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, send, websocket_fault())
            return
        if not self.proxy.begun:
            self.proxy.begin()
        await AsgiClient(self.proxy, scope, receive, send).run()


class HoldMiddleware:
    """Hold requests until a replica serves, then let the application answer them.

    The replica is in `request.state.replica`; it counts the request as outstanding until the application returns. A
    request that cannot be held any longer is answered here with the proxy's errors. Denied paths are answered with 404.
    Close the pool when the server receives a stop signal: held requests then end with the error given to `pool.close`.
    """

    def __init__(
        self, app: ASGIApp, pool: ReplicaPool, settings: Settings | None = None, *, paths: tuple[str, ...] = ("/",)
    ) -> None:
        """`paths`: hold only requests to these paths and below; leave out the application's health checks."""
        self.app, self.pool = app, pool
        self.proxy = Proxy(pool, settings)
        self._no_memory = probes.Memory()
        self._paths = tuple(path.rstrip("/") for path in paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI scope."""
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif any(f"{scope['path']}/".startswith(f"{path}/") for path in self._paths):
            await self._held(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run_lifespan() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.proxy.begin()
            else:
                await self.proxy.shutdown()
            return message

        await self.app(scope, run_lifespan, send)

    async def _held(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.proxy.begun:
            self.proxy.begin()
        websocket = scope["type"] == "websocket"
        request = request_of({"method": "GET", **scope})  # a WebSocket's scope has no method
        inbox = _Inbox(receive, self.proxy.settings.body_buffer)
        probe = None if websocket else self._probe(request)
        try:
            if probe is not None and self.pool.ready() is None and not probes.should_wait(self.pool):
                status, headers, body, outcome = probe.answer(self.proxy, self.pool)
                self.proxy.stats.outcomes[outcome] += 1
                await _respond(request, send, status, headers, body)
                return
            replica = await self._acquire(request, None if websocket else inbox)
        except ProxyError as error:
            self.proxy.stats.outcomes[error.code] += 1
            self._finished(probe)
            if websocket:
                await _refuse_websocket(scope, send, error)
            else:
                await _refuse(request, send, error)
            return
        finally:
            self.proxy.stats.requests += 1
        if replica is None:
            self.proxy.stats.outcomes["client-gone"] += 1
            self._finished(probe)
            return
        self.pool.probes += probe is not None
        try:
            scope.setdefault("state", {})["replica"] = replica
            await self.app(scope, inbox.receive, send)
            replica.served += 1
            self.proxy.stats.outcomes["forwarded"] += 1
        finally:
            self.pool.probes -= probe is not None
            self.pool.release(replica, used=probe is None)
            self._finished(probe)

    def _finished(self, probe: probes.Probe | None) -> None:
        self.proxy.stats.finished[self.pool.name] += probe is None

    def _probe(self, request: Request) -> probes.Probe | None:
        """Return the probe that the request is, or None if it counts as use. Answers of the application are not remembered."""
        rules = self.proxy.rules
        verdict = rules.classify(request.target)
        if verdict is Verdict.QUIET or (verdict is Verdict.PASS and not probes.announces_use(request)):
            return probes.Probe(self._no_memory, request, rules.engine_path(request.target))
        return None

    async def _acquire(self, request: Request, inbox: _Inbox | None) -> Replica | None:
        """Return a serving replica, or None when the client has disconnected. Raises ProxyError."""
        proxy, pool = self.proxy, self.pool
        if request.fault is not None and inbox is not None:
            raise request.fault
        if proxy.rules.classify(request.target) is Verdict.DENIED:
            raise ProxyError("not-found", "there is no such path", status=404)
        if proxy.draining:
            raise Unavailable("shutting-down", "the proxy is shutting down")
        replica = pool.try_acquire()
        if replica is not None:
            return replica
        waiting = asyncio.ensure_future(
            pool.acquire(proxy.settings.hold_timeout_s, at_most_s=request.hold_s, since=request.arrived)
        )
        watching = asyncio.ensure_future(asyncio.Event().wait() if inbox is None else inbox.until_disconnect())
        proxy.stats.held_total += 1
        try:
            await asyncio.wait((waiting, watching), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if waiting.done() and waiting.exception() is None:
                pool.release(waiting.result())
            raise
        finally:
            proxy.stats.held.add(time.monotonic() - request.arrived)
            watching.cancel()
            waiting.cancel()
        if waiting.done():
            return waiting.result()
        watching.result()  # raises what the server or a middleware raised instead of a disconnect
        return None


class _Inbox:
    """Read a request's messages while it is held, to notice a disconnect, and hand them to the application afterwards."""

    def __init__(self, receive: Receive, limit: int) -> None:
        """`limit`: bytes of the body after which nothing more is read while the request is held."""
        self._receive, self._left = receive, limit
        self._messages: deque[Message] = deque()

    async def until_disconnect(self) -> None:
        """Return once the client has disconnected."""
        while self._left > 0:
            message = await self._receive()
            self._messages.append(message)
            self._left -= len(message.get("body", b""))
            if message["type"] == "http.disconnect":
                return
        await asyncio.Event().wait()

    async def receive(self) -> Message:
        """Return the next message: first those that were read while the request was held."""
        return self._messages.popleft() if self._messages else await self._receive()


async def _refuse(request: Request, send: Send, error: ProxyError) -> None:
    await _respond(request, send, *render(error, request.path, request.id.decode("ascii", "replace")))


async def _respond(request: Request, send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", b"%d" % len(body)), (b"x-request-id", request.id)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if request.method == b"HEAD" else body})


async def _refuse_websocket(scope: Scope, send: Send, error: ProxyError) -> None:
    """Answer a WebSocket's handshake with the error, or close it where the server has no extension for that."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1013, "reason": error.code})
        return
    status, headers, body = render(error, scope["path"], "")
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
