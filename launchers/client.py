"""A small blocking HTTP client for an engine's control endpoints, over sockets that a sandbox opens in its own network.

Used off the event loop, by the thread that drives one replica; every call has a time limit. httptools parses, as in the
proxy: the standard library's client costs a restore 15 ms of imports (email, ssl), a tenth of its time budget.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httptools

from launchers.errors import EngineFailed

Connect = Callable[[], socket.socket]
CONNECT_LIMIT_S = 10.0


class _Answer:
    """httptools callbacks for one response."""

    def __init__(self) -> None:
        self.body = bytearray()
        self.done = False
        self.framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self.framed = True

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.done = True


@dataclass
class Client:
    """HTTP client of one engine.

    `connect` returns a new non-blocking socket whose connect has been started.
    """

    connect: Connect
    token: str | None = None
    """Sent as `Authorization: Bearer …` if the engine requires a key."""
    sent: Callable[[], None] | None = None
    """Called after a request is written, before its answer is read."""
    admin_token: str | None = None
    """Sent instead of `token` by `admin`, if the engine requires a separate key for its control endpoints (SGLang)."""
    control_dir: Path | None = None
    """The engine's control folder as seen from the host (launchers/control.py); None if the engine is not controlled."""

    def admin(self) -> Client:
        """Return this client with the key for control endpoints."""
        return replace(self, token=self.admin_token or self.token)

    def _open(self, timeout_s: float) -> socket.socket:
        sock = self.connect()
        try:
            _, writable, _ = select.select([], [sock], [], min(timeout_s, CONNECT_LIMIT_S))
            if not writable:
                raise TimeoutError("connect")
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise ConnectionRefusedError(error, "connect")
        except BaseException:
            sock.close()
            raise
        return sock

    def call(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Send one request on its own connection; return (status, body).

        Raises OSError (TimeoutError after `timeout_s` seconds).
        """
        limit = time.monotonic() + timeout_s
        payload = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(payload)}"]
        if payload:
            head.append("Content-Type: application/json")
        if self.token:
            head.append(f"Authorization: Bearer {self.token}")
        head += [f"{name}: {value}" for name, value in (headers or {}).items()]
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        with self._open(timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall("\r\n".join([*head, "", ""]).encode() + payload)
            if self.sent:
                self.sent()
            while not answer.done:
                left = limit - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{method} {path}")
                sock.settimeout(left)
                data = sock.recv(1 << 16)
                try:
                    if not data:
                        if answer.body and not answer.framed:
                            break  # HTTP/1.0: the body ends with the connection
                        raise ConnectionError("the engine closed the connection")
                    parser.feed_data(data)
                except httptools.HttpParserError as error:
                    raise ConnectionError(f"not HTTP: {error!r}") from error
        return int(parser.get_status_code()), bytes(answer.body)

    def ok(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float = 30.0,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Send a request and return the body of its 200 answer.

        Raises EngineFailed (engine-stalled, engine-unreachable, or engine-refused with the engine's own message).
        """
        try:
            status, data = self.call(method, path, body, timeout_s, headers)
        except TimeoutError as error:
            raise EngineFailed(
                "engine-stalled", f"{method} {path} got no answer within {timeout_s:.0f} s; see the engine's log"
            ) from error
        except OSError as error:
            raise EngineFailed("engine-unreachable", f"{method} {path}: {error}; see the engine's log") from error
        if status != 200:
            words = " ".join(data.decode(errors="replace").split())[:300]
            raise EngineFailed("engine-refused", f"{method} {path} answered {status}", words, status)
        return data

    def json(self, method: str, path: str, body: object = None, timeout_s: float = 30.0) -> Any:
        """Send a request that must succeed and return its decoded JSON answer.

        Raises EngineFailed as `ok` does, or engine-garbled.
        """
        data = self.ok(method, path, body, timeout_s)
        try:
            return json.loads(data)
        except ValueError as error:
            raise EngineFailed(
                "engine-garbled", f"{method} {path} answered something that is not JSON; see the engine's log"
            ) from error
