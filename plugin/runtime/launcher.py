"""Run a launch: start each replica in a thread, run the proxy on the event loop, handle signals, shut down.

Order matters: the port is bound and the restoring thread is running before the proxy's modules are imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoint.errors import CheckpointError
from checkpoint.sandbox import freezer, prestart
from checkpoint.snapshot import speculative
from launchers.errors import EngineDied, LauncherError
from plugin.runtime.batch_rounding import may_share_a_step
from plugin.runtime.config import LaunchSettings
from plugin.runtime.phases import Phase, PhaseTracker
from plugin.runtime.replica import SERVES, Replica
from plugin.runtime.restore_limit import RestoreLimit
from plugin.runtime.signals import stopping
from plugin.runtime.steps.model_mount import Weights

if TYPE_CHECKING:
    import asyncio

    from checkpoint.criu.binary import Criu
    from launchers.base import Engine
    from plugin.proxy.pool.pool import ReplicaPool
    from plugin.proxy.pool.replica import Replica as ProxyReplica
    from plugin.proxy.server import ProxyServer
    from plugin.proxy.tls import Certificates
    from plugin.runtime.capabilities import Capabilities

log = logging.getLogger("quickthaw")
RESTARTS_IN_A_MINUTE = 3
SWEEP_AFTER_S = 5.0
CANCEL_LIMIT_S = 5.0
TWICE_REPORTED_S = 1.0
"""A signal that arrives while the event loop starts is reported by the early handler and once more by the loop, within this time."""
CONNECTING_WAIT_S = 0.5
OWN_END_GRACE_S = 10.0
"""Seconds that clients have to read their last answers where the launch ends by itself, as no engine serves any more."""
REHEARSE_AFTER_S = 1.0
UNDERWAY_S = 0.2
"""Seconds the event loop's imports (60 ms) wait until the restoring thread has started CRIU. Both threads compete for the GIL."""


@dataclass
class Launch:
    """Own one running launch: its replicas, the pool in front of them, and the shutdown."""

    settings: LaunchSettings
    sock: socket.socket | None
    """The port; set after `install_signal_handlers`, since whoever has connected must get an answer."""
    capabilities: Capabilities
    admin_sock: socket.socket | None = None
    certificates: Certificates | None = None
    """TLS of `sock`."""
    bound: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What listening takes: the sockets, and the file of a UNIX socket."""
    replicas: list[Replica] = field(default_factory=list)
    weights: Weights | None = None
    exit_code: int = 0
    stdout: int | None = 1
    stderr: int | None = 2

    def __post_init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: ReplicaPool | None = None
        self._server: ProxyServer | None = None
        self._ending = threading.Event()
        self._stop: asyncio.Event | None = None
        self._signalled_once = False
        self._early_signal_at = 0.0
        """When a signal arrived before the event loop had its own handlers; 0.0 if none did."""
        self._deaths: dict[int, list[float]] = {}
        """Times at which each replica's engine died, by replica index; deaths caused by a failed page server are not counted."""
        self._began = time.monotonic()
        self._accepts_since = 0.0
        self._failure: Exception | None = None
        self._starting = 0
        self._counting = threading.Lock()
        self._shares_steps = may_share_a_step()
        self._restore_limit = RestoreLimit(self.settings.restore_concurrency)

    # Replicas: each start runs in a thread

    def begin(self, criu: Criu | None, engine: Engine, weights: Weights) -> None:
        """Start each replica in a thread. Restores are throttled; without a snapshot the others wait for the first replica's."""
        self.weights = weights
        each = [self.settings]
        if self.settings.replicas > 1:
            from plugin.runtime.gpu.placement import settings_by_replica  # asks NVML: a single replica need not wait

            each = settings_by_replica(self.settings)
        for index, settings in enumerate(each):
            tracker = PhaseTracker()
            replica = Replica(
                settings, engine, self.capabilities, criu, weights, tracker, stdout=self.stdout, stderr=self.stderr
            )
            replica.on_death = self._death_handler(replica)
            replica.expects = self._expects
            tracker.listen(self._phase_logger(index))
            self.replicas.append(replica)
        threading.Thread(target=self._start_all, name="starter", daemon=True).start()

    def _expects(self) -> bool:
        """Return True if a request is waiting, or a client has connected that the proxy has not accepted yet.

        A client that connects before the proxy accepts has most likely sent a request already.
        """
        if not self._shares_steps:
            return False
        return (self._pool is not None and self._pool.wants_speculation()) or self._connecting()

    def _connecting(self) -> bool:
        """Return True if the listening socket has a connection that the proxy has not accepted yet."""
        if self.sock is None:
            return False
        connections = select.poll()
        try:
            connections.register(self.sock, select.POLLIN)
        except ValueError:  # closed: the launch is shutting down
            return False
        return bool(connections.poll(0))

    def _phase_logger(self, index: int) -> Callable[[Phase, Phase, str], None]:
        who = f"replica {index}: " if self.settings.replicas > 1 else ""

        def log_phase(old: Phase, new: Phase, reason: str) -> None:
            took = time.monotonic() - self._began
            # The code that decides what happens next logs the reason of a failure.
            log.info("%s%s (%.2f s)%s", who, new, took, f": {reason}" if reason and new is not Phase.FAILED else "")

        return log_phase

    def _start_all(self) -> None:
        first, *others = self.replicas
        threading.Thread(target=self._sweep, name="sweeper", daemon=True).start()
        first_done = threading.Event()
        together = others and self._can_restore(first)
        # Count all starts before they run: a start that fails at once must not end the launch.
        self._count(len(self.replicas) if together else 1)
        with contextlib.ExitStack() as slot:
            if together:
                # The first replica acquires a slot first: it uses the pre-started helper processes.
                slot.enter_context(self._restore_limit.slot(first.tracker))
                self._start_in_threads(others, first_done.wait)
            try:
                served = self._start_counted(first)
            finally:
                first_done.set()
        if served and not together:
            self._count(len(others))
            self._start_in_threads(others, None)

    def _count(self, more: int) -> int:
        """Add `more` to the number of starts in progress and return the sum."""
        with self._counting:
            self._starting += more
            return self._starting

    def _start_in_threads(self, replicas: list[Replica], before_cold: Callable[[], object] | None) -> None:
        for replica in replicas:
            threading.Thread(target=self._start_throttled, args=(replica, before_cold), daemon=True).start()

    @staticmethod
    def _can_restore(replica: Replica) -> bool:
        try:
            return replica.restorable() is not None
        except (CheckpointError, LauncherError, OSError):
            return False  # the start itself logs the reason

    def _sweep(self) -> None:
        """Remove what killed launches left, once this launch has had SWEEP_AFTER_S seconds to start."""
        self._ending.wait(SWEEP_AFTER_S)
        with contextlib.suppress(OSError):
            self.replicas[0].library.sweep()
            freezer.sweep()

    def _start_one(self, replica: Replica) -> bool:
        self._count(1)
        return self._start_throttled(replica)

    def _start_throttled(self, replica: Replica, before_cold: Callable[[], object] | None = None) -> bool:
        with self._restore_limit.slot(replica.tracker):
            return self._start_counted(replica, before_cold)

    def _start_counted(self, replica: Replica, before_cold: Callable[[], object] | None = None) -> bool:
        failure: Exception | None = None
        try:
            replica.start(before_cold)
        except (CheckpointError, LauncherError) as error:
            failure = error
        except Exception as error:
            # A stop interrupts a start at any point, so any exception may follow; do not report it as a defect.
            if not self._ending.is_set():
                log.exception("a defect in quickthaw; please report it")
            failure = error
        others = self._count(-1)
        speculative.discard()
        if failure is not None:
            self._start_failed(failure, others)
            return False
        prestart.end_start_phase()
        if self._ending.is_set():
            return False  # the shutdown stops it with the usual grace period
        _remember(self.settings, replica, time.monotonic() - self._began)
        if self.weights:
            self.weights.keep_in_store()
        return True

    def _start_failed(self, error: Exception, others: int) -> None:
        """End the launch, unless another replica serves or `others` (a count) are still starting."""
        if self._ending.is_set():
            log.debug("the stop interrupted a start: %s", error)
            return
        if others or any(r.tracker.phase in SERVES for r in self.replicas):
            log.error("%s", error)
            return
        self._failure = error
        code = _shell_code(error.exit_code) if isinstance(error, EngineDied) else 0
        self.exit_code = code if 0 < code < 256 else 1
        self.end()

    def _death_handler(self, replica: Replica) -> Callable[[int], None]:
        def died(code: int) -> None:
            self._restart(replica, code)

        return died

    def _restart(self, replica: Replica, code: int) -> None:
        """Restart a replica whose engine ended while it served, unless the engine keeps dying.

        A failed page server does not count as a death: the restore that follows does not use one.
        """
        how = f"signal {-code}" if code < 0 else f"code {code}"
        lost, silent = replica.page_server_failure(), replica.silent
        died = f"replica-silent: {silent}" if silent else f"engine-died: it ended with {how}"
        replica.tracker.to(Phase.FAILED, f"pages-lost: {lost}" if lost else died)
        if self._ending.is_set():
            return
        who = self._log_prefix(replica)
        if lost:
            log.warning("%sits pages were lost while it served; restoring all pages first", who)
        elif (deaths := self._died(replica)) > RESTARTS_IN_A_MINUTE:
            self._give_up(replica, deaths, how, code)
            return
        elif not silent:
            log.warning("%sthe engine ended with %s while it served; restarting it", who, how)
        replica.clear()
        self._start_one(replica)

    def _silent(self, behind: ProxyReplica, why: str) -> None:
        """Kill a replica that no longer answers; `on_death` then restarts it. Runs on the event loop."""
        replica = self.replicas[int(behind.name.removeprefix("r"))]
        log.warning("%sreplica-silent: %s; restarting the engine", self._log_prefix(replica), why)
        threading.Thread(target=replica.end_silent, args=(why,), name="silent", daemon=True).start()

    def _log_prefix(self, replica: Replica) -> str:
        return f"replica {self.replicas.index(replica)}: " if self.settings.replicas > 1 else ""

    def _died(self, replica: Replica) -> int:
        """Record a death and return how many this replica had within the last minute."""
        now, index = time.monotonic(), self.replicas.index(replica)
        deaths = self._deaths[index] = [at for at in self._deaths.get(index, []) if now - at < 60.0] + [now]
        return len(deaths)

    def _give_up(self, replica: Replica, deaths: int, how: str, code: int) -> None:
        """Stop restarting a replica that keeps dying. End the launch if no other replica serves or starts."""
        replica.clear()
        others = self._count(0) or sum(r.tracker.phase in SERVES for r in self.replicas)
        text = "%sengine-keeps-dying: %d deaths within a minute, the last with %s; giving up"
        log.error(
            text + (" on this replica; the others keep serving" if others else ""),
            self._log_prefix(replica),
            deaths,
            how,
        )
        if not others:
            self.exit_code = _shell_code(code)
            self.end()

    # Proxy: the event loop in the main thread

    def install_signal_handlers(self) -> None:
        """Install handlers that end the launch in order, for signals that arrive before the event loop runs."""
        for number in stopping():
            signal.signal(number, lambda *_: self._signalled(early=True))

    def run(self) -> int:
        """Serve until the launch is stopped and return the exit code."""
        self.replicas[0].underway.wait(UNDERWAY_S)
        import asyncio

        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())
        return self.exit_code

    async def _serve(self) -> None:
        import asyncio

        from plugin.proxy.descriptor_limit import raise_files
        from plugin.proxy.http.address import Upstream
        from plugin.proxy.pool.pool import ReplicaPool
        from plugin.proxy.pool.pressure import relieve
        from plugin.proxy.pool.silence import Silence
        from plugin.proxy.server import ProxyServer
        from plugin.proxy.settings import Settings
        from plugin.records.about import address, engine_pid, facts, next_kind
        from plugin.records.lead_times import history_for
        from plugin.runtime.standby.moves import Moves

        self._stop = stop = asyncio.Event()
        self._loop = loop = asyncio.get_running_loop()
        for number in stopping():
            loop.add_signal_handler(number, self._signalled)
        moves = Moves(self.replicas, self._start_one, self._restart_clock)
        self._pool = moves.pool = pool = ReplicaPool(
            history=history_for(self.settings),
            wake=moves.wake if self.settings.sleep_after_s or self.settings.standby_after_s else None,
            sleep=moves.sleep,
            standby=moves.standby,
            sleep_after_s=self.settings.sleep_after_s or None,
            standby_after_s=self.settings.standby_after_s or None,
            speculative=self._shares_steps,
        )
        pool.facts = partial(facts, self.replicas[0])
        pool.next_kind = partial(next_kind, self.replicas)
        pool.background.append(partial(relieve, lambda: [pool]))
        for index, replica in enumerate(self.replicas):
            recording = partial(getattr, replica, "recording")
            upstream = Upstream(self._connector(replica), f"r{index}")
            behind = pool.add(f"r{index}", replica.tracker, upstream, recording=recording)
            replica.served = self._counter(behind)
            replica.page_follower.there = partial(_requests_there, pool, behind)
            behind.pages_pending, behind.pages = replica.pages_pending, replica.page_counts
            behind.kill_reason = replica.kill_reason
            behind.stopped = replica.stopped
            behind.engine_pid, behind.address = partial(engine_pid, replica), partial(address, replica)
            behind.killed_when_silent = self.settings.silence_limit_s > 0
            replica.cancel_requests = self._canceller(pool, behind.name)
        if self.settings.silence_limit_s:
            pool.background.append(Silence(pool, self.settings.silence_limit_s, self._silent).run)
        if self.settings.rehearse:
            pool.background.append(self._rehearse)
        given = dict(self.settings.proxy)
        denied = self.replicas[0].engine.denied_paths | given.pop("denied_paths", frozenset())
        behaviour = Settings(denied_paths=denied, root_path=self.settings.command.root_path, **given)
        if behaviour.access_log:
            logging.getLogger("quickthaw.proxy").setLevel(logging.INFO)
        # Raised only now: the first sandbox's init has started with the old limit, and both engines raise their own.
        raise_files()
        self._server = ProxyServer(pool, behaviour)
        assert self.sock is not None
        await self._server.start(self.sock, admin_sock=self.admin_sock, certificates=self.certificates)
        self._accepts_since = time.monotonic()
        if self._ending.is_set():
            stop.set()
        await stop.wait()
        await self._shut_down()

    async def _rehearse(self) -> None:
        import asyncio

        await asyncio.sleep(REHEARSE_AFTER_S)  # a start that is under way needs no more imports beside it
        from plugin.rehearsal.beside import Beside

        assert self._pool is not None
        await Beside(self.replicas[0].settings, self.replicas, self._pool).run()

    @staticmethod
    def _counter(behind: Any) -> Callable[[], int]:
        before = behind.served

        def served() -> int:
            return int(behind.served - before)

        return served

    def _canceller(self, pool: ReplicaPool, name: str) -> Callable[[], bool]:
        import asyncio

        def cancel_requests() -> bool:
            assert self._loop is not None
            try:
                return asyncio.run_coroutine_threadsafe(pool.cancel_speculation(name), self._loop).result(
                    CANCEL_LIMIT_S
                )
            except TimeoutError:
                log.warning("a request beside the check of %s did not end within %.0f s", name, CANCEL_LIMIT_S)
                return False

        return cancel_requests

    @staticmethod
    def _connector(replica: Replica) -> Callable[[], socket.socket]:
        def connect() -> socket.socket:
            running = replica.running
            if running is None:
                raise ConnectionRefusedError("the replica is gone")
            try:
                return running.place.connect(running.port)
            except CheckpointError as error:
                raise ConnectionRefusedError(str(error)) from error

        return connect

    def _restart_clock(self) -> None:
        """Count the seconds of the log's phases from here."""
        self._began = time.monotonic()

    def end(self) -> None:
        """Start the shutdown. Callable from any thread."""
        self._ending.set()
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _signalled(self, early: bool = False) -> None:
        now = time.monotonic()
        if self._signalled_once and not early and now - self._early_signal_at < TWICE_REPORTED_S:
            return
        self._early_signal_at = now if early else 0.0
        if self._signalled_once:
            log.warning("second signal: killing the engine")
            try:
                for replica in self.replicas:
                    if running := replica.running:  # the stop may clear it meanwhile
                        running.close()
                self.bound.close()
            finally:
                os._exit(130)
        self._signalled_once = True
        if not self._ending.is_set():
            log.info("stopping: no new requests, finishing those in flight")
        self._ending.set()
        if self._stop is not None:
            self._stop.set()

    async def _answer_connecting(self) -> None:
        """Answer clients that have connected by now instead of resetting them: a launch may end as soon as its proxy accepts."""
        import asyncio

        deadline = time.monotonic() + CONNECTING_WAIT_S
        while self._connecting() and time.monotonic() < deadline:  # noqa: ASYNC110 – the kernel does not notify of its accept queue
            await asyncio.sleep(0.005)
        if time.monotonic() - self._accepts_since < CONNECTING_WAIT_S:
            await asyncio.sleep(0.05)  # the connections' own tasks read what these clients have sent

    async def _shut_down(self) -> None:
        import asyncio

        assert self._server is not None and self._pool is not None
        await self._answer_connecting()
        if self._failure is not None:
            # The pool logs the failure and answers the held requests with it.
            self._pool.start_failed(self._failure)
            await asyncio.sleep(0)  # the held requests' own tasks write the answers
        # --grace, which in a container is its runtime's to end, is for a stop from outside.
        grace_s = self.settings.grace_s if self._signalled_once else min(self.settings.grace_s, OWN_END_GRACE_S)
        await self._server.shutdown(grace_s)
        codes = await asyncio.gather(*(asyncio.to_thread(replica.stop, grace_s) for replica in self.replicas))
        if self.weights:
            await asyncio.to_thread(self.weights.close)
        if self._failure is None and not self.exit_code:
            self.exit_code = max((_shell_code(code) for code in codes), default=0)


def _requests_there(pool: ReplicaPool, behind: Any) -> int:
    """Return how many requests wait for a replica, or are answered by this one."""
    return int(pool.held + behind.outstanding)


def _shell_code(code: int) -> int:
    """Convert to a shell's exit code: 128 plus the signal number for a process ended by a signal."""
    return 128 - code if code < 0 else code


def _remember(settings: LaunchSettings, replica: Replica, seconds: float) -> None:
    """Add this start to the measured lead times, which the proxy's deadlines and the capacity plan use."""
    if replica.resting.continued:
        return  # it was no start
    from plugin.records.lead_times import remember

    remember(
        settings, "restored" if replica.restored else "cold", seconds, first=replica.restored and replica.recording
    )
