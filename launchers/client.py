"""A small blocking HTTP client for an engine's control, over sockets that a sandbox makes inside its own network.

Used off the event loop, by the thread that drives one replica; every call has a limit.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from launchers.errors import EngineFailed

Connect = Callable[[], socket.socket]


@dataclass
class Client:
    """Calls to one engine. `connect` returns a new non-blocking socket whose connect has been started."""

    connect: Connect
    token: str | None = None
    """Sent as `Authorization: Bearer …` where the engine asks for a key."""
    _kept: http.client.HTTPConnection | None = field(default=None, repr=False)

    def _open(self, timeout_s: float) -> http.client.HTTPConnection:
        sock = self.connect()
        try:
            _, writable, _ = select.select([], [sock], [], min(timeout_s, 10.0))
            if not writable:
                raise TimeoutError("connect")
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise ConnectionRefusedError(error, "connect")
        except BaseException:
            sock.close()
            raise
        sock.settimeout(timeout_s)
        connection = http.client.HTTPConnection("localhost", timeout=timeout_s)
        connection.sock = sock
        return connection

    def call(self, method: str, path: str, body: object = None, timeout_s: float = 30.0) -> tuple[int, bytes]:
        """One request on a connection of its own; (status, body). Raises OSError where nobody answers within `timeout_s` seconds."""
        connection = self._open(timeout_s)
        try:
            headers = {"Connection": "close"}
            payload = None
            if body is not None:
                payload = json.dumps(body).encode()
                headers["Content-Type"] = "application/json"
            if self.token:
                headers["Authorization"] = f"Bearer {self.token}"
            connection.request(method, path, payload, headers)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()

    def json(self, method: str, path: str, body: object = None, timeout_s: float = 30.0) -> Any:
        """The decoded answer of a request that must succeed. Raises EngineFailed with the engine's own words when it does not."""
        try:
            status, data = self.call(method, path, body, timeout_s)
        except TimeoutError as error:
            raise EngineFailed(
                "engine-stalled", f"{method} {path} got no answer within {timeout_s:.0f} s; see the engine's log"
            ) from error
        except OSError as error:
            raise EngineFailed("engine-unreachable", f"{method} {path}: {error}; see the engine's log") from error
        if status != 200:
            words = " ".join(data.decode(errors="replace").split())[:300]
            raise EngineFailed("engine-refused", f"{method} {path} answered {status}: {words}")
        try:
            return json.loads(data)
        except ValueError as error:
            raise EngineFailed(
                "engine-garbled", f"{method} {path} answered something that is not JSON; see the engine's log"
            ) from error
