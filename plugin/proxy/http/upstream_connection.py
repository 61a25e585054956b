"""One connection to a replica: write a request, read its answer, relay each part in the call that received it.

Guarantees: a request is written at most once, and only to a connection that was open at that moment. The answer's body
is relayed byte for byte in order and never collected. Pausing the client pauses the replica. Framing is decoded by
llhttp and encoded again, so nothing that a replica sends can shift the boundary between two answers.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http import wire
from plugin.proxy.http.address import Upstream, start_at

if TYPE_CHECKING:
    from plugin.proxy.http.request import Request

_MAX_HEAD = 256 << 10


class Owner(Protocol):
    """The owner of the connections (a `pool.replica.Replica`): its address and its idle connections."""

    name: str
    upstream: Upstream | None
    idle: list[UpstreamConnection]
    last_byte: float
    """When it last sent anything (monotonic seconds)."""


class Answer(Protocol):
    """Receiver of a replica's answer (an `exchange.Exchange`). All calls come from the loop; none may block."""

    request: Request

    def interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Receive an informational response (1xx other than 100 and 101)."""

    def head(self, status: int, phrase: bytes, headers: list[wire.Field], length_known: bool) -> None:
        """Receive the head of the answer."""

    def data(self, data: bytes) -> None:
        """Receive a part of the body."""

    def flush(self) -> None:
        """Write what one read of the socket brought."""

    def end(self, trailers: list[wire.Field]) -> None:
        """Complete the answer."""

    def fault(self, error: UpstreamFault) -> None:
        """Report that the replica failed during the request."""

    def switched(self, phrase: bytes, headers: list[wire.Field], rest: bytes) -> None:
        """Turn the connection into a tunnel after 101; `rest` is its first data."""

    def tunnel_data(self, data: bytes) -> None:
        """Receive tunnel bytes."""

    def tunnel_closed(self) -> None:
        """Report that the replica closed the tunnel."""

    def pause_client(self, on: bool) -> None:
        """Pause or resume reading the client, as the replica's socket fills or drains."""


class UpstreamConnection(asyncio.Protocol):
    """One connection to one replica: one request at a time, reusable while both sides keep it open."""

    def __init__(self, replica: Owner, sock: socket.socket) -> None:
        self.replica, self.sock = replica, sock
        self.transport: asyncio.Transport | None = None
        self.idle_since = 0.0
        self.last_byte = time.monotonic()
        self.reading_paused = False
        self.answer: Answer | None = None
        self.head_written = False
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[wire.Field] = []
        self._trailers: list[wire.Field] = []
        self._phrase = b""
        self._in_head = False
        self._head_bytes = 0
        self._head_done = False
        self._until_close = False
        self._keep = False
        self._chunked_request = False
        self._request_done = False
        self._bodyless = False
        self._tunnel = False
        self._got_bytes = False

    # -- the exchange's API ------------------------------------------------------------------------

    def alive(self) -> bool:
        """Return True if the connection is open. Asks the kernel, because a close may not have reached the loop yet."""
        if self.transport is None or self.transport.is_closing():
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            return False
        return False

    def begin(self, answer: Answer, head: bytes, *, chunked: bool) -> None:
        """Write the request's head and the available part of its body; `send_body` sends the rest."""
        assert self.transport is not None
        request = answer.request
        self.answer = answer
        self._headers, self._trailers, self._phrase = [], [], b""
        self._in_head = self._head_done = self._until_close = self._keep = self._request_done = False
        self._head_bytes = 0
        self._got_bytes = False
        self._chunked_request = chunked
        self._bodyless = request.method == b"HEAD"
        self.last_byte = time.monotonic()
        body = request.take_body()
        if body:
            head += wire.chunk(body) if chunked else body
        request.sink = self
        if request.complete:
            self._request_done = True
            if chunked:
                head += wire.LAST_CHUNK
        self.head_written = True
        self.transport.write(head)

    def send_body(self, data: bytes) -> None:
        """Send another part of the request's body."""
        if self.transport is not None and not self.transport.is_closing():
            self.last_byte = time.monotonic()
            self.transport.write(wire.chunk(data) if self._chunked_request else data)

    def end_body(self) -> None:
        """Complete the request's body."""
        self._request_done = True
        if self._chunked_request and self.transport is not None and not self.transport.is_closing():
            self.transport.write(wire.LAST_CHUNK)

    def pause(self, on: bool) -> None:
        """Pause or resume reading the replica, as the client's socket fills or drains."""
        if self.transport is None or self.transport.is_closing() or on == self.reading_paused:
            return
        self.reading_paused = on
        if on:
            self.transport.pause_reading()
        else:
            self.last_byte = time.monotonic()
            self.transport.resume_reading()

    def write_tunnel(self, data: bytes) -> None:
        """Send bytes from the client through the tunnel."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def finish_tunnel(self) -> None:
        """Flush and close, after the client closed its side of the tunnel."""
        self.answer = None
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once, which cancels the request in the replica."""
        self.answer = None
        if self.transport is not None:
            self.transport.abort()

    # -- asyncio.Protocol --------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not derive from asyncio.Transport

    def data_received(self, data: bytes) -> None:
        """Parse the data, or relay it through the tunnel."""
        answer = self.answer
        if answer is None:
            self.abort()  # unsolicited data: do not trust this replica's connection with the next request
            return
        self.last_byte = self.replica.last_byte = time.monotonic()
        if self._tunnel:
            answer.tunnel_data(data)
            return
        self._got_bytes = True
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            if self._switched():
                answer.switched(self._phrase, self._headers, data[exc.args[0] :])
            elif self.answer is not None:
                self._failed("upstream-garbage", "the replica switched protocols unasked")
            return
        except httptools.HttpParserError as exc:
            if self.answer is not None:
                answer.flush()
                self._failed("upstream-garbage", f"the replica's answer is not HTTP: {exc or type(exc).__name__}")
            else:
                self.abort()
            return
        if not self._head_done and self._head_bytes > _MAX_HEAD:
            self._failed("upstream-head", f"the head of the replica's answer is over {_MAX_HEAD} bytes")
            return
        answer.flush()

    def eof_received(self) -> bool:
        """Return False: close when the replica closes its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer, or fail it when it is incomplete."""
        answer, self.answer = self.answer, None
        if self in self.replica.idle:
            self.replica.idle.remove(self)
        if answer is None:
            return
        if self._tunnel:
            answer.tunnel_closed()
        elif self._head_done and self._until_close and exc is None:
            answer.end([])
        elif self._head_done:
            answer.fault(UpstreamFault("upstream-cut", "the replica closed the connection in the middle of its answer"))
        elif self._got_bytes:
            answer.fault(
                UpstreamFault("upstream-cut", "the replica closed the connection inside the head of its answer")
            )
        else:
            what = "reset" if isinstance(exc, ConnectionError) else "closed"
            answer.fault(UpstreamFault("upstream-closed", f"the replica {what} the connection without an answer"))

    def pause_writing(self) -> None:
        """Pause the client, because the replica's socket is full."""
        if self.answer is not None:
            self.answer.pause_client(True)

    def resume_writing(self) -> None:
        """Resume the client."""
        if self.answer is not None:
            self.answer.pause_client(False)

    # -- llhttp callbacks --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a head. Raises ValueError for a head after the answer: it answers no request."""
        if self.answer is None:
            raise ValueError("an answer to no request")
        self._headers, self._phrase, self._in_head = [], b"", True

    def on_status(self, phrase: bytes) -> None:
        """Append a part of the reason phrase."""
        self._phrase += phrase

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, or a trailer once the head is complete."""
        field = (name.lower(), name, value)
        (self._headers if self._in_head else self._trailers).append(field)

    def on_headers_complete(self) -> None:
        """Determine from the complete head how the body ends."""
        self._in_head = False
        answer = self.answer
        assert answer is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            if status == 101 and answer.request.upgrade is not None:
                self._tunnel = True
            elif status not in (100, 101):
                answer.interim(status, self._phrase, self._headers)
            return
        if not 200 <= status <= 999:
            raise ValueError(f"status {status}")
        self._head_done = True
        length = chunked = False
        for lower, _, value in self._headers:
            if lower == b"content-length":
                length = True
            elif lower == b"transfer-encoding":
                if value.strip().lower() != b"chunked":
                    raise ValueError("a transfer coding that was not offered")
                chunked = True
        self._bodyless = self._bodyless or status in (204, 304)
        self._until_close = not (length or chunked or self._bodyless)
        self._keep = not self._until_close and self._parser.should_keep_alive() and answer.request.method != b"HEAD"
        answer.head(status, self._phrase, self._headers, length or self._bodyless)
        if answer.request.method == b"HEAD":
            # llhttp cannot know that the answer to HEAD has no body, so this connection is not reused.
            self._complete()

    def on_body(self, data: bytes) -> None:
        """Relay a part of the body."""
        if self.answer is not None:
            self.answer.data(data)

    def on_message_complete(self) -> None:
        """Complete the answer."""
        if self._head_done and self.answer is not None:
            self._complete()

    def _switched(self) -> bool:
        return self._tunnel  # a method, since parser callbacks change it without the type checker's knowledge

    def _complete(self) -> None:
        answer, self.answer = self.answer, None
        assert answer is not None
        answer.end(self._trailers)
        if self._keep and self._request_done and not self.reading_paused:
            self.idle_since = time.monotonic()
            self.replica.idle.append(self)
        elif self.transport is not None:
            self.transport.abort()

    def _failed(self, code: str, message: str) -> None:
        answer, self.answer = self.answer, None
        if self.transport is not None:
            self.transport.abort()
        if answer is not None:
            answer.fault(UpstreamFault(code, message))


async def connect(replica: Owner, limit_s: float) -> UpstreamConnection:
    """Return a new connection to `replica`.

    Raises OSError when refused, unreachable, or not accepted within `limit_s` seconds (TimeoutError is an OSError).
    """
    upstream = replica.upstream
    if upstream is None:
        raise ConnectionRefusedError(f"{replica.name} has no address yet")
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(limit_s):
            if upstream.name_to_resolve is None:
                sock = upstream.connect()
                await _established(loop, sock)
            else:
                sock = await _resolved(loop, *upstream.name_to_resolve)
            connection = UpstreamConnection(replica, sock)
            if sock.family == socket.AF_UNIX:
                await loop.create_unix_connection(lambda: connection, sock=sock)
            elif upstream.tls is not None:
                await loop.create_connection(
                    lambda: connection, sock=sock, ssl=upstream.tls, server_hostname=upstream.server_hostname
                )
            else:
                await loop.create_connection(lambda: connection, sock=sock)
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return connection


async def _resolved(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """Return a socket connected to the first address of `host` that accepts."""
    fault: OSError = OSError(errno.EHOSTUNREACH, f"{host} has no address")
    for family, _, _, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock: socket.socket | None = None
        try:
            sock = start_at(family, address)
            await _established(loop, sock)
        except OSError as exc:
            fault = exc
            if sock is not None:
                sock.close()
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        else:
            return sock
    raise fault


async def _established(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    writable: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()

    def now_writable() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(fd, now_writable)
    try:
        await writable
    finally:
        loop.remove_writer(fd)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
