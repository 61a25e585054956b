"""Choose the pool that answers a request: the only one, or (`endpoints.models.ModelRouter`) that of the request's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.request import Request
    from plugin.proxy.pool.pool import ReplicaPool


class Router(Protocol):
    """Choose the pool that answers a request."""

    def pools(self) -> Sequence[ReplicaPool]:
        """Return every pool, for status and metrics."""

    def answer(self, request: Request) -> dict[str, Any] | None:
        """Return the router's own JSON answer, or None."""

    async def route(self, client: Client, request: Request) -> ReplicaPool:
        """Return the pool for `request`. Raises ProxyError if there is none."""


class SinglePool:
    """A router of one pool."""

    def __init__(self, pool: ReplicaPool) -> None:
        self.pool = pool

    def pools(self) -> Sequence[ReplicaPool]:
        """Return the one pool."""
        return (self.pool,)

    def answer(self, request: Request) -> dict[str, Any] | None:
        """Return None: there is no answer of its own."""
        return None

    async def route(self, client: Client, request: Request) -> ReplicaPool:
        """Return the one pool."""
        return self.pool
