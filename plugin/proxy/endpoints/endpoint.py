"""An endpoint that the proxy serves but did not start itself: wake it, check that it is ready, put it to sleep.

It owns a pool with one replica. The wake is a command (which may return, or stay as the engine itself), an HTTP hook,
or nothing (it then only waits for the endpoint). The endpoint is ready when its readiness path answers 200 and, if a
model is named, a one-token generation succeeds.

Its phases are those visible from outside: starting (nothing listens), loading (listens, not ready), warming (the
generation is tried), serving, asleep. Waking: it was put to sleep but still answers its readiness path, as engines with
a sleep mode do; that path then proves nothing until the wake was called. A `quickthaw restore` (`restores`) reports its
phases at `/-/status`, and they are copied.

Guarantees: at most one wake command runs at a time, in a session of its own; its whole process group ends when the
endpoint is put to sleep or closed. The end of an engine started here is noticed at once. An engine started or ended by
others is noticed within seconds, with or without requests (`watch`). What a killed proxy has left running is taken over
or ended by the next proxy (`started_processes`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from plugin.proxy.endpoints.hooks import KILLED, call_hook, command_ended, run_command, signal_group, spawn
from plugin.proxy.endpoints.readiness import PATH_LIMIT_S, generation_fault, path_fault, pause_s
from plugin.proxy.endpoints.request import fetch, hook_place
from plugin.proxy.endpoints.restored import STANDBY_LIMIT_S, move
from plugin.proxy.endpoints.started_processes import Orphan, Started, end
from plugin.proxy.endpoints.watch import Watch, WatchIntervals
from plugin.proxy.errors import ProxyError, StartFailed, UpstreamFault
from plugin.proxy.http.address import Upstream
from plugin.proxy.pool.facts import Facts
from plugin.proxy.pool.pool import ReplicaPool
from plugin.proxy.pool.replica import FOUND_UP
from plugin.proxy.pool.start_times import History, Kind
from plugin.runtime.phases import Phase, PhaseTracker

log = logging.getLogger("quickthaw.proxy")

Wake = Callable[[], Awaitable[None]]
Guard = Callable[[str, Wake], Wake]

_GENERATION_LIMIT_S = 60.0
_FIRST_GENERATION_LIMIT_S = 5.0
_STOP_GRACE_S = 10.0
_COLD = (Phase.MOUNTING, Phase.STARTING, Phase.LOADING, Phase.WARMING)
_RESTORED = (Phase.MOUNTING, Phase.RESTORING, Phase.WAKING, Phase.VERIFYING)


@dataclass(frozen=True)
class EndpointSpec:
    """The configuration of an endpoint. `wake` and `sleep` are shell commands; `wake_url` and `sleep_url` are POSTed to.

    With both `wake` and `wake_url`, the command starts a stopped endpoint and the URL wakes a sleeping one.
    """

    upstream: Upstream
    wake: str | None = None
    sleep: str | None = None
    wake_url: str | None = None
    sleep_url: str | None = None
    ready_path: str = "/health"
    ready_model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    """The engine's key, for these two checks."""
    wake_limit_s: float = 600.0
    sleep_limit_s: float = 60.0
    sleep_after_s: float | None = None
    standby_after_s: float | None = None
    """Of one that `restores`: it goes to standby when it was idle for so long, and to make room."""
    environment: tuple[tuple[str, str], ...] = ()
    restores: bool = False
    """True for a `quickthaw restore`, which reports its phases at `/-/status`."""
    admin_token: str | None = None
    """The bearer token for `/-/status`."""
    exclusive_port: bool = False
    """True if only this proxy starts it: anything else that listens at its port is a different process."""
    intervals: WatchIntervals = field(default_factory=WatchIntervals)
    key: str = ""
    """Identifies the wake command to the next proxy; "" uses the command itself and its upstream."""
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        """Validate the hooks. Raises ValueError for one that is no URL."""
        for url in (self.wake_url, self.sleep_url):
            if url is not None:
                hook_place(url)

    @property
    def can_start(self) -> bool:
        """Return True if a request makes the proxy start or wake it, instead of waiting for others to do so."""
        return bool(self.wake or self.wake_url)

    @property
    def can_sleep(self) -> bool:
        """Return True if the proxy can put it to sleep: by a command, a hook, or by ending the wake command."""
        return bool(self.sleep or self.sleep_url or self.wake)


class Endpoint:
    """Own the pool of one endpoint."""

    def __init__(
        self, name: str, spec: EndpointSpec, *, room: Guard | None = None, history: History | None = None
    ) -> None:
        """`room` wraps the wake, for owners that limit how many endpoints are awake; `history` has its earlier start times."""
        self.name, self.spec = name, spec
        self.tracker = PhaseTracker(phase=Phase.ASLEEP)
        self._process: asyncio.subprocess.Process | Orphan | None = None
        self._started = Started(f"{name}\n{spec.key or (spec.wake, spec.upstream.name)}", spec.upstream.name)
        self._watcher: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self.actions = 0
        self.acting = False
        self._slept = False
        """True from a sleep to the next successful wake: until then a ready answer proves nothing."""
        self._key_refused: StartFailed | None = None
        """Set by a check that the engine refused for want of its key."""
        self.pool = ReplicaPool(
            name=name,
            wake=self._wake if room is None else room(name, self._wake),
            sleep=self._sleep if spec.can_sleep else None,
            standby=self._standby if spec.restores else None,
            sleep_after_s=spec.sleep_after_s,
            standby_after_s=spec.standby_after_s,
            wake_limit_s=(spec.wake_limit_s + 5.0) if room is None else 86400.0,
            sleep_limit_s=spec.sleep_limit_s + _STOP_GRACE_S + 5.0,
            history=history,
        )
        self.pool.sleeper.evicts_to_standby = spec.standby_after_s is not None
        self.pool.started_here = spec.can_start
        self.pool.facts = lambda: spec.facts
        self.pool.next_kind = self._next_kind
        replica = self.pool.add(name, self.tracker, spec.upstream)
        replica.engine_pid = self._pid

    async def start(self) -> None:
        """Take over what a killed proxy left running, check if the endpoint is up, and watch it from then on."""
        await self._take_over()
        if await self.is_up():
            self.tracker.to(Phase.SERVING, FOUND_UP)
            self._watch()
        self._watching = asyncio.get_running_loop().create_task(Watch(self, self.spec.intervals).run())

    def _next_kind(self) -> Kind | None:
        if self.tracker.phase is Phase.STANDBY:
            return Kind.WOKEN
        return Kind.RESTORED if self.spec.restores else None

    async def _wake(self) -> None:
        with self._acting():
            if await self._continue():
                return
            try:
                await self.wake()
            except StartFailed as error:
                if not self.spec.restores or error.code != KILLED:
                    raise
                log.warning("%s: %s; it is restored once more", self.name, error.message)
                await self.wake()

    async def _continue(self) -> bool:
        """Continue an engine in standby and return True; return False, with nothing left of it, if there is none or it was lost."""
        spec, tracker = self.spec, self.tracker
        if tracker.phase is not Phase.STANDBY:
            return False
        tracker.to(Phase.WAKING, "woken")
        try:
            await move(spec.upstream, spec.admin_token, "wake", spec.wake_limit_s)
        except BaseException as error:
            tracker.to(Phase.FAILED, getattr(error, "code", type(error).__name__))
            self._unwatch()
            await self._stop_process()
            if not isinstance(error, StartFailed):
                raise
            fields, text = {"pool": self.name, "code": error.code}, "%s: standby-lost: %s; it is restored"
            log.warning(text, self.name, error.message, extra={"event": "standby-lost", "fields": fields})
            return False
        tracker.to(Phase.SERVING)
        return True

    async def _standby(self) -> None:
        with self._acting():
            await move(self.spec.upstream, self.spec.admin_token, "standby", STANDBY_LIMIT_S)
            self.tracker.to(Phase.STANDBY)

    async def _sleep(self) -> None:
        with self._acting():
            await self.sleep()

    @contextlib.contextmanager
    def _acting(self) -> Iterator[None]:
        self.actions += 1
        self.acting = True
        try:
            yield
        finally:
            self.acting = False

    async def _take_over(self) -> None:
        """Take over a killed proxy's engine that is up at this upstream; end any other that it left."""
        for record in self._started.orphans() if self.spec.wake is not None else ():
            try:
                orphan = Orphan(record.process)
            except OSError:
                continue  # it has ended in the meantime
            takes = self._process is None and record.upstream == self.spec.upstream.name and await self.ready() is None
            what = "taking over" if takes else "ending"
            fields = {"pool": self.name, "pid": orphan.pid}
            text = "%s: %s process %d, left by a killed proxy"
            log.warning(text, self.name, what, orphan.pid, extra={"event": "orphan", "fields": fields})
            if takes:
                self._process = orphan
                self._started.note(orphan.pid)
            else:
                await end(orphan)

    async def wake(self) -> None:
        """Bring the endpoint to serving.

        Raises StartFailed when the command or hook failed, or the endpoint was not ready in time.
        """
        spec, tracker = self.spec, self.tracker
        began = time.monotonic()
        up = await self.ready() is None
        if up and not self._slept:
            if await self._answers():
                self.mark_up()
                return
            self._slept = spec.wake_url is not None  # up but not generating: if it sleeps, the hook wakes it
        asleep = up and self._slept
        phases = _RESTORED if spec.restores else _COLD
        why = "woken" if spec.can_start else "waited for: nothing here starts it"
        tracker.to(Phase.WAKING if asleep and tracker.phase is Phase.ASLEEP else Phase.MOUNTING, why)
        try:
            if not up or self._slept:
                await self._start_or_wake(asleep)
            if tracker.phase is Phase.MOUNTING and not spec.restores:
                tracker.to(Phase.STARTING)
            await self._until_ready(began, asleep)
            if tracker.phase is Phase.WAKING:
                tracker.to(Phase.VERIFYING)
            if spec.ready_model is not None:
                if tracker.phase is not Phase.VERIFYING:
                    self._advance(phases, phases[-1])
                await self._generate(began)
            if tracker.phase is not Phase.VERIFYING:
                self._advance(phases, phases[-1])
            self._slept = False
            tracker.to(Phase.SERVING, "" if spec.can_start else FOUND_UP)
            self._watch()
        except BaseException as exc:
            cancelled = isinstance(exc, asyncio.CancelledError)
            tracker.to(Phase.FAILED, "cancelled" if cancelled else getattr(exc, "code", type(exc).__name__))
            await self._stop_process()
            raise

    async def sleep(self) -> None:
        """Put the endpoint to sleep.

        Raises StartFailed when the command or hook failed and the endpoint still serves. An endpoint that no longer
        answers counts as asleep regardless.
        """
        spec = self.spec
        running = self._process is not None and self._process.returncode is None
        if spec.sleep is None and spec.sleep_url is None and not running:
            raise StartFailed("no-way-to-sleep", "the wake command has returned, and there is no sleep command or hook")
        self._unwatch()
        try:
            if spec.sleep is not None:
                await run_command(spec.sleep, spec.environment, spec.sleep_limit_s, "sleep")
            elif spec.sleep_url is not None:
                await call_hook(spec.sleep_url, spec.sleep_limit_s, "sleep")
        except BaseException as exc:
            if not isinstance(exc, ProxyError) or await self.is_up():
                self._watch()
                raise
            fields = {"pool": self.name, "code": exc.code, "reason": exc.message}
            text = "%s: %s; it no longer answers and counts as asleep"
            log.warning(text, self.name, exc.message, extra={"event": "sleep-failed", "fields": fields})
        if spec.wake is None or spec.wake_url is None:
            await self._end_engine()  # otherwise it stays, asleep, for the wake hook
        self._slept = True
        self.tracker.to(Phase.ASLEEP)

    def kill(self) -> None:
        """Kill the process group started here, at once."""
        if self._process is not None and self._process.returncode is None:
            signal_group(self._process, signal.SIGKILL)

    async def close(self) -> None:
        """Stop watching and end the process group started here."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._unwatch()
        await self._end_engine()
        self.tracker.to(Phase.STOPPED)

    def _pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def upstream(self) -> Upstream:
        """Return the endpoint's address."""
        return self.spec.upstream

    @property
    def may_start_elsewhere(self) -> bool:
        """Return True if others may start it, and a ready answer then proves that it serves."""
        return not (self._slept or self.spec.exclusive_port)

    def mark_lost(self, why: str) -> None:
        """Mark it as failed because it no longer serves; requests wait for the next wake."""
        fields = {"pool": self.name, "reason": why}
        log.warning("%s: engine-gone: %s", self.name, why, extra={"event": "engine-gone", "fields": fields})
        self.tracker.to(Phase.FAILED, f"engine-gone: {why}")

    def mark_up(self) -> None:
        """Mark it as serving, because others have started it."""
        if self.tracker.phase is Phase.ASLEEP:
            self.tracker.to(Phase.SERVING, FOUND_UP)
        elif self.tracker.phase is not Phase.SERVING:
            self.tracker.to(Phase.MOUNTING)
            self._advance(_COLD, Phase.WARMING)
            self.tracker.to(Phase.SERVING, FOUND_UP)

    def _advance(self, phases: tuple[Phase, ...], phase: Phase) -> None:
        """Make the transitions of a start up to `phase`, one by one, as the state machine requires."""
        at = phases.index(self.tracker.phase)
        for step in phases[at + 1 : phases.index(phase) + 1]:
            self.tracker.to(step)

    def _watch(self) -> None:
        """Watch the process started here, so that its end is noticed before the next request."""
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
        # A wake command may start an engine elsewhere and return; that is not a death.
        watched = (Phase.SERVING, Phase.STANDBY)
        if await self.ready() is not None and self._process is process and self.tracker.phase in watched:
            self.tracker.to(Phase.FAILED, f"engine-died: the wake command ended with code {code}")

    async def _start_or_wake(self, asleep: bool) -> None:
        spec = self.spec
        if spec.wake_url is not None and (asleep or spec.wake is None):
            await call_hook(spec.wake_url, spec.wake_limit_s, "wake")
        elif spec.wake is not None and (self._process is None or self._process.returncode is not None):
            self._unwatch()
            self._process = await spawn(spec.wake, spec.environment)
            self._started.note(self._process.pid)

    async def _until_ready(self, began: float, asleep: bool) -> None:
        """Return once it is ready. Raises StartFailed.

        A sleeping endpoint always looks ready. There, the wake command must have ended, or the endpoint was seen down
        in between.
        """
        proof = not asleep
        while True:
            process = self._process
            code = process.returncode if process is not None else 0
            self._key_refused = None
            why = await self.ready()
            if self._key_refused is not None:
                raise self._key_refused
            if why is None and (proof or code == 0):
                return
            proof = proof or why is not None
            if why is not None and not why.startswith("refused"):
                await self._note_unready(why)
            if code not in (None, 0):
                raise command_ended(code)
            waited = time.monotonic() - began
            if waited > self.spec.wake_limit_s:
                why = why or "the wake command still runs"
                raise StartFailed("wake-timeout", f"not ready after {self.spec.wake_limit_s:g} s: {why}")
            await asyncio.sleep(pause_s(waited))

    async def _note_unready(self, why: str) -> None:
        """Update the phase of an endpoint that answers but is not ready."""
        if self.tracker.phase is Phase.STARTING:
            self.tracker.to(Phase.LOADING, why)
        if self.spec.restores and self.tracker.phase in _RESTORED:
            phase = await self._reported_phase()
            if phase in _RESTORED and _RESTORED.index(phase) > _RESTORED.index(self.tracker.phase):
                self._advance(_RESTORED, phase)

    async def _reported_phase(self) -> Phase | None:
        """Return the phase that a quickthaw behind this proxy reports, or None if it reports none that is known."""
        try:
            token = self.spec.admin_token
            _, body = await fetch(self.spec.upstream, "GET", "/-/status", limit_s=PATH_LIMIT_S, token=token)
            return Phase(json.loads(body)["pools"][0]["replicas"][0]["phase"])
        except (OSError, UpstreamFault, ValueError, LookupError, TypeError):
            return None

    async def ready(self) -> str | None:
        """Return None if the readiness path answers 200, else the reason."""
        if (taken := self._port_taken()) is not None:
            return taken
        try:
            why = await path_fault(self.spec.upstream, self.spec.ready_path, self.spec.api_key)
        except StartFailed as error:
            self._key_refused, why = error, error.message
        # Check again: another user may have taken the port between the first check and the probe.
        return self._port_taken() if why is None else why

    def _port_taken(self) -> str | None:
        """Return why the port must not be probed: another user listens there instead of our engine. None if not so, or unknown."""
        process = self._process
        if not self.spec.exclusive_port or self.spec.upstream.spec is None:
            return None
        if process is not None and process.returncode == 0:
            return None  # the command started the engine elsewhere
        from plugin.proxy.endpoints.port_owner import foreign_listener

        try:
            stranger = foreign_listener(
                int(self.spec.upstream.spec["port"]), process.pid if process is not None else None
            )
        except OSError:
            return None
        return None if stranger is None else f"refused (engine-port-taken: user {stranger} listens at its port)"

    async def is_up(self) -> bool:
        """Return True if it is ready and, if a model is named, generates a token."""
        return await self.ready() is None and await self._answers()

    async def _answers(self) -> bool:
        """Return True if it generates a token within 5 s, or if no model is named."""
        try:
            return await self._generation(_FIRST_GENERATION_LIMIT_S) is None
        except StartFailed as error:
            self._key_refused = error
            return False

    async def _generate(self, began: float) -> None:
        """Wait until it generates one token: a bound port and a health page do not prove that an engine answers.

        Raises StartFailed: wake-no-generation at the wake's time limit; api-key-refused.
        """
        while (why := await self._generation(_GENERATION_LIMIT_S)) is not None:
            waited = time.monotonic() - began
            if waited > self.spec.wake_limit_s:
                public = f"no token after {self.spec.wake_limit_s:g} s"
                raise StartFailed("wake-no-generation", f"{public}; see the proxy's log", detail=f"{public}: {why}")
            await asyncio.sleep(pause_s(waited))

    async def _generation(self, limit_s: float) -> str | None:
        """Return None if one token was generated or no model is named, else the reason. Raises StartFailed (api-key-refused)."""
        spec = self.spec
        if spec.ready_model is None:
            return None
        return await generation_fault(spec.upstream, spec.ready_model, spec.api_key, limit_s)

    async def _end_engine(self) -> None:
        """End the process group started here. An engine that its snapshot restores is killed: it has nothing to save.

        Stopped in order, an engine takes seconds, and whoever needs its place waits for them.
        """
        process = self._process
        if self.spec.restores and process is not None and process.returncode is None:
            try:
                await move(self.spec.upstream, self.spec.admin_token, "sleep", _STOP_GRACE_S)
            except StartFailed as error:
                log.debug("%s: %s; it is stopped in order", self.name, error.message)
        await self._stop_process()

    async def _stop_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            self._started.forget()
            return  # the command has returned, so its group number may be reused
        signal_group(process, signal.SIGTERM)
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await process.wait()
        except TimeoutError:
            fields = {"pool": self.name, "reason": f"no end {_STOP_GRACE_S:g} s after SIGTERM"}
            log.warning("%s: killed, %s", self.name, fields["reason"], extra={"event": "killed", "fields": fields})
        signal_group(process, signal.SIGKILL)
        await process.wait()
        self._started.forget()
