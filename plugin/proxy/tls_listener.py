"""Accept connections over TLS, and bound the handshakes.

A server of the event loop tells of a connection once its handshake is done, so one that never ends would not count as a client.
Here every accepted connection counts from the start; one over the limit is cut, or refused in HTTP if few others are.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from plugin.proxy.descriptor_limit import SHORTAGE

if TYPE_CHECKING:
    from plugin.proxy.http.client import Host
    from plugin.proxy.http.downstream import ClientConnection
    from plugin.proxy.tls import Certificates

log = logging.getLogger("quickthaw.proxy")
_AT_ONCE = 64
"""Connections accepted before other events get their turn."""
_REFUSED_IN_HTTP = 64
"""Connections over the limit whose handshake is done, so that they get their 503; more are cut."""
_SHORTAGE_PAUSE_S = 1.0


class TlsListener:
    """Accepts on a listening socket from its creation to `close`. Each handshake has `limit_s` seconds."""

    def __init__(
        self,
        proxy: Host,
        sock: socket.socket,
        certificates: Certificates,
        protocol: Callable[[], ClientConnection],
        limit_s: float,
    ) -> None:
        self._proxy, self._sock, self._certificates, self._protocol = proxy, sock, certificates, protocol
        self._limit_s = limit_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self._closed = False
        self._resume()

    def close(self) -> None:
        """Stop accepting and close the socket. Handshakes continue."""
        if not self._closed:
            self._closed = True
            if self._paused is not None:
                self._paused.cancel()
            self._proxy.loop.remove_reader(self._sock)
            self._sock.close()

    def cut(self) -> None:
        """End the handshakes that are not done."""
        for task in self._tasks:
            task.cancel()

    def _resume(self) -> None:
        self._paused = None
        self._proxy.loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        proxy = self._proxy
        for _ in range(_AT_ONCE):
            try:
                sock, _address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in SHORTAGE:  # of the connection: accept(2) says to try the next
                    log.debug("a connection ended before it was accepted: %s", error)
                    return
                log.warning("no-connection: cannot accept a client: %s", error.strerror)
                proxy.loop.remove_reader(self._sock)
                self._paused = proxy.loop.call_later(_SHORTAGE_PAUSE_S, self._resume)
                return
            if len(proxy.clients) + len(proxy.handshakes) >= proxy.max_clients + _REFUSED_IN_HTTP:
                sock.close()
                continue
            sock.setblocking(False)
            task = proxy.loop.create_task(self._handshake(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _handshake(self, sock: socket.socket) -> None:
        client = self._protocol()
        handshakes = self._proxy.handshakes
        handshakes.add(client)
        try:
            await self._proxy.loop.connect_accepted_socket(
                lambda: client, sock, ssl=self._certificates.context, ssl_handshake_timeout=self._limit_s
            )
        except OSError as error:
            log.debug("a TLS handshake failed: %s", error)
        finally:
            handshakes.discard(client)
