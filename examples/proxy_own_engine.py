"""The proxy in front of your own engine: here an HTTP server in this process that takes a second to start.

    python examples/proxy_own_engine.py

Ten requests are sent while nothing runs; one wake serves them all, in order of arrival. After half an idle second
the engine is put to sleep.
"""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.request

from plugin.proxy.http.address import tcp
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, PhaseTracker


class Engine:
    """The owner: only it changes the phases."""

    def __init__(self) -> None:
        self.tracker = PhaseTracker()
        self.pool = ReplicaPool(wake=self.wake, sleep=self.sleep, sleep_after_s=0.5)
        self.replica = self.pool.add("engine", self.tracker)
        self.server: asyncio.Server | None = None

    async def wake(self) -> None:
        """Called once, however many requests wait. Raise an exception with a `code` to end them with it."""
        self.tracker.to(Phase.MOUNTING)
        self.tracker.to(Phase.STARTING)
        await asyncio.sleep(1.0)
        self.tracker.to(Phase.LOADING)
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        self.replica.upstream = tcp("127.0.0.1", self.server.sockets[0].getsockname()[1])
        self.tracker.to(Phase.WARMING)
        self.tracker.to(Phase.SERVING)

    async def sleep(self) -> None:
        """Called when nothing has been in flight for a while; requests that come now wait for the next wake."""
        assert self.server is not None
        self.server.close()
        self.tracker.to(Phase.ASLEEP)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = json.dumps({"you asked for": head.split(b" ")[1].decode()}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        except asyncio.IncompleteReadError:
            writer.close()


async def run(requests: int = 10) -> list[str]:
    engine = Engine()
    sock = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    proxy = ProxyServer(engine.pool, Settings(denied_paths=frozenset({"/sleep"})))
    await proxy.start(sock)

    def ask(number: int) -> str:
        with urllib.request.urlopen(f"{url}/{number}", timeout=30) as answer:
            return answer.read().decode()

    answers = await asyncio.gather(*(asyncio.to_thread(ask, n) for n in range(requests)))
    async with asyncio.timeout(30):
        while engine.tracker.phase is not Phase.ASLEEP:  # noqa: ASYNC110 - only to show it
            await asyncio.sleep(0.05)
    print(
        f"{requests} requests, {engine.pool.waker.wakes} wake, {engine.pool.sleeper.sleeps} sleep; the last: {answers[-1]}"
    )
    await proxy.shutdown(5)
    return answers


if __name__ == "__main__":
    asyncio.run(run())
