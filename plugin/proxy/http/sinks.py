"""The write side of an exchange: the client's connection, and a stream answered before its replica was up.

Protocols, which break the import circle with the modules that import `exchange`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from plugin.proxy.errors import ProxyError
    from plugin.proxy.http import wire
    from plugin.proxy.http.upstream_connection import UpstreamConnection


class ClientSink(Protocol):
    """A client of either front end (`client.Client`). No call blocks."""

    writing_paused: bool

    def pause(self, reason: str, on: bool) -> None:
        """Add or remove one reason to pause reading the client."""


class WireSink(ClientSink, Protocol):
    """A client's connection (`downstream.ClientConnection`)."""

    tunnel: UpstreamConnection | None

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""

    def open_tunnel(self, connection: UpstreamConnection) -> None:
        """Connect the client's socket to the replica's after an upgrade."""


class EarlySink(Protocol):
    """A stream that began before its replica was up (`early_stream.EarlyStream`)."""

    answered: bool

    def head(self, status: int, headers: list[wire.Field]) -> None:
        """Receive the replica's head."""

    def data(self, data: bytes) -> None:
        """Receive a part of the replica's body."""

    def end(self) -> None:
        """Complete the answer."""

    def error(self, error: ProxyError) -> None:
        """End the stream with an error event."""

    def close(self) -> None:
        """Stop the comments."""
