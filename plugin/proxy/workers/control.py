"""The messages between the supervisor and its workers: JSON lines over a socket pair."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from plugin.proxy.errors import ProxyError, StartFailed

log = logging.getLogger("quickthaw.proxy")

REPLY_S = 2.0
ACTION_S = 86400.0
"""Limit of a move by hand; the pool has its own."""
LONGEST_LINE = 4 << 20


class ControlChannel:
    """One end of the connection between supervisor and worker: one JSON object per line, some of them requests with a reply."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._next = 0

    def send(self, **message: Any) -> None:
        """Send one message. A closed peer is detected by `run`."""
        if not self.writer.is_closing():
            self.writer.write(json.dumps(message).encode() + b"\n")

    async def request(self, limit_s: float, **message: Any) -> Any:
        """Send a request and return its reply. Raises TimeoutError, ConnectionError."""
        self._next += 1
        number = self._next
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        self.send(**message, request=number)
        try:
            async with asyncio.timeout(limit_s):
                return await future
        finally:
            del self._pending[number]

    async def run(self, handle: Callable[[dict[str, Any]], Awaitable[Any] | None]) -> None:
        """Read until the peer closes: route replies to their requests, all other messages to `handle`."""
        tasks: set[asyncio.Task[None]] = set()
        try:
            while line := await self.reader.readline():
                message = json.loads(line)
                if "reply" in message:
                    future = self._pending.get(message["reply"])
                    if future is not None and not future.done():
                        future.set_result(message.get("value"))
                    continue
                work = handle(message)
                if work is not None:
                    task = asyncio.ensure_future(self._reply(message, work))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        except ConnectionError:
            log.debug("a control connection was reset")
        finally:
            for task in tasks:
                task.cancel()
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(ConnectionError("the other process has gone"))
            self.writer.close()

    async def _reply(self, message: dict[str, Any], work: Awaitable[Any]) -> None:
        try:
            value = await work
        except Exception as error:
            text = "control-failed: %s: %r; please report it"
            log.exception(text, message.get("op"), error, extra={"event": "defect"})
            self.writer.close()  # the peer notices the close, and the worker is replaced
            return
        if "request" in message:
            self.send(reply=message["request"], value=value)


def error_message(error: ProxyError) -> dict[str, Any]:
    """Return a failed start as the fields of a message."""
    return {"code": error.code, "message": error.message, "retry_after_s": error.retry_after_s or 1.0}


def error_of(message: dict[str, Any]) -> StartFailed:
    """Return the failed start that a message describes."""
    return StartFailed(message["code"], message["message"], retry_after_s=message["retry_after_s"])
