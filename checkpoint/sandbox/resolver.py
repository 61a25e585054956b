"""Relay name queries from a sandbox to resolvers on this host's loopback, which pasta does not reach.

systemd-resolved listens on 127.0.0.53, Docker's resolver on 127.0.0.11: in a sandbox the same addresses are its own. A thread of the
owner listens there, so it is there again after a restore. UDP only: an answer that needs TCP (over 4 KB, as a rule) is not relayed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from checkpoint.sandbox.network import inside

log = logging.getLogger("quickthaw")
RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53
ANSWER_LIMIT_S = 10.0
MOST_WAITING = 256
_DATAGRAM = 1 << 16

Server = tuple[str, int]


def loopback_resolvers(file: Path = RESOLV_CONF) -> tuple[Server, ...]:
    """Return the IPv4 addresses on loopback, with ports, that this host resolves names with."""
    found = []
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        words = line.split()
        with contextlib.suppress(ValueError):
            if words[:1] == ["nameserver"] and len(words) > 1 and ipaddress.IPv4Address(words[1]).is_loopback:
                found.append((words[1], PORT))
    return tuple(dict.fromkeys(found))


class ResolverRelay:
    """Answers at each server's address inside a sandbox's network with what the server answers outside. `close` ends it."""

    def __init__(self, network: int, servers: Sequence[Server]) -> None:
        """Listen in the network of this descriptor. Raises OSError, and Failed (sandbox-gone)."""
        self._selector = selectors.DefaultSelector()
        self._ends = os.pipe()
        self._selector.register(self._ends[0], selectors.EVENT_READ)
        self._waiting: dict[socket.socket, tuple[socket.socket, Server, float]] = {}
        try:
            for server in servers:
                with inside(network):
                    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, server)
                listener.bind(server)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="resolver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and close its sockets. Call it once."""
        os.write(self._ends[1], b"x")
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select(1.0):
                    if key.fileobj == self._ends[0]:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(
                        OSError
                    ):  # nobody listens there, or the query's sender is gone: it asks again
                        self._relay(key.fileobj, key.data)
                now = time.monotonic()
                for late in [sock for sock, (_, _, limit) in self._waiting.items() if limit < now]:
                    self._forget(late)
        finally:
            self._release()

    def _relay(self, sock: socket.socket, server: Server | None) -> None:
        """Pass a query on to its server, or an answer back to the query's sender."""
        if server is None:
            listener, client, _ = self._waiting[sock]
            try:
                listener.sendto(sock.recv(_DATAGRAM), client)
            finally:
                self._forget(sock)
            return
        query, client = sock.recvfrom(_DATAGRAM)
        if len(self._waiting) >= MOST_WAITING:
            return
        outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        outside.setblocking(False)
        self._waiting[outside] = (sock, client, time.monotonic() + ANSWER_LIMIT_S)
        self._selector.register(outside, selectors.EVENT_READ)
        try:
            outside.connect(server)
            outside.send(query)
        except OSError:
            self._forget(outside)
            raise

    def _forget(self, sock: socket.socket) -> None:
        del self._waiting[sock]
        self._selector.unregister(sock)
        sock.close()

    def _release(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        for end in self._ends:
            os.close(end)
