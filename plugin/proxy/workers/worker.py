"""A worker process: `python -m plugin.proxy.workers.worker CONTROL-FD LISTEN-FD [ADMIN-FD]`, started by `supervisor.Supervisor` only.

The worker with ADMIN-FD serves the admin endpoints, when they have a port of their own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import uvloop

from plugin.proxy import logs
from plugin.proxy.admin.access import Sessions
from plugin.proxy.admin.endpoints import status_document
from plugin.proxy.errors import Unavailable
from plugin.proxy.server import ProxyServer
from plugin.proxy.settings import Settings
from plugin.proxy.workers.control import ACTION_S, LONGEST_LINE, REPLY_S, ControlChannel, error_of
from plugin.proxy.workers.mirror import Mirror

log = logging.getLogger("quickthaw.proxy")


async def work(control_fd: int, listen_fd: int, admin_fd: int | None = None) -> None:
    """Serve until the supervisor stops this worker or closes the control connection."""
    sock = socket.socket(fileno=control_fd)
    reader, writer = await asyncio.open_connection(sock=sock, limit=LONGEST_LINE)
    control = ControlChannel(reader, writer)
    mirror = Mirror(control)
    async with asyncio.timeout(30.0):
        hello: dict[str, Any] = json.loads(await reader.readline())
    logs.configure(*hello["log"])
    values = hello["settings"]
    for name in ("denied_paths", "allowed_paths", "wake_on"):
        values[name] = frozenset(values[name])
    mirror.build(hello["pools"])
    if hello["config"] is None:
        server = ProxyServer(next(iter(mirror.pools.values())), Settings(**values))
    else:
        from plugin.proxy.endpoints.models import ModelRouter
        from plugin.proxy.endpoints.models_file import load

        server = ProxyServer(ModelRouter(load(Path(hello["config"])), mirror.pools), Settings(**values))

    async def gather() -> dict[str, Any]:
        try:
            document: dict[str, Any] = await control.request(2 * REPLY_S, op="gather")
        except (TimeoutError, ConnectionError) as exc:
            raise Unavailable("supervisor-silent", "the supervisor does not answer", retry_after_s=1.0) from exc
        return document

    async def act(pool: str, action: str) -> str:
        try:
            answer: dict[str, Any] = await control.request(ACTION_S, op="act", pool=pool, action=action)
        except (TimeoutError, ConnectionError) as exc:
            raise Unavailable("supervisor-silent", "the supervisor does not answer", retry_after_s=1.0) from exc
        if "code" in answer:
            raise error_of(answer)
        return str(answer["phase"])

    server.gather, server.act = gather, act
    if server.settings.admin_token is not None:
        server.sessions = Sessions(server.settings)
        server.sessions.announce = lambda session: control.send(op="signed-out", session=session)
    admin_sock = None if admin_fd is None else socket.socket(fileno=admin_fd)
    await server.start(socket.socket(fileno=listen_fd), admin_sock=admin_sock)
    ending: list[asyncio.Task[None]] = []

    def handle(message: dict[str, Any]) -> Awaitable[Any] | None:
        if message["op"] == "document":
            return status_document(server)
        if message["op"] == "signed-out":
            if server.sessions is not None:
                server.sessions.end(message["session"])
            return None
        if message["op"] == "shutdown":
            ending.append(asyncio.get_running_loop().create_task(server.shutdown(message["limit_s"])))
            return None
        return mirror.handle(message)

    loop = asyncio.get_running_loop()

    def on_sigterm() -> None:
        """Handle SIGTERM to this process or its group: finish the requests in flight and get replaced."""
        if not ending:
            control.send(op="leaving")
            server.replaced = True
            ending.append(loop.create_task(server.shutdown()))

    loop.add_signal_handler(signal.SIGTERM, on_sigterm)
    report = loop.create_task(mirror.report())
    listening = loop.create_task(control.run(handle))
    control.send(op="ready")
    stopped = loop.create_task(server.wait_stopped())
    await asyncio.wait((listening, report, stopped), return_when=asyncio.FIRST_COMPLETED)
    for task in (listening, report):
        if task.done() and (error := task.exception()) is not None:
            text = "control-failed: this worker cannot handle a message of its supervisor (%r); it ends and is replaced"
            log.error(text, error, exc_info=error, extra={"event": "defect"})
            control.send(op="leaving")
    if not ending:
        await server.shutdown()  # the supervisor has ended, or its messages cannot be handled
    await stopped
    report.cancel()
    listening.cancel()
    await asyncio.gather(report, listening, return_exceptions=True)


def main() -> None:
    """Run the worker process."""
    # Ignore the terminal's signals, which reach the whole group: the supervisor decides when a worker stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.configure()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(*(int(fd) for fd in sys.argv[1:])))


if __name__ == "__main__":
    main()
