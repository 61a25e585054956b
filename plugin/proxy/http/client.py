"""One client of either front end: buffer its request's body, pause and resume it, interrupt its request, refuse it.

`downstream.ClientConnection` is a connection of the proxy's own port, `asgi_client.AsgiClient` one request that an ASGI
server passed on. Requests of both are served by the same code (`plugin.proxy.server`, `plugin.proxy.forwarding`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol

from plugin.proxy.errors import ClientFault, ProxyError, render

if TYPE_CHECKING:
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.request import Request
    from plugin.proxy.http.upstream_connection import UpstreamConnection
    from plugin.proxy.settings import Settings


class Host(Protocol):
    """The part of the server that a client needs."""

    settings: Settings
    clients: set[Client]
    handshakes: set[Client]
    draining: bool
    replaced: bool
    buffered: int
    max_clients: int
    loop: asyncio.AbstractEventLoop

    def forget(self, client: Client) -> None:
        """Remove a client that has disconnected."""

    def no_room(self) -> ProxyError:
        """Return the error for request bodies that exceed the limit on held bytes."""

    async def serve_request(self, client: Client, request: Request) -> None:
        """Answer `request` exactly once."""


class Client:
    """The state of one client and of the request that it waits for."""

    exchange_type: type[Exchange]
    """How its answers are written."""

    def __init__(self, host: Host, *, on_admin_port: bool = False) -> None:
        self.host, self.on_admin_port = host, on_admin_port
        self.settings = host.settings
        self.peer = b""
        self.exchange: Exchange | None = None
        self.tunnel: UpstreamConnection | None = None
        self.current: Request | None = None
        self.last_in = self.last_out = time.monotonic()
        self.writing_paused = False
        self.running = False
        """True from the first to the last step of the task that serves the current request."""
        self._task: asyncio.Task[None] | None = None
        self._pauses: set[str] = set()
        self._body_limit = 0
        self._swept = self._body_s = 0.0

    # -- implemented by each front end -------------------------------------------------------------

    def is_closing(self) -> bool:
        """Return True if nothing that is written now can reach the client."""
        raise NotImplementedError

    def is_disconnected(self) -> bool:
        """Return True if the client has disconnected, as far as this host can know."""
        raise NotImplementedError

    def respond(
        self, request: Request, status: int, headers: list[tuple[bytes, bytes]], body: bytes, *, close: bool = False
    ) -> None:
        """Send a response made by the proxy itself."""
        raise NotImplementedError

    def send_continue(self) -> None:
        """Send 100 Continue."""
        raise NotImplementedError

    def abort_answer(self) -> None:
        """Abort the answer, so that a part of it cannot pass for the whole."""
        raise NotImplementedError

    def drain(self) -> None:
        """Take no further request, because the server is shutting down."""
        raise NotImplementedError

    def sweep(self, now: float) -> None:
        """Enforce the time limits; called about once a second."""
        raise NotImplementedError

    def finished(self, request: Request) -> None:
        """Continue after a request was answered or has failed."""
        raise NotImplementedError

    def _pause_reading(self) -> None:
        raise NotImplementedError

    def _resume_reading(self) -> None:
        raise NotImplementedError

    # -- shared by both front ends -----------------------------------------------------------------

    def refuse(self, request: Request, error: ProxyError) -> None:
        """Respond with an error; close the connection if the request's body is incomplete."""
        status, headers, body = render(error, request.path, request.id.decode("ascii", "replace"))
        self.respond(request, status, headers, body, close=not request.complete)

    def interrupt(self, error: ProxyError) -> None:
        """Cancel the current request with `error` (a fault in the body, a timeout, the server's shutdown)."""
        if self.current is not None and self.current.interrupt is None:
            self.current.interrupt = error
            self._cancel()

    def _cancel(self) -> None:
        """Cancel the serving task, unless it has not run yet: a task cancelled before its first step skips its cleanup."""
        if self._task is not None and self.running:
            self._task.cancel()

    def pause(self, reason: str, on: bool) -> None:
        """Add or remove a reason to pause reading; reading is paused while any reason holds."""
        before = bool(self._pauses)
        if on:
            self._pauses.add(reason)
        else:
            self._pauses.discard(reason)
        if bool(self._pauses) == before or self.is_closing():
            return
        if self._pauses:
            self._pause_reading()
        else:
            self.last_in = time.monotonic()
            self._resume_reading()

    async def wait_body(self, request: Request, limit: int) -> bool:
        """Wait for the whole body. Return False if it exceeds `limit` bytes; about that much of it is then buffered."""
        if not request.complete and request.sink is None:
            self._body_limit = limit
            request.enough = self.host.loop.create_future()
            if request.buffered <= limit:
                self.pause("body", False)
                await request.enough
        return request.complete

    def take_body(self, request: Request, data: bytes) -> None:
        """Relay a part of the body, or buffer it and pause the client at the limit."""
        kept = request.feed(data)
        if kept:
            self.host.buffered += kept
            if self.host.buffered > self.settings.max_held_bytes and request is self.current:
                self.interrupt(self.host.no_room())
            if request.buffered > (self.settings.body_buffer if request.enough is None else self._body_limit):
                self.pause("body", True)
                if request.enough is not None and not request.enough.done():
                    request.enough.set_result(None)

    def pause_writing(self) -> None:
        """Pause the replica too, because the client reads too slowly."""
        self.writing_paused = True
        self.last_out = time.monotonic()
        if self.exchange is not None and self.exchange.connection is not None:
            self.exchange.connection.pause(True)

    def resume_writing(self) -> None:
        """Resume the replica."""
        self.writing_paused = False
        if self.exchange is not None and self.exchange.connection is not None:
            self.exchange.connection.pause(False)

    def _sweep_body(self, request: Request, now: float, passed_s: float) -> None:
        """Interrupt a request whose body takes too long. Time in which the proxy pauses the client does not count."""
        if request.complete or self._pauses:
            return
        self._body_s += passed_s
        if now - self.last_in > self.settings.body_timeout_s or self._body_s > self.settings.body_total_s:
            self.interrupt(ClientFault("body-timeout", "the request's body took too long", status=408))
