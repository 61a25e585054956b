"""The part of a server that the admin endpoints read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from plugin.proxy.admin.access import Sessions
    from plugin.proxy.admin.stats import Stats
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.settings import Settings


class Pools(Protocol):
    """The source of all pools (a `server.Router`)."""

    def pools(self) -> Sequence[ReplicaPool]:
        """Return every pool, for status and metrics."""


class StatusSource(Protocol):
    """One worker's server (`server.ProxyServer`)."""

    settings: Settings
    stats: Stats
    started_at: float
    draining: bool
    buffered: int
    pages_app: Any
    sessions: Sessions | None
    """None without an admin token, and before the first admin request."""
    act: Callable[[str, str], Awaitable[str]] | None
    """Set in a worker of several: moves the pool of this name in the supervisor (`actions.act`) and returns its phase."""
    listens_at: str
    """Where clients connect, for people."""

    @property
    def router(self) -> Pools:
        """Return the router of the pools behind the port."""

    @property
    def clients(self) -> Collection[object]:
        """Return the open connections."""

    async def document(self) -> dict[str, Any]:
        """Return the status document of the proxy, combined over all workers."""
