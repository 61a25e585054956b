"""Answer a stream before its replica is up: the head at once, then comments with the start's progress, then the real events.

Only for requests that ask for a stream, and only while they are held. After the head the status cannot change: an
answer that is no stream, or an error, becomes an error event in the shape that the SDK of that path expects.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from plugin.proxy.errors import ProxyError, UpstreamFault, document, speaks_anthropic

if TYPE_CHECKING:
    import asyncio

    from plugin.proxy.http import wire
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.exchange import Exchange
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.settings import Settings

_MAX_ERROR_BODY = 64 << 10


def wants_stream(request: Request) -> bool:
    """Return True if the complete JSON body asks for a stream at its top level."""
    if not request.complete or not request.http11 or request.method != b"POST":
        return False
    coding = [value for lower, _, value in request.headers if lower == b"content-encoding"]
    body = bytes(request.body)
    if coding or b"stream" not in body:
        return False
    try:
        document_ = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(document_, dict) and document_.get("stream") is True


class EarlyStream:
    """An answer that begins before its replica is up."""

    def __init__(self, exchange: Exchange, pool: ReplicaPool, every_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """Send the head at once, and from then on a comment every `every_s` seconds."""
        self.exchange, self.pool, self.every_s, self.loop = exchange, pool, every_s, loop
        self.answered = False
        """True once the stream carries the replica's own events, or has ended with an error event."""
        self._passing = False
        self._status = 0
        self._body = b""
        headers = [(b"content-type",) * 2 + (b"text/event-stream; charset=utf-8",)]
        headers.append((b"cache-control",) * 2 + (b"no-cache",))
        exchange.length_known = False
        exchange.put_head(200, b"OK", headers)
        exchange.flush()
        exchange.head_sent = True
        self._timer = loop.call_later(0, self._comment)

    def _comment(self) -> None:
        started = self.exchange.connection is not None
        text = ": waiting for the first event\n\n" if started else f": {self.pool.progress().sentence()}\n\n"
        self.exchange.put_data(text.encode())
        self.exchange.flush()
        self._timer = self.loop.call_later(self.every_s, self._comment)

    def head(self, status: int, headers: list[wire.Field]) -> None:
        """Receive the replica's head: relay its events from here on, or turn its error into an event. Comments continue until then."""
        self._status = status
        kind = b"".join(value for lower, _, value in headers if lower == b"content-type").lower()
        self._passing = status == 200 and kind.startswith(b"text/event-stream")

    def data(self, data: bytes) -> None:
        """Receive a part of the replica's body."""
        if self._passing:
            self._timer.cancel()
            self.answered = True
            self.exchange.put_data(data)
        elif len(self._body) < _MAX_ERROR_BODY:
            self._body += data

    def end(self) -> None:
        """Complete the answer."""
        self._timer.cancel()
        if self._passing:
            self.answered = True
            self.exchange.put_end([])
            return
        text = self._body.decode("utf-8", "replace").strip()
        try:
            inner = json.loads(text)
        except (ValueError, RecursionError):
            inner = None
        if not isinstance(inner, dict) or "error" not in inner:
            message = f"the replica answered {self._status} instead of a stream: {text[:500]}"
            inner = document(
                UpstreamFault("not-a-stream", message), self.exchange.request.path, self.exchange.request.id.decode()
            )
        self._event(inner)

    def error(self, error: ProxyError) -> None:
        """End the stream with an error event."""
        self._event(document(error, self.exchange.request.path, self.exchange.request.id.decode()))

    def _event(self, body: dict[str, object]) -> None:
        self._timer.cancel()
        self.answered = True
        name = b"event: error\n" if speaks_anthropic(self.exchange.request.path) else b""
        data = name + b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
        self.exchange.put_data(data)
        self.exchange.put_end([])
        self.exchange.flush()

    def close(self) -> None:
        """Stop the comments."""
        self._timer.cancel()


async def begin_early(
    client: Client, request: Request, exchange: Exchange, pool: ReplicaPool, settings: Settings
) -> None:
    """Start the stream early if the request asks for one. The wake starts at once; the body (up to a limit) is awaited first."""
    pool.begin_wake()
    if await client.wait_body(request, settings.early_body_buffer) and wants_stream(request):
        exchange.early = EarlyStream(exchange, pool, settings.early_comment_every_s, client.host.loop)
