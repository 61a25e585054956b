"""Connect the proxy's server to the Starlette app of the admin endpoints, which is imported in a thread on first use.

No forwarded request passes through it: importing Starlette and the Prometheus client takes about half as long as a
restore.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plugin.proxy.admin.source import StatusSource
    from plugin.proxy.http.client import Client
    from plugin.proxy.http.request import Request


async def serve_page(
    server: StatusSource, client: Client, request: Request, name: str, *, status: int | None = None
) -> int:
    """Answer one admin request through the app and return the status. `status` replaces the app's own."""
    if server.pages_app is None:
        module = await asyncio.to_thread(importlib.import_module, "plugin.proxy.admin.app")
        server.pages_app = module.build(server)
    path, _, query = request.target.partition(b"?")
    root_path = request.mount.decode() + server.settings.admin_prefix
    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method.decode("ascii"),
        "scheme": "http",
        "path": f"{root_path}/{name}",
        "raw_path": path,
        "query_string": query,
        "root_path": root_path,
        "headers": [(lower, value) for lower, _, value in request.headers],
        "client": None,
        "server": None,
    }
    answered, headers, body = 500, list[tuple[bytes, bytes]](), b""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal answered, headers, body
        if message["type"] == "http.response.start":
            answered = message["status"]
            headers = [(key, value) for key, value in message["headers"] if key != b"content-length"]
        else:
            body += message.get("body", b"")

    await server.pages_app(scope, receive, send)
    status = answered if status is None else status
    client.respond(request, status, headers, body)
    return status
