"""One request that an ASGI server passed on, as a client of the proxy.

The server (uvicorn, hypercorn) parses and frames HTTP. Its messages become a `Request` here, and an answer becomes
messages to it.

Guarantees: an answer's body is passed on byte for byte, in order, part by part as it comes. When the server reports a
disconnect, the task that serves the request is cancelled. While reading the body is paused, at most one more message is
read, so a disconnect is noticed unless more than that of the body is unread. An answer that was cut raises an exception,
so neither the server nor a middleware can mistake a partial answer for a complete one.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from plugin.proxy.errors import ClientFault, ProxyError, Unavailable, UpstreamFault
from plugin.proxy.http import wire
from plugin.proxy.http.client import Client, Host
from plugin.proxy.http.exchange import Exchange
from plugin.proxy.http.request import Request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_LINE_END = re.compile(rb"[\r\n\0]")
_NOT_IN_TARGET = re.compile(rb"[\x00-\x20\x7f]")


class AnswerCut(ConnectionError):
    """The answer broke off after its head was sent; the ASGI server must close the client's connection."""


class AsgiExchange(Exchange):
    """Write an answer as ASGI messages. Informational responses and trailers are dropped: ASGI servers relay neither."""

    __slots__ = ()
    client: AsgiClient

    def put_interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Drop an informational response."""

    def put_head(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Put the head of the answer into `out`."""
        fields = [(lower, value) for lower, _, value in wire.answer_fields(headers, self.request.id)]
        if status in (204, 304):  # a length would announce a body to the server
            fields = [field for field in fields if field[0] != b"content-length"]
        self.out.append({"type": "http.response.start", "status": status, "headers": fields})

    def put_data(self, data: bytes) -> None:
        """Put a part of the body into `out`."""
        self.out.append(data)

    def put_end(self, trailers: list[wire.Field]) -> None:
        """Put the end of the body into `out`."""
        self.out.append(None)

    def write_out(self) -> None:
        """Pass what is in `out` to the client, its parts of the body as one message."""
        parts: list[bytes] = []
        ended = False
        for item in self.out:
            if isinstance(item, bytes):
                parts.append(item)
            elif item is None:
                ended = True
            else:
                self.client.deliver(item)
        self.out.clear()
        body = b"".join(parts)
        self.written += len(body)
        if body or ended:
            self.client.deliver({"type": "http.response.body", "body": body, "more_body": not ended})


class AsgiClient(Client):
    """The client of one ASGI request. `run` serves it."""

    exchange_type = AsgiExchange

    def __init__(self, host: Host, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        super().__init__(host)
        self._scope, self._receive, self._send = scope, receive, send
        peer = scope.get("client")
        self.peer = peer[0].encode() if peer else b"unix"
        self._outbox: deque[Message] = deque()
        self._unsent = 0
        """Bytes of bodies in `_outbox`."""
        self._changed = asyncio.Event()
        """Set when there is something to send, or nothing more will come."""
        self._readable = asyncio.Event()
        self._readable.set()
        self._continued = asyncio.Event()
        self._gone = self._cut = self._over = False

    async def run(self) -> None:
        """Serve the request. Raises AnswerCut when its answer broke off, and what `receive` raised."""
        request = self.current = request_of(self._scope)
        host = self.host
        host.clients.add(self)
        if len(host.clients) > host.max_clients:
            crowd = Unavailable("too-many-clients", f"{host.max_clients} clients are connected already")
            request.fault = request.fault or crowd
        # The body is read first: often it has arrived whole, and a whole request may be sent again.
        reading = host.loop.create_task(self._read(request))
        self._task = host.loop.create_task(host.serve_request(self, request))
        try:
            await self._send_messages()
        finally:
            self._gone = True
            reading.cancel()
            self._cancel()
            read, _ = await asyncio.gather(reading, self._task, return_exceptions=True)
            host.forget(self)
        if isinstance(read, Exception):
            raise read
        if self._cut:
            raise AnswerCut("quickthaw: answer-cut: the answer broke off before its end; the connection is closed")

    async def _read(self, request: Request) -> None:
        try:
            await self._read_body(request)
        except Exception:
            self._disconnected()  # such as a middleware that limits bodies: nothing more can be read
            raise

    async def _read_body(self, request: Request) -> None:
        if request.expect:
            await self._continued.wait()  # the first `receive` makes the server send 100 Continue
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._disconnected()
                return
            if request.complete:
                continue
            await self._readable.wait()
            self.last_in = time.monotonic()
            if body := message.get("body", b""):
                self.take_body(request, body)
            more = message.get("more_body", False)
            # A middleware may change a body. Other bytes than announced would shift the boundary between two requests
            # on the replica's connection.
            expected = request.body_bytes if request.chunked else request.length or 0
            if request.body_bytes > expected or (not more and request.body_bytes < expected):
                text = "the request's body is not as long as its Content-Length says"
                self.interrupt(ClientFault("body-length", text))
                return
            if not more:
                request.finish()

    async def _send_messages(self) -> None:
        try:
            while True:
                while self._outbox:
                    message = self._outbox.popleft()
                    await self._send(message)
                    self._unsent -= len(message.get("body", b""))
                    if self.writing_paused and self._unsent <= self.settings.write_buffer // 2:
                        self.resume_writing()
                if self._over:
                    return
                self._changed.clear()
                await self._changed.wait()
        except OSError:  # ASGI 2.4: the client has disconnected
            self._disconnected()

    def _disconnected(self) -> None:
        self._gone = True
        self._end()
        self._cancel()

    def _end(self) -> None:
        self._over = True
        if self._gone or self._cut:
            self._outbox.clear()
        self._changed.set()

    # -- the proxy's API ---------------------------------------------------------------------------

    def deliver(self, message: Message) -> None:
        """Queue one message for the server; pause the replica while too much is queued."""
        if self._gone or self._cut:
            return
        self._outbox.append(message)
        self._unsent += len(message.get("body", b""))
        if self._unsent > self.settings.write_buffer and not self.writing_paused:
            self.pause_writing()
        self._changed.set()

    def is_closing(self) -> bool:
        """Return True once the client has disconnected."""
        return self._gone

    def is_disconnected(self) -> bool:
        """Return True once the server has reported a disconnect."""
        return self._gone

    def respond(
        self, request: Request, status: int, headers: list[tuple[bytes, bytes]], body: bytes, *, close: bool = False
    ) -> None:
        """Send a response made by the proxy itself. Whether the connection stays open is up to the server."""
        fields = [*headers, (b"content-length", b"%d" % len(body)), (b"x-request-id", request.id)]
        self.deliver({"type": "http.response.start", "status": status, "headers": fields})
        self.deliver({"type": "http.response.body", "body": b"" if request.method == b"HEAD" else body})

    def send_continue(self) -> None:
        """Begin to read the body, at which the server sends 100 Continue."""
        self._continued.set()

    def abort_answer(self) -> None:
        """Drop the rest of the answer, after which `run` raises; an answer that has not begun becomes a 502."""
        if self.running and self.exchange is not None and not self.exchange.head_sent:
            self.interrupt(UpstreamFault("answer-cut", "the proxy has ended this request before its answer came"))
            return
        self._cut = True
        self._end()

    def drain(self) -> None:
        """Do nothing: the server takes no further request from this client."""

    def sweep(self, now: float) -> None:
        """Enforce the time limits on bodies; those on heads and idle connections are the server's."""
        passed_s, self._swept = now - (self._swept or now), now
        if self.writing_paused and now - self.last_out > self.settings.body_timeout_s:
            self.abort_answer()
        elif self.current is not None:
            self._sweep_body(self.current, now, passed_s)

    def finished(self, request: Request) -> None:
        """End once all messages are sent."""
        self.host.buffered -= request.buffered
        self.current = self.exchange = None
        self.running = False
        self._end()

    def _pause_reading(self) -> None:
        self._readable.clear()

    def _resume_reading(self) -> None:
        self._readable.set()


def request_of(scope: MutableMapping[str, Any]) -> Request:
    """Return the validated request of an ASGI scope. A head that must be refused has its error in `Request.fault`."""
    request = Request()
    request.headers = [(name, name, value) for name, value in scope["headers"]]
    request.target = target_of(scope)
    request.mount = quote(scope.get("root_path", "").rstrip("/")).encode()
    request.scheme = b"https" if scope.get("scheme") in ("https", "wss") else b"http"
    http1 = scope.get("http_version", "1.1").startswith("1.")
    try:
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if len(lengths) > 1 or not all(value.isdigit() for value in lengths):
            raise ClientFault("malformed-request", "the Content-Length is not one number")
        if any(_LINE_END.search(name) or _LINE_END.search(value) for name, value in scope["headers"]):
            raise ClientFault("malformed-request", "a header holds a line break")
        if _NOT_IN_TARGET.search(request.target):
            raise ClientFault("target", "the request target holds a space or a control character")
        request.validate(scope["method"].encode(), scope["http_version"] if http1 else "1.1", True)
        if request.upgrade is not None:
            raise websocket_fault()
        if not http1 and request.length is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            request.chunked = True  # HTTP/2 and 3 announce no length
    except ProxyError as error:
        request.fault = error
        request.find_path()
        request.id = request.id or wire.new_request_id().encode()
    return request


def websocket_fault() -> ClientFault:
    """Return the error for a WebSocket: ASGI delivers messages, but the proxy could only relay bytes."""
    text = (
        "WebSockets are not forwarded by the ASGI application; use the port of `quickthaw launch` or `quickthaw proxy`"
    )
    return ClientFault("websocket-unsupported", text, status=501)


def target_of(scope: MutableMapping[str, Any]) -> bytes:
    """Return the request target as it was sent, without the path under which the application is mounted."""
    root = scope.get("root_path", "").rstrip("/")
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    path = raw
    if root and scope["path"].startswith(root):
        # `root` is decoded, `raw` is not: find the slash at which what comes before decodes to it.
        ends = [at for at, byte in enumerate(raw) if byte == 0x2F and at] + [len(raw)]
        cut = next((at for at in ends if unquote_to_bytes(raw[:at]) == root.encode()), None)
        path = quote(scope["path"][len(root) :]).encode() if cut is None else raw[cut:]
    query: bytes = scope.get("query_string", b"")
    return (path or b"/") + (b"?" + query if query else b"")
