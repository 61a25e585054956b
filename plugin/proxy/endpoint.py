"""An endpoint that the proxy stands in front of but did not start itself: how it is brought up, known to be ready,
and put down.

The owner of one pool with one replica. It may be woken by a command (which may return, or stay as the engine itself),
by an HTTP hook, or by
nobody (then the wake only waits for it). It is ready when its readiness path answers 200 and, where a model is named,
when a one-token
generation succeeds. Its phases are what can be seen from outside: starting (nothing listens), loading (listens, not
ready), warming (the
generation is tried), serving, asleep.

Promises: at most one command of ours runs at a time, in a session of its own; when the endpoint is put down or
closed, its whole group ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from plugin.phases import Phase, PhaseTracker

from .errors import ProxyError, StartFailed, UpstreamFault
from .fetch import fetch, post_url
from .pool import ReplicaPool
from .upstream import Upstream

log = logging.getLogger("quickthaw.proxy")

Wake = Callable[[], Awaitable[None]]
Guard = Callable[[str, Wake], Wake]

_PROBE_LIMIT_S = 2.0
_GENERATION_LIMIT_S = 60.0
_POLL_S = (0.02, 0.05, 0.1, 0.1, 0.2, 0.25)
_STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class EndpointSpec:
    """What is known of an endpoint. `wake` and `sleep` are shell commands, `wake_url` and `sleep_url` are POSTed to."""

    upstream: Upstream
    wake: str | None = None
    sleep: str | None = None
    wake_url: str | None = None
    sleep_url: str | None = None
    ready_path: str = "/health"
    ready_model: str | None = None
    wake_limit_s: float = 600.0
    sleep_limit_s: float = 60.0
    idle_timeout_s: float | None = None
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def can_sleep(self) -> bool:
        """True when the proxy can put it down: by a command, a hook, or by ending the command that it woke it with."""
        return bool(self.sleep or self.sleep_url or self.wake)


class Endpoint:
    """Owns the pool of one endpoint."""

    def __init__(self, name: str, spec: EndpointSpec, *, room: Guard | None = None) -> None:
        """`room` wraps the wake, for owners that limit how many endpoints are awake at once."""
        self.name, self.spec = name, spec
        self.tracker = PhaseTracker(phase=Phase.ASLEEP)
        self._process: asyncio.subprocess.Process | None = None
        self.pool = ReplicaPool(
            name=name,
            wake=self.wake if room is None else room(name, self.wake),
            sleep=self.sleep if spec.can_sleep else None,
            idle_timeout_s=spec.idle_timeout_s,
            wake_limit_s=(spec.wake_limit_s + 5.0) if room is None else 86400.0,
            sleep_limit_s=spec.sleep_limit_s + _STOP_GRACE_S + 5.0,
        )
        self.pool.add(name, self.tracker, spec.upstream)

    async def start(self) -> None:
        """Look once whether the endpoint is up already."""
        if await self._ready() is None:
            self.tracker.to(Phase.SERVING, "found up")

    async def wake(self) -> None:
        """Bring the endpoint to serving.

        Raises:
            StartFailed: the command or hook failed, or the endpoint was not ready in time.
        """
        if await self._ready() is None:
            self._found_up()
            return
        spec, tracker = self.spec, self.tracker
        began = time.monotonic()
        tracker.to(Phase.MOUNTING, "woken")
        try:
            await self._kick()
            tracker.to(Phase.STARTING)
            await self._until_ready(began)
            if spec.ready_model is not None:
                await self._generate(began)
            self._rise(Phase.WARMING)
            tracker.to(Phase.SERVING)
        except BaseException as exc:
            tracker.to(Phase.FAILED, getattr(exc, "code", type(exc).__name__))
            await self._stop_process()
            raise

    async def sleep(self) -> None:
        """Put the endpoint down. Raises StartFailed when the command or hook fails; it then goes on serving."""
        spec = self.spec
        running = self._process is not None and self._process.returncode is None
        if spec.sleep is None and spec.sleep_url is None and not running:
            raise StartFailed("no-way-to-sleep", "the wake command has returned, and there is no sleep command or hook")
        if spec.sleep is not None:
            await self._command(spec.sleep, spec.sleep_limit_s, "sleep")
        elif spec.sleep_url is not None:
            await self._hook(spec.sleep_url, spec.sleep_limit_s, "sleep")
        await self._stop_process()
        self.tracker.to(Phase.ASLEEP)

    def kill(self) -> None:
        """End what this endpoint started, at once."""
        if self._process is not None and self._process.returncode is None:
            self._signal(self._process, signal.SIGKILL)

    async def close(self) -> None:
        """End what this endpoint started."""
        await self._stop_process()
        self.tracker.to(Phase.STOPPED)

    def _found_up(self) -> None:
        if self.tracker.phase is Phase.ASLEEP:
            self.tracker.to(Phase.SERVING, "found up")
        elif self.tracker.phase is not Phase.SERVING:
            self.tracker.to(Phase.MOUNTING)
            self._rise(Phase.WARMING)
            self.tracker.to(Phase.SERVING, "found up")

    def _rise(self, phase: Phase) -> None:
        """Go up the ladder of a start to `phase`, step by step, as the state machine asks."""
        ladder = (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING)
        at = ladder.index(self.tracker.phase)
        for step in ladder[at + 1 : ladder.index(phase) + 1]:
            self.tracker.to(step)

    async def _kick(self) -> None:
        spec = self.spec
        if spec.wake is not None and (self._process is None or self._process.returncode is not None):
            self._process = await self._spawn(spec.wake)
        if spec.wake_url is not None:
            await self._hook(spec.wake_url, spec.wake_limit_s, "wake")

    async def _until_ready(self, began: float) -> None:
        tries = 0
        while True:
            why = await self._ready()
            if why is None:
                return
            if not why.startswith("refused") and self.tracker.phase is Phase.STARTING:
                self.tracker.to(Phase.LOADING, why)
            process = self._process
            if process is not None and process.returncode not in (None, 0):
                raise StartFailed("wake-command-failed", f"the wake command ended with code {process.returncode}")
            if time.monotonic() - began > self.spec.wake_limit_s:
                raise StartFailed("wake-timeout", f"not ready after {self.spec.wake_limit_s:g} s: {why}")
            await asyncio.sleep(_POLL_S[min(tries, len(_POLL_S) - 1)])
            tries += 1

    async def _ready(self) -> str | None:
        """None when the readiness path answers 200, else why not."""
        try:
            status, _ = await fetch(self.spec.upstream, "GET", self.spec.ready_path, limit_s=_PROBE_LIMIT_S)
        except UpstreamFault as exc:
            return exc.message
        except OSError as exc:
            return f"refused ({type(exc).__name__})"
        return None if status == 200 else f"{self.spec.ready_path} answers {status}"

    async def _generate(self, began: float) -> None:
        """A real generation of one token: a bound port and a health page are not yet an engine that answers."""
        self._rise(Phase.WARMING)
        body = json.dumps({"model": self.spec.ready_model, "prompt": "a", "max_tokens": 1, "temperature": 0}).encode()
        tries = 0
        while True:
            try:
                status, answer = await fetch(
                    self.spec.upstream, "POST", "/v1/completions", body, limit_s=_GENERATION_LIMIT_S
                )
                if status == 200:
                    return
                why = f"{status} {answer[:200].decode('utf-8', 'replace')}"
            except (UpstreamFault, OSError) as exc:
                why = f"{exc}" or type(exc).__name__
            if time.monotonic() - began > self.spec.wake_limit_s:
                raise StartFailed("wake-no-generation", f"no token after {self.spec.wake_limit_s:g} s: {why}")
            await asyncio.sleep(_POLL_S[min(tries, len(_POLL_S) - 1)])
            tries += 1

    async def _spawn(self, command: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | dict(self.spec.environment),
        )

    async def _command(self, command: str, limit_s: float, what: str) -> None:
        process = await self._spawn(command)
        try:
            async with asyncio.timeout(limit_s):
                code = await process.wait()
        except TimeoutError:
            self._signal(process, signal.SIGKILL)
            await process.wait()
            raise StartFailed(f"{what}-command-timeout", f"the {what} command ran over {limit_s:g} s") from None
        if code != 0:
            raise StartFailed(f"{what}-command-failed", f"the {what} command ended with code {code}")

    async def _hook(self, url: str, limit_s: float, what: str) -> None:
        try:
            status = await post_url(url, limit_s=limit_s)
        except (OSError, ProxyError) as exc:
            raise StartFailed(f"{what}-hook-failed", f"the {what} hook could not be called: {exc}") from exc
        if not 200 <= status < 300:
            raise StartFailed(f"{what}-hook-failed", f"the {what} hook answered {status}")

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, number)

    async def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return  # a command that returned has left its group's number to whoever comes next
        self._signal(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await process.wait()
        except TimeoutError:
            fields = {"pool": self.name, "reason": f"no end {_STOP_GRACE_S:g} s after SIGTERM"}
            log.warning("%s: killed, %s", self.name, fields["reason"], extra={"event": "killed", "fields": fields})
        self._signal(process, signal.SIGKILL)
        await process.wait()
