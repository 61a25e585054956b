"""For the proxy's tests: a real upstream on a real socket whose behaviour each request chooses, and a running proxy.

The upstream uses plain asyncio streams, independent of the proxy's code. It records every complete request head, so
`Upstream.seen` shows whether an invariant such as "at most once" holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import uvloop

from plugin.proxy.asgi import hold_app
from plugin.proxy.http.address import tcp
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import Replica
from plugin.proxy.server import Proxy, ProxyServer
from plugin.proxy.settings import Settings
from plugin.runtime.phases import Phase, PhaseTracker

LIMIT_S = 30.0


def run(coroutine: Coroutine[Any, Any, None], *, loop: str = "uvloop", limit_s: float = 100.0) -> None:
    """Run one test's coroutine, with a time limit, on the event loop that production uses (or on asyncio's own)."""

    async def limited() -> None:
        async with asyncio.timeout(limit_s):
            await coroutine

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if loop == "uvloop" else None) as runner:
        runner.run(limited())


@dataclass
class Seen:
    """One request as the upstream read it."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    gone: bool = False
    head_raw: bytes = b""

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name]


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def answer(body: bytes = b'{"ok":true}', status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


Handler = Callable[["Upstream", Seen, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]


async def echo_request(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer with JSON that echoes the request, or server-sent events for /stream. True keeps the connection open."""
    if seen.target.startswith("/stream"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(5):
            event = b"data: %d\n\n" % n
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
        return True
    body = json.dumps({"ok": True, "target": seen.target, "length": len(seen.body)}).encode()
    writer.write(answer(body))
    return True


def answering(data: bytes, *, keep: bool = True) -> Handler:
    """Return a handler that answers every request with these bytes, and keeps the connection open or not."""

    async def say(up: Upstream, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(data)
        return keep

    return say


@dataclass
class Upstream:
    """An HTTP server in the engine's place; `handler` answers each request."""

    handler: Handler = echo_request
    seen: list[Seen] = field(default_factory=list)
    connections: int = 0
    port: int = 0
    read_body: bool = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *rest = head[:-4].decode("latin-1").split("\r\n")
                method, target, _ = first.split(" ")
                headers = [(k, v.strip()) for k, _, v in (line.partition(":") for line in rest)]
                seen = Seen(method, target, headers, head_raw=head)
                self.seen.append(seen)
                if self.read_body:
                    seen.body = await self.body(seen, reader)
                if not await self.handler(self, seen, reader, writer):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            if self.seen:
                self.seen[-1].gone = True
        finally:
            writer.close()

    async def body(self, seen: Seen, reader: asyncio.StreamReader) -> bytes:
        if seen.header("transfer-encoding"):
            parts = []
            while True:
                size = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
                if size == 0:
                    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
                        key, _, value = line.decode().partition(":")
                        seen.headers.append((f"trailer-{key.lower()}", value.strip()))
                    return b"".join(parts)
                parts.append(await reader.readexactly(size))
                await reader.readexactly(2)
        length = seen.header("content-length")
        return await reader.readexactly(int(length[0])) if length else b""


@asynccontextmanager
async def upstream(handler: Handler = echo_request, **more: Any) -> AsyncIterator[Upstream]:
    up = Upstream(handler, **more)
    tasks: set[asyncio.Task[None]] = set()

    async def tracked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await up.serve(reader, writer)
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(tracked, "127.0.0.1", 0, backlog=4096)
    up.port = server.sockets[0].getsockname()[1]
    try:
        yield up
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Rig:
    """A running proxy with its pool."""

    server: Proxy
    pool: ReplicaPool
    port: int
    trackers: dict[str, PhaseTracker] = field(default_factory=dict)
    stop: Callable[[float], Awaitable[None]] | None = None
    """Stop as on SIGTERM: hold no request any more, wait up to so many seconds for those in flight."""
    connections: Callable[[], int] | None = None
    """How many clients are connected, idle ones included."""

    def __post_init__(self) -> None:
        self.stop = self.stop or self.server.shutdown
        self.connections = self.connections or (lambda: len(self.server.clients))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, port: int, *, phase: Phase = Phase.SERVING) -> Replica:
        tracker = PhaseTracker(phase=phase)
        self.trackers[name] = tracker
        return self.pool.add(name, tracker, tcp("127.0.0.1", port))

    def restore(self, name: str) -> None:
        """Move a replica through all phases of a restore."""
        for phase in (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING, Phase.SERVING):
            self.trackers[name].to(phase)

    async def raw(self, data: bytes, *, until_close: bool = False) -> bytes:
        """Send bytes on a new connection; return what is received until it ends, or one answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            await writer.drain()
            if until_close:
                async with asyncio.timeout(LIMIT_S):
                    return await reader.read(-1)
            return (await read_answer(reader)).raw
        finally:
            writer.close()

    async def get(self, target: str, *more: str, method: str = "GET", body: bytes = b"") -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", *more]
            if body:
                lines.append(f"Content-Length: {len(body)}")
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            async with asyncio.timeout(LIMIT_S):
                return await read_answer(reader, head_only=method == "HEAD")
        finally:
            writer.close()


@asynccontextmanager
async def proxy(settings: Settings | None = None, **pool_options: Any) -> AsyncIterator[Rig]:
    """Start the proxy behind its own port, as `launch` does."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    pool = ReplicaPool(**pool_options)
    server = ProxyServer(pool, settings or Settings())
    await server.start(sock)
    try:
        yield Rig(server, pool, sock.getsockname()[1])
    finally:
        await server.shutdown(0.02)


class _ShortSleeps:
    """asyncio for uvicorn's server module alone. It looks every 0.1 s whether to end, and waits 0.1 s more when it does:
    0.2 s for each test. Here it looks every 5 ms; all of its code is its own.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(delay_s: float) -> None:
        await asyncio.sleep(min(delay_s, 0.005))


uvicorn.server.asyncio = _ShortSleeps()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers, because a test ends it itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served_by_uvicorn(app: Any, **options: Any) -> AsyncIterator[tuple[int, _Uvicorn]]:
    """Serve an ASGI application on a port of its own; yield the port and the server."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = _Uvicorn(
        uvicorn.Config(app, lifespan="on", log_config=None, server_header=False, proxy_headers=False, **options)
    )
    task = asyncio.create_task(server.serve(sockets=[sock]))
    await until(lambda: server.started or task.done(), "uvicorn to start")
    try:
        yield sock.getsockname()[1], server
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def asgi_proxy(settings: Settings | None = None, **pool_options: Any) -> AsyncIterator[Rig]:
    """Start the same proxy as a Starlette application under uvicorn."""
    pool = ReplicaPool(**pool_options)
    app = hold_app(pool, settings or Settings())
    async with served_by_uvicorn(app, date_header=False) as (port, uvicorn_server):
        server: Proxy = app.state.proxy

        async def stop(limit_s: float) -> None:
            server.drain()
            uvicorn_server.should_exit = True
            await server.shutdown(limit_s)

        try:
            yield Rig(server, pool, port, stop=stop, connections=lambda: len(uvicorn_server.server_state.connections))
        finally:
            await server.shutdown(0.02)


FACES = {"port": proxy, "asgi": asgi_proxy}


@dataclass
class Answer:
    """One HTTP answer as a client read it."""

    status: int
    headers: dict[str, str]
    body: bytes
    raw: bytes
    chunks: list[bytes] = field(default_factory=list)
    whole: bool = True

    def json(self) -> Any:
        return json.loads(self.body)


async def read_answer(reader: asyncio.StreamReader, *, head_only: bool = False) -> Answer:
    """Read one answer strictly. `whole` is False if the connection ended inside it."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *rest = head[:-4].decode("latin-1").split("\r\n")
    status = int(first.split(" ")[1])
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest)}
    got = Answer(status, headers, b"", head)
    if head_only or status in (204, 304) or status < 200:
        return got
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        got.whole = False
        if headers.get("transfer-encoding") == "chunked":
            while True:
                line = await reader.readuntil(b"\r\n")
                size = int(line, 16)
                data = await reader.readexactly(size)
                got.raw += line + data
                if size == 0:
                    while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
                        key, _, value = trailer.decode().partition(":")
                        got.headers[f"trailer-{key.lower()}"] = value.strip()
                    break
                await reader.readexactly(2)
                got.chunks.append(data)
                got.body += data
        elif "content-length" in headers:
            got.body = await reader.readexactly(int(headers["content-length"]))
        else:
            got.body = await reader.read(-1)
        got.whole = True
    return got


async def until(condition: Callable[[], bool], what: str = "the condition") -> None:
    """Wait, with a limit, until an observable condition is true."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)
