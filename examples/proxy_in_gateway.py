"""A gateway in Starlette with the proxy mounted in it: the gateway checks keys, the proxy holds, forwards and streams.

    pip install uvicorn
    python examples/proxy_in_gateway.py --upstream http://127.0.0.1:8001 --port 8000

Requests below /llm wait until the engine at `--upstream` serves; others start it. In FastAPI the same works with
`app.mount("/llm", engine)`. On SIGTERM held requests are answered at once, and those in flight are finished.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from plugin.proxy.asgi import hold_app
from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
from plugin.proxy.http.address import from_url
from plugin.proxy.server import Proxy

KEYS = {"Bearer team-a", "Bearer team-b"}


class CheckKey:
    """The gateway's own access control. Not a BaseHTTPMiddleware, which would end a cut stream as if it were complete."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] != "http" or scope["path"] == "/health"
        if allowed or Headers(scope=scope).get("authorization") in KEYS:
            await self.app(scope, receive, send)
        else:
            refused = JSONResponse({"error": {"message": "unknown key", "code": "key"}}, status_code=401)
            await refused(scope, receive, send)


def gateway(upstream: str) -> tuple[Starlette, Proxy]:
    """Return the gateway, and the proxy in it."""
    endpoint = Endpoint("engine", EndpointSpec(from_url(upstream)))
    engine = hold_app(endpoint.pool)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await endpoint.start()
        async with engine.router.lifespan_context(engine):
            yield
        await endpoint.close()

    async def health(request: Request) -> Response:
        return JSONResponse({"ok": True})

    routes = [Route("/health", health), Mount("/llm", app=engine)]
    return Starlette(routes=routes, middleware=[Middleware(CheckKey)], lifespan=lifespan), engine.state.proxy


class Server(uvicorn.Server):
    """Drain the proxy at a stop signal: uvicorn ends the lifespan only after the last request."""

    def __init__(self, config: uvicorn.Config, proxy: Proxy) -> None:
        super().__init__(config)
        self.proxy = proxy

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.proxy.begun:
            self.proxy.loop.call_soon_threadsafe(self.proxy.drain)
        super().handle_exit(sig, frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    app, proxy = gateway(options.upstream)
    # The engine's answers carry their own Server and Date.
    config = uvicorn.Config(app, port=options.port, server_header=False, date_header=False)
    asyncio.run(Server(config, proxy).serve())


if __name__ == "__main__":
    main()
