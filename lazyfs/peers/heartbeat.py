"""Tell clients that wait for an answer that this server lives.

Silence must mean that a server is gone, so each waiting client hears from it every few milliseconds: the client, not each of
its requests. One thread writes to one connection of each client; a message for each of hundreds of waiting requests took all
processors of a fleet's hosts, which were silent then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterator

HEARTBEAT_S = 0.015
_PROCESSING = b"HTTP/1.1 102 Processing\r\n\r\n"


class Heartbeat:
    """The connections that wait, by client. Safe to use from many threads."""

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[socket.socket, None]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    @contextlib.contextmanager
    def during(self, client: str, connection: socket.socket) -> Iterator[None]:
        """Send `102 Processing` to the client within; nobody else may write to the connection meanwhile."""
        with self._lock:
            self._waiting.setdefault(client, OrderedDict())[connection] = None
        try:
            yield
        finally:
            with self._lock:
                self._forget(client, connection)

    def close(self) -> None:
        """Send nothing from now on."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._lock:
                for client in list(self._waiting):
                    self._tell(client)

    def _tell(self, client: str) -> None:
        """Write to the client's next connection that takes it."""
        while connections := self._waiting.get(client):
            # In turns: one that the client has just closed is noticed at the second write to it.
            connection, _ = connections.popitem(last=False)
            connections[connection] = None
            try:
                # Not send(), which waits as long as the socket's timeout.
                if os.write(connection.fileno(), _PROCESSING) == len(_PROCESSING):
                    return
                connection.shutdown(socket.SHUT_RDWR)  # a part of a message: what follows could not be read
            except BlockingIOError:
                return  # it has not read what is there already
            except OSError:
                pass
            self._forget(client, connection)

    def _forget(self, client: str, connection: socket.socket) -> None:
        connections = self._waiting.get(client)
        if connections is not None:
            connections.pop(connection, None)
            if not connections:
                del self._waiting[client]
