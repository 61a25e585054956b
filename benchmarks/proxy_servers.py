"""The servers that `benchmarks/proxy.py` starts in processes of their own: the upstream, quickthaw's proxy on a port of its own and under
uvicorn, and the simple peer. `python benchmarks/proxy.py _ours PORT UPSTREAM_PORT [held]` and the like (`SERVERS`) run them.

`held`: no replica serves until SIGUSR1.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from proxy_loads import TOKEN_EVERY_S

if TYPE_CHECKING:
    from plugin.proxy.pool.pool import ReplicaPool


async def upstream(port: int) -> None:
    """Answer as fast as Python allows, so that the upstream is not what is measured."""
    import httptools

    answer = json.dumps(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello there"}}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    ).encode()
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer)
    seen: dict[bytes, int] = {}
    gone: list[float] = []
    loop = asyncio.get_running_loop()

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.parser = transport, httptools.HttpRequestParser(self)
            self.url, self.body, self.size = b"", b"", 0
            self.task: asyncio.Task[None] | None = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self.task is not None and not self.task.done():
                gone.append(time.monotonic())
                self.task.cancel()

        def data_received(self, data: bytes) -> None:
            self.parser.feed_data(data)

        def on_url(self, url: bytes) -> None:
            self.url = url

        def on_body(self, body: bytes) -> None:
            self.size += len(body)
            if self.size < 10_000:
                self.body += body

        def on_message_complete(self) -> None:
            if b'"stream":true' in self.body or b'"stream": true' in self.body:
                self.task = loop.create_task(self.stream(json.loads(self.body)["max_tokens"]))
            elif self.url.startswith(b"/gone"):
                text = json.dumps(gone).encode()
                gone.clear()
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            elif self.url.startswith(b"/count"):
                text = json.dumps({"requests": sum(seen.values()), "distinct": len(seen)}).encode()
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            elif self.url.startswith(b"/size"):
                text = b"%d" % self.size
                self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(text), text))
            else:
                if self.url.startswith(b"/held/"):
                    seen[self.url] = seen.get(self.url, 0) + 1
                self.transport.write(whole)
            self.body, self.size = b"", 0

        async def stream(self, tokens: int) -> None:
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            for _ in range(tokens):
                await asyncio.sleep(TOKEN_EVERY_S)
                delta = {"content": f"{time.monotonic():.6f} "}
                event = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
                event["choices"] = [{"index": 0, "delta": delta, "finish_reason": None}]  # type: ignore[assignment]
                data = b"data: " + json.dumps(event).encode() + b"\n\n"
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
            data = b"data: [DONE]\n\n"
            self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    server = await loop.create_server(Protocol, "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


def one_replica(upstream_port: int, held: bool) -> tuple[ReplicaPool, Callable[..., None]]:
    """Return a pool of one replica, and the function that lets a held one serve."""
    from plugin.proxy.http.address import tcp
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.runtime.phases import Phase, PhaseTracker

    pool = ReplicaPool()
    tracker = PhaseTracker(phase=Phase.IDLE if held else Phase.SERVING)
    pool.add("r0", tracker, tcp("127.0.0.1", upstream_port))

    def release(*_: object) -> None:
        for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
            tracker.to(phase)

    return pool, release


async def ours(port: int, upstream_port: int, held: bool) -> None:
    """Run the proxy as `quickthaw` does."""
    from plugin.proxy.server import ProxyServer
    from plugin.proxy.settings import Settings

    sock = socket.create_server(("127.0.0.1", port), backlog=4096)
    pool, release = one_replica(upstream_port, held)
    server = ProxyServer(pool, Settings())
    await server.start(sock)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, release)
    await server.wait_stopped()


def asgi(port: int, upstream_port: int, held: bool) -> None:
    """Run the same proxy as an application under uvicorn."""
    import uvicorn

    from plugin.proxy.asgi import hold_app

    pool, release = one_replica(upstream_port, held)
    signal.signal(signal.SIGUSR1, release)
    uvicorn.run(hold_app(pool), **UVICORN, port=port)


def starlette(port: int, upstream_port: int) -> None:
    """Run the simple peer (`proxy_peer`)."""
    import uvicorn
    from proxy_peer import app

    uvicorn.run(app(f"http://127.0.0.1:{upstream_port}"), **UVICORN, port=port)


UVICORN: dict[str, Any] = {
    "loop": "uvloop",
    "http": "httptools",
    "access_log": False,
    "log_level": "error",
    "backlog": 4096,
    "timeout_keep_alive": 75,
}


def run_upstream(port: str) -> None:
    import uvloop

    uvloop.run(upstream(int(port)))


def run_ours(port: str, upstream_port: str, held: str = "") -> None:
    import uvloop

    uvloop.run(ours(int(port), int(upstream_port), held == "held"))


SERVERS: dict[str, Callable[..., None]] = {
    "_upstream": run_upstream,
    "_ours": run_ours,
    "_asgi": lambda port, upstream_port, held="": asgi(int(port), int(upstream_port), held == "held"),
    "_starlette": lambda port, upstream_port: starlette(int(port), int(upstream_port)),
}
