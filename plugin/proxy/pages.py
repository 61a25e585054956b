"""The pages for people and for Prometheus, as a Starlette app: imported only when first asked for, in a thread, off
the way of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import ClientFault

if TYPE_CHECKING:
    from .front import ClientConnection
    from .request import Request
    from .server import ProxyServer


async def serve_page(server: ProxyServer, client: ClientConnection, request: Request, name: str) -> int:
    """Answer an own page that needs more than this package; returns the status."""
    raise ClientFault("not-found", "there is no such page", status=404)
