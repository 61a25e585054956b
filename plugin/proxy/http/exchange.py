"""One request and its answer: receive what a replica sends and write it to the client in the same call.

`Exchange` decides what is written and when; a subclass decides how: `WireExchange` as HTTP/1.1, `asgi_client.AsgiExchange`
as ASGI messages.

Guarantees: nothing is written before the replica's status line, unless the stream was started early. Once anything was
written, the rest comes from the same replica or the answer is cut. A cut answer closes the client's connection, so it
cannot pass for complete.

A speculative request's answer is withheld until its replica's check has passed. A `cautious` answer, whose request may
have to be sent again (`plugin.proxy.retry_rules`), is withheld until its body has begun (a stream) or is complete (an
answer of known length).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http import wire

if TYPE_CHECKING:
    from plugin.proxy.http.request import Request
    from plugin.proxy.http.sinks import ClientSink, EarlySink, WireSink
    from plugin.proxy.http.upstream_connection import UpstreamConnection
    from plugin.proxy.probes import Probe


# Bytes of a withheld answer above which its replica is not read any further.
_WITHHELD_BYTES = 1 << 20


class Exchange:
    """The state of one request in progress (implements `upstream_connection.Answer`)."""

    __slots__ = (
        "answered",
        "cautious",
        "client",
        "close_after",
        "connection",
        "done",
        "early",
        "first_byte",
        "head_sent",
        "held_s",
        "kept",
        "length_known",
        "out",
        "outcome",
        "pool_name",
        "probe",
        "replica_name",
        "request",
        "status",
        "tunnel",
        "upstream_limit_s",
        "withheld",
        "written",
    )

    def __init__(self, client: ClientSink, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self.request = client, request
        self.done: asyncio.Future[None] = loop.create_future()
        self.connection: UpstreamConnection | None = None
        self.early: EarlySink | None = None
        self.probe: Probe | None = None
        """Set if the request does not count as use; its answer may be kept."""
        self.out: list[Any] = []  # what the subclass has put together and `flush` has yet to write
        self.kept = 0  # body bytes in `out`
        self.head_sent = False
        self.length_known = True
        self.close_after = not request.keep_alive or request.upgrade is not None
        self.tunnel = False
        self.withheld = self.cautious = False
        self.upstream_limit_s = math.inf
        self.status = 0
        self.answered = False  # True once a part of the body has arrived
        self.first_byte = 0.0
        self.held_s = 0.0
        self.written = 0
        self.outcome = ""
        self.pool_name = self.replica_name = ""

    # -- how an answer is written, by the subclass -------------------------------------------------

    def put_interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Put an informational response into `out`."""
        raise NotImplementedError

    def put_head(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Put the head of the answer into `out`."""
        raise NotImplementedError

    def put_data(self, data: bytes) -> None:
        """Put a part of the body into `out`."""
        raise NotImplementedError

    def put_end(self, trailers: list[wire.Field]) -> None:
        """Put the end of the body into `out`."""
        raise NotImplementedError

    def write_out(self) -> None:
        """Write what is in `out`, and count it in `written`."""
        raise NotImplementedError

    # -- what a replica sends (`upstream_connection.Answer`) ---------------------------------------

    def interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Relay an informational response, if the client speaks HTTP/1.1."""
        if self.request.http11 and self.early is None:
            self.put_interim(status, phrase, headers)

    def head(self, status: int, phrase: bytes, headers: list[wire.Field], length_known: bool) -> None:
        """Write the replica's head with framing of the proxy's own."""
        self.status = status
        self.first_byte = time.monotonic()
        if self.probe is not None:
            self.probe.head(status, headers)
        if self.early is not None:
            self.early.head(status, headers)
            return
        self.length_known = length_known
        if not self.request.http11:
            self.close_after = True
        self.head_sent = not (self.withheld or self.cautious)
        self.put_head(status, phrase or wire.reason(status), headers)

    def data(self, data: bytes) -> None:
        """Relay a part of the body."""
        self.answered = True
        self.kept += len(data)
        if self.probe is not None:
            self.probe.data(data)
        if self.early is not None:
            self.early.data(data)
        else:
            self.put_data(data)
        if self.cautious and self._begun():
            self._commit()

    def _begun(self) -> bool:
        """Return True if enough of the body has arrived that relaying it is better than keeping the option to retry."""
        return self.answered and (not self.length_known or self.kept > _WITHHELD_BYTES)

    def _commit(self) -> None:
        """Stop being cautious: what has arrived goes to the client."""
        self.cautious, self.head_sent = False, not self.withheld

    def flush(self) -> None:
        """Write what one read of the replica's socket brought."""
        if self.withheld:
            if self.connection is not None and self.kept > _WITHHELD_BYTES:
                self.connection.pause(True)
        elif self.out and not self.cautious:
            self.kept = 0
            self.write_out()

    def release(self, cautious: bool = False) -> None:
        """Stop withholding the answer and write it; if `cautious`, only what may be written. Afterwards relay as usual."""
        self.withheld = False
        self.cautious = cautious and not self._begun() and not self.done.done()
        if self.status and not self.cautious:
            self.head_sent, self.first_byte = True, time.monotonic()
        self.flush()
        if self.connection is not None and not self.client.writing_paused:
            self.connection.pause(False)

    def forget(self) -> None:
        """Drop a withheld answer. Nothing of it was written, so another replica may answer."""
        if self.connection is not None:
            self.connection.abort()
            self.connection = None
        if self.done.done():
            self.done.exception()  # mark as retrieved: a replica that fails its check breaks its connections
        self.done = self.done.get_loop().create_future()
        self.out.clear()
        self.kept = 0
        self.withheld = self.cautious = self.answered = False
        self.length_known = True
        self.status, self.first_byte, self.replica_name = 0, 0.0, ""

    def end(self, trailers: list[wire.Field]) -> None:
        """Complete the answer."""
        if self.probe is not None:
            self.probe.end()
        if self.cautious:
            self._commit()
        if self.early is not None:
            self.early.end()
        else:
            self.put_end(trailers)
        self.flush()
        if not self.done.done():
            self.done.set_result(None)

    def fault(self, error: UpstreamFault) -> None:
        """Report a failed replica: an error response if nothing was written, else the end of the connection."""
        self.flush()
        if not self.done.done():
            self.done.set_exception(error)

    def switched(self, phrase: bytes, headers: list[wire.Field], rest: bytes) -> None:
        """Turn the connection into a tunnel. Only `WireExchange` forwards an upgrade."""
        raise NotImplementedError

    def tunnel_data(self, data: bytes) -> None:
        """Relay tunnel bytes to the client."""
        raise NotImplementedError

    def tunnel_closed(self) -> None:
        """End the tunnel after the replica closed it."""
        raise NotImplementedError

    def pause_client(self, on: bool) -> None:
        """Pause or resume the client, as the replica's socket fills or drains."""
        self.client.pause("upstream", on)


class WireExchange(Exchange):
    """Write an answer as HTTP/1.1, with framing of the proxy's own."""

    __slots__ = ("chunked",)
    client: WireSink

    def __init__(self, client: ClientSink, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(client, request, loop)
        self.chunked = False

    def put_interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Put an informational response into `out`."""
        head = wire.response_head(status, phrase, headers, request_id=self.request.id, chunked=False, close=False)
        self.out.append(head)

    def put_head(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Put the head of the answer into `out`."""
        self.chunked = not self.length_known and self.request.http11
        head = wire.response_head(
            status, phrase, headers, request_id=self.request.id, chunked=self.chunked, close=self.close_after
        )
        self.out.append(head)

    def put_data(self, data: bytes) -> None:
        """Put a part of the body into `out`."""
        self.out.append(wire.chunk(data) if self.chunked else data)

    def put_end(self, trailers: list[wire.Field]) -> None:
        """Put the end of a chunked body into `out`; any other ends by its length, or with the connection."""
        if self.chunked:
            self.out.append(wire.last_chunk(trailers))

    def write_out(self) -> None:
        """Write what is in `out` in one call."""
        out = self.out
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        self.written += len(data)
        self.client.write(data)

    def switched(self, phrase: bytes, headers: list[wire.Field], rest: bytes) -> None:
        """Answer 101 after the replica accepted the upgrade, and connect the two sockets."""
        self.status = 101
        self.first_byte = time.monotonic()
        self.head_sent = self.tunnel = self.close_after = True
        head = wire.response_head(
            101, phrase, headers, request_id=self.request.id, chunked=False, close=False, upgrade=self.request.upgrade
        )
        self.client.write(head + rest)
        assert self.connection is not None
        self.client.open_tunnel(self.connection)

    def tunnel_data(self, data: bytes) -> None:
        """Relay tunnel bytes to the client."""
        self.written += len(data)
        self.client.write(data)

    def tunnel_closed(self) -> None:
        """End the tunnel after the replica closed it; the client's side closes once it is flushed."""
        self.client.tunnel = None
        if not self.done.done():
            self.done.set_result(None)
