"""Run what an endpoint's configuration names: a wake or sleep command in a session of its own, or a URL to POST to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable

from plugin.proxy.endpoints.request import post_url
from plugin.proxy.endpoints.started_processes import Orphan
from plugin.proxy.errors import ProxyError, StartFailed

KILLED = "wake-command-killed"
"""Code of a wake whose command was ended by a signal, as by the kernel when memory is short."""


def command_ended(code: int | None) -> StartFailed:
    """Return the error of a wake command that ended before its engine was ready."""
    killed = code is not None and code < 0
    return StartFailed(KILLED if killed else "wake-command-failed", f"the wake command ended with code {code}")


async def spawn(command: str, environment: Iterable[tuple[str, str]]) -> asyncio.subprocess.Process:
    """Start a shell command in a session of its own, with `environment` added to this process's."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | dict(environment),
        )
    )
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Cancelled before the process was recorded: nothing else would end it.
        process = await starting
        signal_group(process, signal.SIGKILL)
        await process.wait()
        raise


async def run_command(command: str, environment: Iterable[tuple[str, str]], limit_s: float, what: str) -> None:
    """Run a shell command to its end within `limit_s` seconds. Raises StartFailed, with `what` in its code."""
    process = await spawn(command, environment)
    try:
        async with asyncio.timeout(limit_s):
            code = await process.wait()
    except TimeoutError:
        raise StartFailed(f"{what}-command-timeout", f"the {what} command ran over {limit_s:g} s") from None
    finally:
        if process.returncode is None:
            signal_group(process, signal.SIGKILL)
            await process.wait()
    if code != 0:
        raise StartFailed(f"{what}-command-failed", f"the {what} command ended with code {code}")


async def call_hook(url: str, limit_s: float, what: str) -> None:
    """POST to a URL. Raises StartFailed, with `what` in its code, unless it answers 2xx within `limit_s` seconds."""
    try:
        status = await post_url(url, limit_s=limit_s)
    except (OSError, ProxyError) as exc:
        raise StartFailed(f"{what}-hook-failed", f"the {what} hook could not be called: {exc}") from exc
    if not 200 <= status < 300:
        raise StartFailed(f"{what}-hook-failed", f"the {what} hook answered {status}")


def signal_group(process: asyncio.subprocess.Process | Orphan, number: signal.Signals) -> None:
    """Send a signal to the process group of a command, if it has not ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
