"""One request as the front read it: its head, judged, and its body on the way from the client to wherever it goes.

`Request.judge` is the one place where a head is refused. A body is kept (up to the limit that pauses the client)
until a sink takes it.
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
    """Where a body goes once a replica has been chosen."""

    def send_body(self, data: bytes) -> None:
        """Take one piece of the body."""

    def end_body(self) -> None:
        """The body is complete."""


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
        "path",
        "sink",
        "target",
        "token",
        "upgrade",
    )

    def __init__(self) -> None:
        self.arrived = time.monotonic()
        self.method = b""
        self.target = b""
        self.path = ""
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
        """How long the client would be held at most."""
        self.token = b""
        self.body = bytearray()
        self.buffered = 0
        self.body_bytes = 0
        self.complete = False
        self.enough: asyncio.Future[None] | None = None
        """Set by somebody who must see the body first: done once it is complete or more than can be kept."""
        self.sink: Sink | None = None
        self.fault: ProxyError | None = None
        """Why the request is refused before anything else."""
        self.interrupt: ProxyError | None = None
        """Why the task that serves it was cancelled, when that was not the client's going away."""

    def judge(self, method: bytes, version: str, keep_alive: bool) -> None:
        """Read what matters out of the head.

        Raises:
            ClientFault: the head is one that a strict server refuses.
        """
        self.find_path()  # before anything is refused: the shape of an error follows the path
        self.method = method
        self.http11 = version == "1.1"
        self.keep_alive = keep_alive and self.http11
        if version not in ("1.1", "1.0"):
            raise ClientFault("http-version", f"HTTP/{version} is not spoken here", status=505)
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
        self._judge_target()
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

    def _judge_target(self) -> None:
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
        """Set `path` from a target that has not been judged, for the shape of an error."""
        absolute = path_rules.absolute_form(self.target)
        self.path = _path(self.target if absolute is None else absolute[1])

    @staticmethod
    def _preferred(value: bytes) -> float:
        """`wait=N` of RFC 7240, among other preferences; what is not understood is ignored, as that RFC says."""
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
        """Return the last value of the header `name` (lower case), empty where there is none."""
        return next((value for lower, _, value in reversed(self.headers) if lower == name), b"")

    @property
    def has_body(self) -> bool:
        """True when a body follows the head."""
        return self.chunked or bool(self.length)

    def feed(self, data: bytes) -> int:
        """Take one piece of the body; returns how many more bytes are kept here (0 when a sink took them)."""
        self.body_bytes += len(data)
        if self.sink is not None:
            self.sink.send_body(data)
            return 0
        self.body += data
        self.buffered += len(data)
        return len(data)

    def finish(self) -> None:
        """The body is complete."""
        self.complete = True
        if self.enough is not None and not self.enough.done():
            self.enough.set_result(None)
        if self.sink is not None:
            self.sink.end_body()

    def put_back(self, body: bytes) -> int:
        """Keep a body again that was taken and must be sent anew; returns its bytes."""
        self.sink = None
        self.body[:] = body
        self.buffered = len(body)
        return self.buffered

    def take_body(self) -> bytes:
        """Everything kept so far; it is no longer kept."""
        data = bytes(self.body)
        self.body.clear()
        self.buffered = 0
        return data
