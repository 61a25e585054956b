"""Send one small request of the proxy's own (a readiness probe, a hook) over the same kind of connection as clients' requests."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from plugin.proxy.errors import UpstreamFault
from plugin.proxy.http import wire
from plugin.proxy.http.address import Upstream, from_url
from plugin.proxy.http.request import Request
from plugin.proxy.http.upstream_connection import connect
from plugin.proxy.pool.replica import Replica
from plugin.runtime.phases import PhaseTracker

_MAX_BODY = 1 << 20


class _Collector:
    """Collect one answer (implements `upstream_connection.Answer`)."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.done: asyncio.Future[None] = loop.create_future()
        self.status = 0
        self.body = bytearray()

    def interim(self, status: int, phrase: bytes, headers: list[wire.Field]) -> None:
        pass

    def head(self, status: int, phrase: bytes, headers: list[wire.Field], length_known: bool) -> None:
        self.status = status

    def data(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > _MAX_BODY:
            self.fault(UpstreamFault("upstream-body", f"an answer over {_MAX_BODY} bytes"))

    def flush(self) -> None:
        pass

    def end(self, trailers: list[wire.Field]) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def fault(self, error: UpstreamFault) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def switched(self, phrase: bytes, headers: list[wire.Field], rest: bytes) -> None:
        self.fault(UpstreamFault("upstream-garbage", "a probe was answered with an upgrade"))

    def tunnel_data(self, data: bytes) -> None:
        pass

    def tunnel_closed(self) -> None:
        pass

    def pause_client(self, on: bool) -> None:
        pass


async def fetch(
    upstream: Upstream, method: str, target: str, body: bytes = b"", *, limit_s: float, token: str | None = None
) -> tuple[int, bytes]:
    """Send one request on a connection of its own and return (status, body of at most 1 MiB).

    Raises:
        OSError: no connection, or no complete answer within `limit_s` seconds (TimeoutError).
        UpstreamFault: the answer was cut or is not HTTP.
    """
    loop = asyncio.get_running_loop()
    request = Request()
    request.method, request.complete = method.encode(), True
    answer = _Collector(request, loop)
    host = upstream.authority or b"localhost"
    head = b"%b %b HTTP/1.1\r\nhost: %b\r\nuser-agent: quickthaw\r\nconnection: close\r\n" % (
        request.method,
        target.encode(),
        host,
    )
    if token is not None:
        head += b"authorization: Bearer %b\r\n" % token.encode()
    if body or method == "POST":
        head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    async with asyncio.timeout(limit_s):
        back = await connect(Replica("probe", PhaseTracker(), upstream), limit_s)
        try:
            back.begin(answer, head + b"\r\n" + body, chunked=False)
            await answer.done
        finally:
            back.abort()
    return answer.status, bytes(answer.body)


def hook_place(url: str) -> tuple[Upstream, str]:
    """Return the upstream and the request target of a hook's URL. Raises ValueError unless it is http or https."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return from_url(f"{parts.scheme}://{parts.netloc}"), target


async def post_url(url: str, *, limit_s: float) -> int:
    """POST to a hook's URL without a body and return the status. Raises the errors of `fetch` and `hook_place`."""
    upstream, target = hook_place(url)
    status, _ = await fetch(upstream, "POST", target, limit_s=limit_s)
    return status
