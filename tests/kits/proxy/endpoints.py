"""A proxy in front of one endpoint, and an engine with a sleep mode."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from plugin.proxy.endpoints.endpoint import Endpoint, EndpointSpec
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from tests.kits.proxy.rig import Rig, Seen, Upstream, answer, echo_request


@asynccontextmanager
async def in_front_of(spec: EndpointSpec, settings: Settings | None = None) -> AsyncIterator[tuple[Rig, Endpoint]]:
    """Start a proxy in front of one endpoint, as `quickthaw proxy` does."""
    endpoint = Endpoint("default", spec)
    sock = socket.create_server(("127.0.0.1", 0))
    server = ProxyServer(endpoint.pool, settings)
    await endpoint.start()
    await server.start(sock)
    try:
        yield Rig(server, endpoint.pool, sock.getsockname()[1]), endpoint
    finally:
        await server.shutdown(0.02)
        await endpoint.close()


class SleepMode:
    """An engine that sleeps and still answers its health page, as vLLM's sleep mode does."""

    def __init__(self, *, awake: bool = True, lies: bool = False) -> None:
        self.awake, self.lies = awake, lies
        self.calls: list[str] = []
        self.asked_asleep = 0

    async def __call__(self, up: Upstream, seen: Seen, reader, writer) -> bool:
        if seen.target in ("/sleep", "/wake_up"):
            self.calls.append(seen.target)
            await asyncio.sleep(0.03)
            self.awake = seen.target == "/wake_up"
            if self.lies and not self.awake:
                writer.write(answer(b"no", "500 Internal Server Error"))
                return True
        elif seen.target != "/health" and not self.awake:
            self.asked_asleep += seen.target != "/v1/completions"
            writer.write(answer(b"asleep", "500 Internal Server Error"))
            return True
        return await echo_request(up, seen, reader, writer)
