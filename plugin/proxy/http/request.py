"""One request as `downstream` read it: its validated head, and its body on the way from the client to a replica.

Only `Request.validate` refuses a head. A body is buffered (up to the limit that pauses the client) until a sink takes it.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from typing import Protocol

from plugin.proxy.errors import ClientFault, ProxyError
from plugin.proxy.http import path_rules, wire

_SECONDS = re.compile(rb"[0-9]{1,5}(\.[0-9]{1,9})?")
_TOKEN_METHODS_REFUSED = (b"CONNECT", b"TRACE", b"PRI")


def _path(target: bytes) -> str:
    return target.partition(b"?")[0].decode("ascii", "replace")


class Sink(Protocol):
    """The destination of a body, once a replica was chosen."""

    def send_body(self, data: bytes) -> None:
        """Send a part of the body."""

    def end_body(self) -> None:
        """Complete the body."""


class Request:
    """A parsed request head with its streaming body."""

    __slots__ = (
        "arrived",
        "body",
        "body_bytes",
        "buffered",
        "chunked",
        "complete",
        "drop",
        "enough",
        "expect",
        "fault",
        "headers",
        "hold_s",
        "host",
        "http11",
        "id",
        "interrupt",
        "keep_alive",
        "length",
        "method",
        "mount",
        "path",
        "scheme",
        "sink",
        "target",
        "upgrade",
    )

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.method = b""
        self.target = b""
        self.path = ""
        self.mount = b""
        """The path under which an ASGI gateway has mounted the proxy; `target` and `path` begin below it."""
        self.scheme = b"http"
        self.headers: list[wire.Field] = []
        self.host = b""
        self.http11 = True
        self.keep_alive = True
        self.chunked = False
        self.length: int | None = None
        self.expect = False
        self.upgrade: bytes | None = None
        self.drop = wire.REQUEST_DROP
        self.id = b""
        self.hold_s = math.inf
        """Maximum seconds that the client wants to be held."""
        self.body = bytearray()
        self.buffered = 0
        self.body_bytes = 0
        self.complete = False
        self.enough: asyncio.Future[None] | None = None
        """Set when the server needs the body first; done once the body is complete or over the buffer limit."""
        self.sink: Sink | None = None
        self.fault: ProxyError | None = None
        """Why the request is refused before anything else."""
        self.interrupt: ProxyError | None = None
        """Why the serving task was cancelled, unless the client disconnected."""

    def validate(self, method: bytes, version: str, keep_alive: bool) -> None:
        """Validate the head and extract what the proxy needs. Raises ClientFault for a head that a strict server refuses."""
        self.method = method
        self.http11 = version == "1.1"
        self.keep_alive = keep_alive and self.http11
        if version not in ("1.1", "1.0"):
            raise ClientFault("http-version", f"HTTP/{version} is not supported", status=505)
        if method in _TOKEN_METHODS_REFUSED:
            raise ClientFault("method-not-allowed", f"{method.decode('ascii', 'replace')} is not forwarded", status=405)
        hosts = 0
        connection: list[bytes] = []
        upgrade = b""
        for lower, _, value in self.headers:
            if lower == b"host":
                hosts += 1
                self.host = value
            elif lower == b"content-length":
                self.length = int(value)
            elif lower == b"transfer-encoding":
                if value.lower() != b"chunked" or not self.http11 or self.chunked:
                    raise ClientFault("transfer-encoding", "only Transfer-Encoding: chunked, on HTTP/1.1", status=501)
                self.chunked = True
            elif lower == b"connection":
                connection.append(value)
            elif lower == b"upgrade":
                upgrade = value
            elif lower == b"expect":
                if value.lower() != b"100-continue":
                    raise ClientFault("expectation", "the only expectation understood is 100-continue", status=417)
                self.expect = self.http11
            elif lower == b"x-request-id":
                if wire.usable_request_id(value):
                    self.id = value
            elif lower == b"x-quickthaw-hold":
                self.hold_s = self._seconds(value)
            elif lower == b"prefer" and self.hold_s == math.inf:
                self.hold_s = self._preferred(value)
        if hosts > 1 or (hosts == 0 and self.http11):
            raise ClientFault("host", "exactly one Host header is needed")
        if self.chunked and self.length is not None:
            raise ClientFault("two-lengths", "Content-Length and Transfer-Encoding together are refused")
        self._validate_target()
        if connection:
            named = wire.named_in_connection(connection)
            extra = named - {b"close", b"keep-alive"}
            if extra:
                self.drop = self.drop | extra
            if b"upgrade" in named and upgrade.lower() == b"websocket" and method == b"GET":
                if self.length or self.chunked:
                    raise ClientFault("upgrade-with-body", "a WebSocket upgrade has no body")
                self.upgrade = upgrade
        if not self.id:
            self.id = wire.new_request_id().encode()

    def _validate_target(self) -> None:
        target = self.target
        if not target.startswith(b"/"):
            absolute = path_rules.absolute_form(target)
            if absolute is not None:
                self.host, target = absolute
                if not self.host or b"@" in self.host:
                    raise ClientFault("target", "the request target names no host")
            elif not (target == b"*" and self.method == b"OPTIONS"):
                raise ClientFault("target", "the request target must be a path")
        if b"#" in target:
            raise ClientFault("target", "a request target has no fragment")
        self.target = target
        self.path = _path(target)

    def find_path(self) -> None:
        """Set `path` from a target that was not validated: the shape of an error response depends on it."""
        absolute = path_rules.absolute_form(self.target)
        self.path = _path(self.target if absolute is None else absolute[1])

    @staticmethod
    def _preferred(value: bytes) -> float:
        """Return N of `wait=N` (RFC 7240) among the preferences; others are ignored, as the RFC requires."""
        for preference in value.lower().split(b","):
            name, _, seconds = preference.partition(b";")[0].partition(b"=")
            if name.strip() == b"wait" and _SECONDS.fullmatch(seconds.strip()):
                return float(seconds)
        return math.inf

    @staticmethod
    def _seconds(value: bytes) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = -1.0
        if not 0 <= seconds <= 86400:
            raise ClientFault("hold", "the time to hold must be a number of seconds from 0 to 86400")
        return seconds

    def header(self, name: bytes) -> bytes:
        """Return the last value of the header `name` (lower case), or b"" if absent."""
        return next((value for lower, _, value in reversed(self.headers) if lower == name), b"")

    @property
    def has_body(self) -> bool:
        """Return True if a body follows the head."""
        return self.chunked or bool(self.length)

    def feed(self, data: bytes) -> int:
        """Relay or buffer a part of the body; return the number of bytes buffered (0 if a sink took them)."""
        self.body_bytes += len(data)
        if self.sink is not None:
            self.sink.send_body(data)
            return 0
        self.body += data
        self.buffered += len(data)
        return len(data)

    def finish(self) -> None:
        """Mark the body as complete."""
        self.complete = True
        if self.enough is not None and not self.enough.done():
            self.enough.set_result(None)
        if self.sink is not None:
            self.sink.end_body()

    def put_back(self, body: bytes) -> int:
        """Buffer a body again that was taken and must be resent; return its length in bytes."""
        self.sink = None
        self.body[:] = body
        self.buffered = len(body)
        return self.buffered

    def take_body(self) -> bytes:
        """Return everything buffered so far and clear the buffer."""
        data = bytes(self.body)
        self.body.clear()
        self.buffered = 0
        return data
