"""One client connection: parse requests strictly, keep their order, apply backpressure and limits, detect a disconnect at once.

Guarantees: requests of one connection are served one after the other and answered in order. A malformed or oversized
request is refused, and nothing after it is read. When the client disconnects, the task that serves it is cancelled in
the same loop iteration.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from plugin.proxy.errors import ClientFault, ProxyError, Unavailable
from plugin.proxy.http import wire
from plugin.proxy.http.client import Client, Host
from plugin.proxy.http.exchange import WireExchange
from plugin.proxy.http.request import Request

if TYPE_CHECKING:
    from plugin.proxy.http.upstream_connection import UpstreamConnection

_MAX_PIPELINED = 32
_LINGER_S = 2.0
_TLS_END_S = 5.0
_LINGER_BYTES = 16 << 20
_WATCH_S = 0.05
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
# A fresh parser that is fed this head parses what follows as a body, for a request whose upgrade was ignored.
_SYNTHETIC = b"POST / HTTP/1.1\r\nhost: x\r\n%b\r\n\r\n"


class ClientConnection(Client, asyncio.Protocol):
    """The server side of one client connection."""

    exchange_type = WireExchange

    def __init__(self, host: Host, *, on_admin_port: bool = False) -> None:
        super().__init__(host, on_admin_port=on_admin_port)
        self.transport: asyncio.Transport | None = None
        self._queue: deque[Request] = deque()
        self._parsing: Request | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._trailers = 0
        self._unparsed = 0
        """Bytes received since the parser last completed a head, a part of a body, or a request."""
        self._head_began = 0.0
        self._in_head = False
        self._asked = False
        """Whether a request's head has come."""
        self._stopped = False
        self._synthetic = False
        self._ignored_upgrade = False
        self._watching = False
        self._early_tunnel = b""
        self._scheme = b"http"
        self._linger_until = 0.0
        self._lingered = 0

    # -- the server's API --------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write to the client, unless it has disconnected."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            transport.write(data)

    def respond(
        self, request: Request, status: int, headers: list[tuple[bytes, bytes]], body: bytes, *, close: bool = False
    ) -> None:
        """Send a response made by the proxy itself."""
        close = close or not request.keep_alive
        head_only = request.method == b"HEAD"
        self.write(wire.own_response(status, headers, body, request_id=request.id, close=close, head_only=head_only))
        if close:
            request.keep_alive = False

    def abort_answer(self) -> None:
        """Abort the connection, so that a partial answer cannot pass for a complete one."""
        if self.transport is not None:
            self.transport.abort()

    def open_tunnel(self, connection: UpstreamConnection) -> None:
        """Relay bytes unparsed in both directions from here on."""
        self.tunnel = connection
        early, self._early_tunnel = self._early_tunnel, b""
        if early:
            connection.write_tunnel(early)
        self.pause("upgrade", False)
        if self.writing_paused:
            connection.pause(True)

    def is_closing(self) -> bool:
        """Return True once the connection is closed or closing."""
        return self.transport is None or self.transport.is_closing()

    def send_continue(self) -> None:
        """Send 100 Continue."""
        self.write(wire.CONTINUE)

    def _pause_reading(self) -> None:
        assert self.transport is not None
        self.transport.pause_reading()
        if not self._watching:
            self._watching = True
            self.host.loop.call_later(_WATCH_S, self._watch)

    def _resume_reading(self) -> None:
        assert self.transport is not None
        self.transport.resume_reading()

    def is_disconnected(self) -> bool:
        """Return True if the client has disconnected, even while reading is paused and its last bytes are unread."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return True
        fd = transport.get_extra_info("socket").fileno()
        poller = select.poll()
        poller.register(fd, select.POLLRDHUP)
        return any(event & _GONE for _, event in poller.poll(0))

    def drain(self) -> None:
        """Close now if idle, else after the current answer, because the server is shutting down.

        One that is replaced still serves the first request of a connection: it may be on its way.
        """
        if self.current is None and not self._queue:
            if not self.host.replaced or (self._asked and not self._in_head):
                self.close()
        elif self.current is not None:
            self.current.keep_alive = False

    def close(self) -> None:
        """Close after everything written has been sent. A client that does not answer the end of its TLS is not waited for long."""
        if self.transport is not None:
            if self._scheme == b"https" and not self._linger_until:
                self._linger_until = time.monotonic() + _TLS_END_S
            self.transport.close()

    def sweep(self, now: float) -> None:
        """Enforce the time limits; called about once a second."""
        settings = self.settings
        passed, self._swept = now - (self._swept or now), now
        if self._linger_until:
            if now > self._linger_until:
                self.abort_answer()
        elif self.tunnel is not None:
            if now - max(self.last_in, self.tunnel.last_byte) > settings.tunnel_idle_s:
                self.abort_answer()
        elif self.writing_paused and now - self.last_out > settings.body_timeout_s:
            self.abort_answer()
        elif self._in_head and now - self._head_began > settings.head_timeout_s:
            self._fault(ClientFault("head-timeout", "the request's head took too long", status=408))
        elif self.current is None:
            if not self._in_head and now - self.last_in > settings.keepalive_s:
                self.close()
        else:
            self._sweep_body(self.current, now, passed)

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection, or refuse it when too many clients are connected."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not derive from asyncio.Transport
        self.transport.set_write_buffer_limits(high=self.settings.write_buffer)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0].encode() if isinstance(peer, tuple) else b"unix"
        if transport.get_extra_info("sslcontext") is not None:
            self._scheme = b"https"
        self.host.clients.add(self)
        self.host.handshakes.discard(self)
        if len(self.host.clients) + len(self.host.handshakes) > self.host.max_clients and not self.on_admin_port:
            crowd = Unavailable("too-many-clients", f"{self.host.max_clients} clients are connected already")
            self._fault(crowd)

    def data_received(self, data: bytes) -> None:
        """Parse the data, or relay it through the tunnel."""
        self.last_in = time.monotonic()
        if self.tunnel is not None:
            self.tunnel.write_tunnel(data)
            return
        if self._linger_until:
            self._lingered += len(data)
            if self._lingered > _LINGER_BYTES:
                self.abort_answer()
            return
        if self._stopped:
            if "upgrade" in self._pauses:
                self._early_tunnel += data
            return
        self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._unparsed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._upgraded(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            cause = exc.__context__
            if isinstance(cause, ProxyError):
                self._fault(cause)
            elif not self._stopped:
                self._fault(ClientFault("malformed-request", f"this is not a well-formed HTTP request: {exc}"))
            return
        if self._unparsed > 2 * self.settings.max_head:
            self._fault(ClientFault("head-too-large", "the request's head or trailers are too large", status=431))

    def eof_received(self) -> bool:
        """Treat a half-close as a disconnect: it is the only sign of one."""
        if self.current is not None and self.tunnel is None:
            self.abort_answer()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the current request and drop the queued ones."""
        self.host.forget(self)
        self._stopped = True
        tunnel, self.tunnel = self.tunnel, None
        if tunnel is not None:
            tunnel.finish_tunnel()
        self._cancel()
        self._drop_queue()

    def _watch(self) -> None:
        """Poll the kernel for a disconnect, which cannot be read while reading is paused."""
        self._watching = False
        if self.transport is None or self.transport.is_closing() or not self._pauses:
            return
        if self.is_disconnected():
            self.abort_answer()
            return
        self._watching = True
        self.host.loop.call_later(_WATCH_S, self._watch)

    # -- llhttp callbacks --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._synthetic:
            return
        self._parsing = Request()
        self._parsing.scheme = self._scheme
        self._in_head = True
        self._trailers = 0
        self._head_began = time.monotonic()

    def on_url(self, url: bytes) -> None:
        """Append a part of the target."""
        if not self._synthetic:
            assert self._parsing is not None
            self._parsing.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, or count a trailer once the head is complete."""
        if self._synthetic:
            return
        request = self._parsing
        assert request is not None
        if self._in_head:
            request.headers.append((name.lower(), name, value))
            count = len(request.headers)
        else:
            count = self._trailers = self._trailers + 1  # a request's trailers are dropped (wire.last_chunk)
        if count > self.settings.max_headers:
            raise ClientFault("too-many-headers", f"over {self.settings.max_headers} headers", status=431)

    def on_headers_complete(self) -> None:
        """Validate the complete head, then queue or serve the request."""
        if self._synthetic:
            self._synthetic = False
            return
        request = self._parsing
        assert request is not None
        self._in_head, self._asked = False, True
        self._unparsed = 0
        size = len(request.target) + sum(len(name) + len(value) + 4 for name, _, value in request.headers)
        if size > self.settings.max_head:
            raise ClientFault("head-too-large", f"the head is over {self.settings.max_head} bytes", status=431)
        parser = self._parser
        request.validate(parser.get_method(), parser.get_http_version(), parser.should_keep_alive())
        if parser.should_upgrade() and request.upgrade is None:
            self._ignored_upgrade = True
        if self.host.draining:
            request.keep_alive = False
        if len(self._queue) >= _MAX_PIPELINED:
            raise ClientFault("pipeline", f"over {_MAX_PIPELINED} requests at once on one connection", status=429)
        self._queue.append(request)
        if self.current is not None:
            self.pause("pipeline", True)
        else:
            self._next()

    def on_body(self, data: bytes) -> None:
        """Buffer or relay a part of the body."""
        request = self._parsing
        assert request is not None
        self._unparsed = 0
        self.take_body(request, data)

    def on_message_complete(self) -> None:
        """Finish the request."""
        if self._ignored_upgrade:
            return  # its body, if any, is not parsed yet: see _upgraded
        request = self._parsing
        assert request is not None
        self._parsing = None
        self._unparsed = 0
        if not request.keep_alive or request.upgrade is not None:
            self._stopped = True
        request.finish()

    # -- internals ---------------------------------------------------------------------------------

    def _upgraded(self, rest: bytes) -> None:
        """Handle an Upgrade, at which the parser stops: hold a WebSocket until its 101, ignore any other (RFC 9110 7.8)."""
        if not self._ignored_upgrade:
            self._early_tunnel = rest
            self.pause("upgrade", True)
            return
        self._ignored_upgrade = False
        request = self._parsing
        assert request is not None
        length = b"transfer-encoding: chunked" if request.chunked else b"content-length: %d" % (request.length or 0)
        self._parser = httptools.HttpRequestParser(self)
        self._synthetic = True
        self._feed(_SYNTHETIC % length + rest)

    def _fault(self, error: ProxyError) -> None:
        """Refuse bytes that are malformed or over a limit, in order, and read nothing more."""
        self._stopped = True
        self._in_head = False
        request, self._parsing = self._parsing, None
        if request is not None and (request is self.current or request in self._queue):
            # the head was accepted; the body is at fault
            request.keep_alive = False
            if request is self.current:
                self.interrupt(error)
            else:
                request.fault = error
            return
        request = request or Request()
        request.find_path()
        request.fault = error
        request.keep_alive = False
        if not request.id:
            request.id = wire.new_request_id().encode()
        self._queue.append(request)
        self._next()

    def _next(self) -> None:
        if self.current is not None or not self._queue:
            return
        request = self.current = self._queue.popleft()
        self._body_s = 0.0
        self._task = self.host.loop.create_task(self.host.serve_request(self, request))

    def finished(self, request: Request) -> None:
        """Continue with the next request, or close, after a request was answered."""
        self.host.buffered -= request.buffered
        self.current = None
        self.exchange = None
        self._task = None
        self.running = False
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if not request.complete and self.tunnel is None:
            self._linger()
            return
        if not request.keep_alive:
            if self._stopped and request.fault is None and request.interrupt is None:
                transport.close()
            else:
                self._linger()
            return
        self.pause("body", False)
        self.pause("upstream", False)
        if self._queue:
            self._next()
        if not self._queue:
            self.pause("pipeline", False)

    def _drop_queue(self) -> None:
        for request in self._queue:
            self.host.buffered -= request.buffered
        self._queue.clear()

    def _linger(self) -> None:
        """Close without losing the answer: with unread bytes the kernel would send a reset, and the client would drop the answer."""
        self._stopped = True
        self._drop_queue()
        transport = self.transport
        assert transport is not None
        self._linger_until = time.monotonic() + _LINGER_S
        if transport.can_write_eof():
            transport.write_eof()
        else:  # TLS, which ends with a message of its own and then reads what is left
            transport.close()
        if self._pauses:
            self._pauses.clear()
            transport.resume_reading()
