"""One request and its answer: receive what a replica sends and write it to the client in the same call.

Guarantees: nothing is written before the replica's status line, unless the stream was started early. Once anything was
written, the rest comes from the same replica or the answer is cut. A cut answer closes the client's connection, so it
cannot pass for complete.

A speculative request's answer is withheld until its replica's check has passed. A `cautious` answer, whose request may
have to be retried, is withheld until its body has begun (a stream) or is complete (an answer of known length).
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http import wire

if TYPE_CHECKING:
    from plugin.proxy.http.request import Request
    from plugin.proxy.http.sinks import ClientSink, EarlySink
    from plugin.proxy.http.upstream_connection import BackConnection

# Bytes of a withheld answer above which its replica is not read any further.
_WITHHELD_BYTES = 1 << 20


class Exchange:
    """The state of one request in progress (implements `upstream_connection.Answer`)."""

    __slots__ = (
        "answered",
        "back",
        "cautious",
        "chunked",
        "client",
        "close_after",
        "done",
        "early",
        "first_byte",
        "head_sent",
        "held_s",
        "kept",
        "out",
        "outcome",
        "pool_name",
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
        self.back: BackConnection | None = None
        self.early: EarlySink | None = None
        self.out: list[bytes] = []
        self.kept = 0  # body bytes in `out`
        self.head_sent = False
        self.chunked = False
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

    def interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        """Relay an informational response, if the client speaks HTTP/1.1."""
        if self.request.http11 and self.early is None:
            head = wire.response_head(status, phrase, headers, request_id=self.request.id, chunked=False, close=False)
            self.out.append(head)

    def head(self, status: int, phrase: bytes, headers: list[wire.Field], length_known: bool) -> None:
        """Write the replica's head with framing of the proxy's own."""
        self.status = status
        self.first_byte = time.monotonic()
        if self.early is not None:
            self.early.head(status, headers)
            return
        request = self.request
        self.chunked = not length_known and request.http11
        if not request.http11:
            self.close_after = True
        self.head_sent = not (self.withheld or self.cautious)
        self.out.append(
            wire.response_head(
                status,
                phrase or wire.reason(status),
                headers,
                request_id=request.id,
                chunked=self.chunked,
                close=self.close_after,
            )
        )

    def data(self, data: bytes) -> None:
        """Relay a part of the body."""
        self.answered = True
        self.kept += len(data)
        if self.early is not None:
            self.early.data(data)
        elif self.chunked:
            self.out.append(wire.chunk(data))
        else:
            self.out.append(data)
        if self.cautious and self._begun():
            self._commit()

    def _begun(self) -> bool:
        """Return True if enough of the body has arrived that relaying it is better than keeping the option to retry."""
        return self.answered and (self.chunked or self.kept > _WITHHELD_BYTES)

    def _commit(self) -> None:
        """Stop being cautious: what has arrived goes to the client."""
        self.cautious, self.head_sent = False, not self.withheld

    def flush(self) -> None:
        """Write what one read of the replica's socket brought."""
        out = self.out
        if self.withheld:
            if self.back is not None and self.kept > _WITHHELD_BYTES:
                self.back.pause(True)
        elif out and not self.cautious:
            data = out[0] if len(out) == 1 else b"".join(out)
            out.clear()
            self.kept = 0
            self.written += len(data)
            self.client.write(data)

    def let_go(self, cautious: bool = False) -> None:
        """Stop withholding the answer and write it; if `cautious`, only what may be written. Afterwards relay as usual."""
        self.withheld = False
        self.cautious = cautious and not self._begun() and not self.done.done()
        if self.status and not self.cautious:
            self.head_sent, self.first_byte = True, time.monotonic()
        self.flush()
        if self.back is not None and not self.client.writing_paused:
            self.back.pause(False)

    def forget(self) -> None:
        """Drop a withheld answer. Nothing of it was written, so another replica may answer."""
        if self.back is not None:
            self.back.abort()
            self.back = None
        if self.done.done():
            self.done.exception()  # mark as retrieved: a replica that fails its check breaks its connections
        self.done = self.done.get_loop().create_future()
        self.out.clear()
        self.kept = 0
        self.withheld = self.cautious = self.chunked = self.answered = False
        self.status, self.first_byte, self.replica_name = 0, 0.0, ""

    def end(self, trailers: list[wire.Field]) -> None:
        """Complete the answer."""
        if self.cautious:
            self._commit()
        if self.early is not None:
            self.early.end()
        elif self.chunked:
            self.out.append(wire.last_chunk(trailers))
        self.flush()
        if not self.done.done():
            self.done.set_result(None)

    def fault(self, error: UpstreamFault) -> None:
        """Report a failed replica: an error response if nothing was written, else the end of the connection."""
        self.flush()
        if not self.done.done():
            self.done.set_exception(error)

    def switched(self, phrase: bytes, headers: list[wire.Field], rest: bytes) -> None:
        """Answer 101 after the replica accepted the upgrade, and connect the two sockets."""
        self.status = 101
        self.first_byte = time.monotonic()
        self.head_sent = self.tunnel = self.close_after = True
        head = wire.response_head(
            101, phrase, headers, request_id=self.request.id, chunked=False, close=False, upgrade=self.request.upgrade
        )
        self.client.write(head + rest)
        assert self.back is not None
        self.client.open_tunnel(self.back)

    def tunnel_data(self, data: bytes) -> None:
        """Relay tunnel bytes to the client."""
        self.written += len(data)
        self.client.write(data)

    def tunnel_closed(self) -> None:
        """End the tunnel after the replica closed it; the client's side closes once it is flushed."""
        self.client.tunnel = None
        if not self.done.done():
            self.done.set_result(None)

    def hold_client(self, on: bool) -> None:
        """Pause or resume the client, as the replica's socket fills or drains."""
        self.client.hold("upstream", on)
