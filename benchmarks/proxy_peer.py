"""A simple proxy in Starlette and aiohttp, which `benchmarks/proxy.py` measures as a peer.

It neither holds nor wakes: it forwards each request to one upstream, and streams the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host"}


def app(upstream: str) -> Starlette:
    """Return the application that forwards everything to `upstream`."""
    sessions: list[aiohttp.ClientSession] = []

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            sessions.append(session)
            yield

    async def forward(request: Request) -> Response:
        has_body = "content-length" in request.headers or "transfer-encoding" in request.headers
        try:
            answer = await sessions[0].request(
                request.method,
                f"{upstream}{request.url.path}",
                params=request.url.query or None,
                headers={k: v for k, v in request.headers.items() if k not in HOP_BY_HOP},
                data=request.stream() if has_body else None,
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            return PlainTextResponse(str(error), status_code=502)
        headers = {k: v for k, v in answer.headers.items() if k.lower() not in HOP_BY_HOP}
        release = BackgroundTask(answer.release)
        return StreamingResponse(answer.content.iter_any(), answer.status, headers, background=release)

    return Starlette(routes=[Route("/{path:path}", forward, methods=METHODS)], lifespan=lifespan)
