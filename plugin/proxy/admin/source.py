"""What the admin endpoints read of the server that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from plugin.proxy.admin.stats import Stats
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.settings import Settings


class Pools(Protocol):
    """Who knows every pool (a `server.Router`)."""

    def pools(self) -> Sequence[ReplicaPool]:
        """Every pool, for status and metrics."""


class StatusSource(Protocol):
    """One worker's server (`server.ProxyServer`)."""

    settings: Settings
    stats: Stats
    started_at: float
    draining: bool
    buffered: int
    pages_app: Any

    @property
    def router(self) -> Pools:
        """The pools behind the port."""

    @property
    def clients(self) -> Collection[object]:
        """The connections that are open."""

    async def document(self) -> dict[str, Any]:
        """The state of the proxy, of all its workers where there are several."""
