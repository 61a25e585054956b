"""Where one exchange writes: the client's connection, and the stream that was answered before its replica was up.

Protocols, so that an exchange knows neither the connection nor the stream, which both know it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from plugin.proxy.errors import ProxyError
    from plugin.proxy.http import wire
    from plugin.proxy.http.upstream_connection import BackConnection


class ClientSink(Protocol):
    """The client's connection (`downstream.ClientConnection`). No call blocks."""

    writing_paused: bool
    tunnel: BackConnection | None

    def write(self, data: bytes) -> None:
        """Send bytes to the client."""

    def hold(self, reason: str, on: bool) -> None:
        """Pause or resume reading the client, for one reason of several."""

    def open_tunnel(self, back: BackConnection) -> None:
        """Join the client's socket to the replica's after an upgrade."""


class EarlySink(Protocol):
    """A stream that was begun before its replica was up (`early_stream.EarlyStream`)."""

    answered: bool

    def head(self, status: int, headers: list[wire.Field]) -> None:
        """The replica's head."""

    def data(self, data: bytes) -> None:
        """A piece of the replica's body."""

    def end(self) -> None:
        """The replica's answer is complete."""

    def error(self, error: ProxyError) -> None:
        """End the stream with an error event."""

    def close(self) -> None:
        """Stop the comments."""
