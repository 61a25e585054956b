"""Tasks that run beside their owner until it closes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger("quickthaw.proxy")


class Background:
    """The tasks of one owner, on the running loop. One that fails is logged as an error with `text`, `event` and `fields`."""

    def __init__(self, text: str, event: str, **fields: str) -> None:
        self._text, self._event, self._fields = text, event, fields
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            extra = {"event": self._event, "fields": self._fields | {"reason": repr(error)}}
            log.error("%s", self._text, exc_info=error, extra=extra)

    def cancel(self) -> None:
        """Cancel every task."""
        for task in tuple(self._tasks):
            task.cancel()

    async def close(self) -> None:
        """Cancel every task and wait for its end."""
        self.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
