"""An endpoint that the proxy stands in front of but did not start itself: how it is brought up, known to be ready,
and put down.

The owner of one pool with one replica. It may be woken by a command (which may return, or stay as the engine itself),
by an HTTP hook, or by nobody (then the wake only waits for it). It is ready when its readiness path answers 200 and,
where a model is named, when a one-token generation succeeds.

Its phases are what can be seen from outside: starting (nothing listens), loading (listens, not ready), warming (the
generation is tried), serving, asleep; waking, when it was told to sleep and went on answering its readiness path (as
engines with a sleep mode do, so that path proves nothing until the wake has been called). What quickthaw itself
restores (`restores`) says its phases at `/-/status`, and they are followed.

Promises: at most one command of ours runs at a time, in a session of its own; when the endpoint is put down or
closed, its whole group ends; an engine of ours that ends by itself is known to be down at once; one that somebody else
starts or ends is known to be up or down within seconds, whether or not requests come (`watch`). What a proxy that was killed
has left running is taken over, or ended, by the next one (`started`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from plugin.proxy.endpoints.request import fetch, hook_place, post_url
from plugin.proxy.endpoints.started_processes import Orphan, Started, end
from plugin.proxy.endpoints.watch import Pace, Watch
from plugin.proxy.errors import ProxyError, StartFailed, UpstreamFault
from plugin.proxy.http.address import Upstream
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import FOUND_UP
from plugin.proxy.pool.start_times import History
from plugin.runtime.phases import Phase, PhaseTracker

log = logging.getLogger("quickthaw.proxy")

Wake = Callable[[], Awaitable[None]]
Guard = Callable[[str, Wake], Wake]

_PROBE_LIMIT_S = 2.0
_GENERATION_LIMIT_S = 60.0
_FIRST_GENERATION_LIMIT_S = 5.0
_STOP_GRACE_S = 10.0
_COLD = (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING)
_RESTORED = (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING)


def _pause_s(waited_s: float) -> float:
    """Between two looks at an endpoint that is not ready: a twentieth of what was waited, so that looking late costs
    little beside the start itself.
    """
    return min(0.5, max(0.02, waited_s / 20))


@dataclass(frozen=True)
class EndpointSpec:
    """What is known of an endpoint. `wake` and `sleep` are shell commands, `wake_url` and `sleep_url` are POSTed to.

    With both `wake` and `wake_url`, the command starts it when it is down, and the URL wakes it when it sleeps.
    """

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
    restores: bool = False
    """True for a `quickthaw restore`, which says its phases at `/-/status`."""
    admin_token: str | None = None
    """The token that `/-/status` asks for."""
    only_ours: bool = False
    """True where nobody but this proxy starts it: what listens at its port while it is down is something else."""
    pace: Pace = field(default_factory=Pace)
    key: str = ""
    """What the wake command is known by to the next proxy; empty: the command itself and its upstream."""

    def __post_init__(self) -> None:
        """Raises ValueError for a hook that is no URL."""
        for url in (self.wake_url, self.sleep_url):
            if url is not None:
                hook_place(url)

    @property
    def can_start(self) -> bool:
        """True when a request makes the proxy start or wake it, rather than wait for somebody else to."""
        return bool(self.wake or self.wake_url)

    @property
    def can_sleep(self) -> bool:
        """True when the proxy can put it down: by a command, a hook, or by ending the command that it woke it with."""
        return bool(self.sleep or self.sleep_url or self.wake)


class Endpoint:
    """Owns the pool of one endpoint."""

    def __init__(
        self, name: str, spec: EndpointSpec, *, room: Guard | None = None, history: History | None = None
    ) -> None:
        """`room` wraps the wake, for owners that limit how many endpoints are awake at once; `history` is what is
        known of its earlier starts.
        """
        self.name, self.spec = name, spec
        self.tracker = PhaseTracker(phase=Phase.ASLEEP)
        self._process: asyncio.subprocess.Process | Orphan | None = None
        self._started = Started(f"{name}\n{spec.key or (spec.wake, spec.upstream.name)}", spec.upstream.name)
        self._watcher: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.turn = 0
        self.acting = False
        self._slept = False
        """True from being told to sleep to the next successful wake: until then being ready proves nothing."""
        self.pool = ReplicaPool(
            name=name,
            wake=self._wake if room is None else room(name, self._wake),
            sleep=self._sleep if spec.can_sleep else None,
            idle_timeout_s=spec.idle_timeout_s,
            wake_limit_s=(spec.wake_limit_s + 5.0) if room is None else 86400.0,
            sleep_limit_s=spec.sleep_limit_s + _STOP_GRACE_S + 5.0,
            history=history,
        )
        self.pool.started_here = spec.can_start
        self.pool.add(name, self.tracker, spec.upstream)

    async def start(self) -> None:
        """Look once whether the endpoint is up already and what a killed proxy has left of it; watch it from then on."""
        await self._take_over()
        if await self.is_up():
            self.tracker.to(Phase.SERVING, FOUND_UP)
            self._watch()
        self._watching = asyncio.get_running_loop().create_task(Watch(self, self.spec.pace).run())

    async def _wake(self) -> None:
        with self._acts():
            await self.wake()

    async def _sleep(self) -> None:
        with self._acts():
            await self.sleep()

    @contextlib.contextmanager
    def _acts(self) -> Iterator[None]:
        self.turn += 1
        self.acting = True
        try:
            yield
        finally:
            self.acting = False

    async def _take_over(self) -> None:
        """Take over the engine of a proxy that was killed, where it is up at our upstream; else end it."""
        for record in self._started.orphans() if self.spec.wake is not None else ():
            try:
                orphan = Orphan(record.process)
            except OSError:
                continue  # it ended under our eyes
            takes = self._process is None and record.upstream == self.spec.upstream.name and await self.ready() is None
            what = "taking over" if takes else "ending"
            fields = {"pool": self.name, "pid": orphan.pid}
            text = "%s: %s process %d, which a proxy that was killed has left"
            log.warning(text, self.name, what, orphan.pid, extra={"event": "orphan", "fields": fields})
            if takes:
                self._process = orphan
                self._started.note(orphan.pid)
            else:
                await end(orphan)

    async def wake(self) -> None:
        """Bring the endpoint to serving.

        Raises:
            StartFailed: the command or hook failed, or the endpoint was not ready in time.
        """
        spec, tracker = self.spec, self.tracker
        began = time.monotonic()
        up = await self.ready() is None
        if up and not self._slept:
            if await self._answers():
                self.found_up()
                return
            self._slept = spec.wake_url is not None  # it is up and does not generate: if it sleeps, the hook helps
        asleep = up and self._slept
        ladder = _RESTORED if spec.restores else _COLD
        why = "woken" if spec.can_start else "waited for: nothing here starts it"
        tracker.to(Phase.WAKING if asleep and tracker.phase is Phase.ASLEEP else Phase.MOUNTING, why)
        try:
            if not up or self._slept:
                await self._kick(asleep)
            if tracker.phase is Phase.MOUNTING and not spec.restores:
                tracker.to(Phase.STARTING)
            await self._until_ready(began, asleep)
            if tracker.phase is Phase.WAKING:
                tracker.to(Phase.VERIFYING)
            if spec.ready_model is not None:
                if tracker.phase is not Phase.VERIFYING:
                    self._rise(ladder, ladder[-1])
                await self._generate(began)
            if tracker.phase is not Phase.VERIFYING:
                self._rise(ladder, ladder[-1])
            self._slept = False
            tracker.to(Phase.SERVING)
            self._watch()
        except BaseException as exc:
            cancelled = isinstance(exc, asyncio.CancelledError)
            tracker.to(Phase.FAILED, "cancelled" if cancelled else getattr(exc, "code", type(exc).__name__))
            await self._stop_process()
            raise

    async def sleep(self) -> None:
        """Put the endpoint down.

        Raises:
            StartFailed: the command or hook failed, and the endpoint goes on serving. One that answers no more is down
                whatever they said.
        """
        spec = self.spec
        running = self._process is not None and self._process.returncode is None
        if spec.sleep is None and spec.sleep_url is None and not running:
            raise StartFailed("no-way-to-sleep", "the wake command has returned, and there is no sleep command or hook")
        self._unwatch()
        try:
            if spec.sleep is not None:
                await self._command(spec.sleep, spec.sleep_limit_s, "sleep")
            elif spec.sleep_url is not None:
                await self._hook(spec.sleep_url, spec.sleep_limit_s, "sleep")
        except BaseException as exc:
            if not isinstance(exc, ProxyError) or await self.is_up():
                self._watch()
                raise
            fields = {"pool": self.name, "code": exc.code, "reason": exc.message}
            text = "%s: %s; it answers no more, and counts as asleep"
            log.warning(text, self.name, exc.message, extra={"event": "sleep-failed", "fields": fields})
        if spec.wake is None or spec.wake_url is None:
            await self._stop_process()  # otherwise it stays, asleep, for the wake hook
        self._slept = True
        self.tracker.to(Phase.ASLEEP)

    def kill(self) -> None:
        """End what this endpoint started, at once."""
        if self._process is not None and self._process.returncode is None:
            self._signal(self._process, signal.SIGKILL)

    async def close(self) -> None:
        """End what this endpoint started."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._unwatch()
        await self._stop_process()
        self.tracker.to(Phase.STOPPED)

    @property
    def upstream(self) -> Upstream:
        """Where it listens."""
        return self.spec.upstream

    @property
    def may_rise(self) -> bool:
        """Whether it may come up without us, and being ready then proves that it serves."""
        return not (self._slept or self.spec.only_ours)

    def lost(self, why: str) -> None:
        """It serves no longer: requests wait for the next wake."""
        fields = {"pool": self.name, "reason": why}
        log.warning("%s: engine-gone: %s", self.name, why, extra={"event": "engine-gone", "fields": fields})
        self.tracker.to(Phase.FAILED, f"engine-gone: {why}")

    def found_up(self) -> None:
        """It serves, and somebody else has started it."""
        if self.tracker.phase is Phase.ASLEEP:
            self.tracker.to(Phase.SERVING, FOUND_UP)
        elif self.tracker.phase is not Phase.SERVING:
            self.tracker.to(Phase.MOUNTING)
            self._rise(_COLD, Phase.WARMING)
            self.tracker.to(Phase.SERVING, FOUND_UP)

    def _rise(self, ladder: tuple[Phase, ...], phase: Phase) -> None:
        """Go up the ladder of a start to `phase`, step by step, as the state machine asks."""
        at = ladder.index(self.tracker.phase)
        for step in ladder[at + 1 : ladder.index(phase) + 1]:
            self.tracker.to(step)

    def _watch(self) -> None:
        """See to it that an engine of ours that ends is not taken for serving until somebody asks for it."""
        if self._process is not None:
            self._watcher = asyncio.get_running_loop().create_task(self._died(self._process))

    def _unwatch(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()

    async def _died(self, process: asyncio.subprocess.Process | Orphan) -> None:
        code = await process.wait()
        if self._process is process:
            self._started.forget()
        # A command that has started an engine elsewhere and returned is no death.
        if await self.ready() is not None and self._process is process and self.tracker.phase is Phase.SERVING:
            self.tracker.to(Phase.FAILED, f"engine-died: the wake command ended with code {code}")

    async def _kick(self, asleep: bool) -> None:
        spec = self.spec
        if spec.wake_url is not None and (asleep or spec.wake is None):
            await self._hook(spec.wake_url, spec.wake_limit_s, "wake")
        elif spec.wake is not None and (self._process is None or self._process.returncode is not None):
            self._unwatch()
            self._process = await self._spawn(spec.wake)
            self._started.note(self._process.pid)

    async def _until_ready(self, began: float, asleep: bool) -> None:
        """Return once it is ready. One that sleeps looks ready all the time: there the wake command must have ended,
        unless the endpoint was seen down in between.
        """
        proof = not asleep
        while True:
            process = self._process
            code = process.returncode if process is not None else 0
            why = await self.ready()
            if why is None and (proof or code == 0):
                return
            proof = proof or why is not None
            if why is not None and not why.startswith("refused"):
                await self._listens(why)
            if code not in (None, 0):
                raise StartFailed("wake-command-failed", f"the wake command ended with code {code}")
            waited = time.monotonic() - began
            if waited > self.spec.wake_limit_s:
                why = why or "the wake command goes on"
                raise StartFailed("wake-timeout", f"not ready after {self.spec.wake_limit_s:g} s: {why}")
            await asyncio.sleep(_pause_s(waited))

    async def _listens(self, why: str) -> None:
        """It answers, and is not ready: show how far it says it is."""
        if self.tracker.phase is Phase.STARTING:
            self.tracker.to(Phase.LOADING, why)
        if self.spec.restores and self.tracker.phase in _RESTORED:
            phase = await self._inner_phase()
            if phase in _RESTORED and _RESTORED.index(phase) > _RESTORED.index(self.tracker.phase):
                self._rise(_RESTORED, phase)

    async def _inner_phase(self) -> Phase | None:
        """The phase that a quickthaw behind this proxy says it is in; None when it says none that is known."""
        try:
            token = self.spec.admin_token
            _, body = await fetch(self.spec.upstream, "GET", "/-/status", limit_s=_PROBE_LIMIT_S, token=token)
            return Phase(json.loads(body)["pools"][0]["replicas"][0]["phase"])
        except (OSError, UpstreamFault, ValueError, LookupError, TypeError):
            return None

    async def ready(self) -> str | None:
        """None when the readiness path answers 200, else why not."""
        try:
            status, _ = await fetch(self.spec.upstream, "GET", self.spec.ready_path, limit_s=_PROBE_LIMIT_S)
        except UpstreamFault as exc:
            return exc.message
        except OSError as exc:
            return f"refused ({type(exc).__name__})"
        return None if status == 200 else f"{self.spec.ready_path} answers {status}"

    async def is_up(self) -> bool:
        """Whether it is ready and, where a model is named, generates."""
        return await self.ready() is None and await self._answers()

    async def _answers(self) -> bool:
        """True when it generates a token at once, or when no model is named to ask for one."""
        return self.spec.ready_model is None or await self._generation(_FIRST_GENERATION_LIMIT_S) is None

    async def _generate(self, began: float) -> None:
        """A real generation of one token: a bound port and a health page are not yet an engine that answers."""
        while (why := await self._generation(_GENERATION_LIMIT_S)) is not None:
            waited = time.monotonic() - began
            if waited > self.spec.wake_limit_s:
                raise StartFailed("wake-no-generation", f"no token after {self.spec.wake_limit_s:g} s: {why}")
            await asyncio.sleep(_pause_s(waited))

    async def _generation(self, limit_s: float) -> str | None:
        """None when one token was generated, else why not."""
        body = json.dumps({"model": self.spec.ready_model, "prompt": "a", "max_tokens": 1, "temperature": 0}).encode()
        try:
            status, answer = await fetch(self.spec.upstream, "POST", "/v1/completions", body, limit_s=limit_s)
        except (UpstreamFault, OSError) as exc:
            return f"{exc}" or type(exc).__name__
        return None if status == 200 else f"{status} {answer[:200].decode('utf-8', 'replace')}"

    async def _spawn(self, command: str) -> asyncio.subprocess.Process:
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                command,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | dict(self.spec.environment),
            )
        )
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # Cancelled between its start and this: nobody would know of it, and nobody would end it.
            process = await starting
            self._signal(process, signal.SIGKILL)
            await process.wait()
            raise

    async def _command(self, command: str, limit_s: float, what: str) -> None:
        process = await self._spawn(command)
        try:
            async with asyncio.timeout(limit_s):
                code = await process.wait()
        except TimeoutError:
            raise StartFailed(f"{what}-command-timeout", f"the {what} command ran over {limit_s:g} s") from None
        finally:
            if process.returncode is None:
                self._signal(process, signal.SIGKILL)
                await process.wait()
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
    def _signal(process: asyncio.subprocess.Process | Orphan, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, number)

    async def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            self._started.forget()
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
        self._started.forget()
