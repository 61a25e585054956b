"""The admin endpoints as a Starlette app (page, metrics, status as JSON), which an owner may mount elsewhere."""

from __future__ import annotations

import base64
import os
from importlib import resources
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from plugin.proxy.admin.metrics import CONTENT_TYPE, exposition
from plugin.proxy.errors import ClientFault, document

if TYPE_CHECKING:
    from plugin.proxy.admin.source import StatusSource


def build(server: StatusSource) -> Starlette:
    """Build the app for one server."""
    page, style, script = (
        resources.files("plugin.proxy.admin").joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.css", "page.js")
    )
    page = page.replace("PAGE_CSS", style).replace("PAGE_JS", script)
    page = page.replace("SIGN_IN", "true" if server.settings.admin_token is not None else "false")

    async def people(request: Request) -> Response:
        nonce = base64.b64encode(os.urandom(12)).decode()
        policy = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
        headers = {
            "content-security-policy": policy + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "cache-control": "no-store",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        html = page.replace("NONCE", nonce).replace("ADMIN_PREFIX", request.scope["root_path"])
        return HTMLResponse(html, headers=headers)

    async def metrics(request: Request) -> Response:
        return Response(exposition(await server.document()), media_type=CONTENT_TYPE)

    async def status(request: Request) -> Response:
        return JSONResponse(await server.document())

    async def missing(request: Request, exc: Exception) -> Response:
        fault = ClientFault("not-found", "there is no such page", status=404)
        return JSONResponse(document(fault, request.url.path, ""), status_code=404)

    routes = [Route("/", people), Route("/metrics", metrics), Route("/status", status)]
    return Starlette(routes=routes, exception_handlers={404: missing})
