"""Drive one replica: restore it, or start it cold and take a snapshot; then serve until it is stopped.

Everything here blocks and runs in a thread of its own. A start that fails leaves no process, mount, namespace or file.
After a failed restore the same replica starts cold (its held requests stay held) unless `strict`. A failure to take a
snapshot costs the snapshot, never the engine.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.criu.binary import Criu
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Incompatible, Integrity, NotFound
from checkpoint.sandbox import prestart
from checkpoint.sandbox.sandbox import Sandbox
from checkpoint.snapshot import restore, speculative
from checkpoint.snapshot.library import Library
from checkpoint.snapshot.manifest import Canary, Snapshot
from launchers.base import Engine
from launchers.errors import EngineFailed, LauncherError
from plugin.model import first_fetch
from plugin.runtime.capabilities import Capabilities
from plugin.runtime.config import LaunchSettings
from plugin.runtime.gpu import host_memory
from plugin.runtime.home import unusable
from plugin.runtime.phases import Phase, PhaseTracker, Span
from plugin.runtime.standby.replica import Standby
from plugin.runtime.steps import compatibility, restore_snapshot, take_snapshot
from plugin.runtime.steps.engine_process import Running
from plugin.runtime.steps.model_mount import Weights
from plugin.runtime.steps.paging import PageFollower
from plugin.runtime.steps.snapshot_fetch import Fetching

if TYPE_CHECKING:
    from checkpoint.compatibility.check import CurrentIdentity
    from checkpoint.compatibility.check import Identity as IdentityRecord
    from checkpoint.cuda.driver import Driver
    from checkpoint.cuda.helper import Helper

log = logging.getLogger("quickthaw")
UNWIND_LIMIT_S = 15.0
"""Maximum seconds that `stop` waits for a restore it has cancelled; a page server that does not answer is killed after 5 s."""
SERVES = (Phase.SERVING, Phase.SUSPECT)
NVIDIA = Path("/dev/nvidiactl")


@dataclass
class Replica:
    """Drive one replica. Several threads may call `start` and share one start; calls of `stop` and `sleep` must not overlap."""

    settings: LaunchSettings
    engine: Engine
    capabilities: Capabilities
    criu: Criu | None
    weights: Weights
    tracker: PhaseTracker
    on_death: Callable[[int], None] | None = None
    """Called with the exit code, in a thread of its own, when the engine ends without being stopped."""
    stdout: int | None = 1
    stderr: int | None = 2
    served: Callable[[], int] = lambda: 0
    """Returns how many requests this replica has answered since it began to serve; set by the proxy."""
    expects: Callable[[], bool] = lambda: False
    """Returns True if a waiting request will run beside the canary of a restore; set by the proxy."""
    cancel_requests: Callable[[], bool] = lambda: False
    """Cancels the requests that run beside the canary and returns True if there were any; set by the proxy."""
    underway: threading.Event = field(default_factory=threading.Event)
    """Set when other processes do the work of the start and this process has time for something else."""
    running: Running | None = None
    restored: bool = False
    snapshot: Snapshot | None = None
    spans: dict[str, float] = field(default_factory=dict)
    """Parts of the last restore in seconds, finer than the phases."""

    def __post_init__(self) -> None:
        self.library = Library(self.settings.home)
        self._starting = threading.Lock()
        self._expected_end = False
        self._stopped = False
        self._starts = 0  # number of engine processes started; at most one is alive
        self._page_server_works = True
        self.on_gpu = False  # True if the snapshot holds GPU state
        self._no_snapshot = False  # set after taking a snapshot cost the engine's life
        self.cancellation = restore.Cancellation()
        self.page_server_error = ""
        """Why pages of the restored engine will never arrive, or ""; the engine is killed for it."""
        self._losses = 0
        self.silent = ""
        """Why the engine was killed for not answering, or ""; reset when another engine serves."""
        self.fetching = Fetching(self.settings)
        self.page_follower = PageFollower(self.fetching, lambda: self.served(), lambda: self.running is not None)
        self._cuda: Helper | None = None
        self._identity: CurrentIdentity | None = None
        self._multi_gpu: bool | None = None
        self.command = self.settings.command
        """What the engine was started with: the user's command plus, on a GPU, the arguments that `offload` needs."""
        self.canary: Canary | None = None
        """What the engine of this cold start answers, without the answer; None if nothing that we can compare."""
        self.refused: Incompatible | None = None
        """Why the last restore was refused, if it was."""
        self.resting = Standby(self, self._starting)
        self.recording = False
        """True if the last restore recorded the snapshot's working set."""

    # Starting

    def start(self, before_cold: Callable[[], object] | None = None) -> None:
        """Start the engine and return once it serves, or wait for the start in another thread.

        An engine in standby continues. Else there are three ways, each tried after the one before failed: restore with
        the page server (the working set first, or with GPU state every page in parallel), restore by CRIU alone, start
        cold. `before_cold`, if given, is called before a cold start (it may wait for another replica's snapshot); then
        restoring is tried once more. A start that `stop` interrupts tries no other way.
        Raises LauncherError or CheckpointError when the start fails.
        """
        with self._starting:
            if self.running is not None and self.tracker.phase in SERVES:
                return
            if self.resting.leave():
                return
            # Change the phase first: reading a model for the first time takes a while, and the start must be visible.
            self.mounting()
            if self.settings.use_snapshot and not self.capabilities.snapshots:
                self.driver()  # initialises while the model is looked at and CRIU restores
            try:
                self._start(before_cold)
            except BaseException as error:
                self.clear()
                if not self._stopped and self.tracker.phase is not Phase.FAILED:
                    self.tracker.to(Phase.FAILED, str(error))
                raise

    def turn_off(self, why: str, error: Exception | None = None) -> None:
        """Turn all capabilities off and log why, once. Raises HostLacks with `--strict`, or for a named snapshot."""
        if self.settings.strict or self.settings.named:
            raise HostLacks(*why.split(": ", 1)) from error
        self.capabilities = Capabilities.none(why)
        self.capabilities.log_off()

    def _start(self, before_cold: Callable[[], object] | None) -> None:
        if self._try_or_turn_off(self._start_from_snapshot):
            return
        if before_cold is not None:
            before_cold()
            if self._stopped:
                raise EngineFailed("stopped", "stopped while the engine started")
            if self._try_or_turn_off(self._start_from_snapshot):
                return
        if not self.settings.named and self._try_or_turn_off(
            lambda: first_fetch.fetch(self) and self._start_from_snapshot()
        ):
            return
        if self.settings.named:
            raise HostLacks(
                "cannot-restore",
                self.capabilities.snapshots or f"snapshot {self.settings.name} is in quarantine; see snapshot inspect",
            )
        if (
            self.settings.use_snapshot
            and not self.capabilities.snapshots
            and not self.settings.name
            and self.refused is None
        ):
            compatibility.explain(self.library, self.snapshot_name, self.identity)
        self._cold()

    def _try_or_turn_off(self, step: Callable[[], bool]) -> bool:
        """Return what `step` returns. If a file cannot be read or written, the engine starts as it would alone."""
        try:
            return step()
        except OSError as error:
            self.clear()
            self.turn_off(unusable(self.settings.home) or f"host-io: {error.strerror or error}", error)
            return False

    def mounting(self) -> None:
        """Change the phase to mounting, unless it is that already."""
        if self.tracker.phase is not Phase.MOUNTING:
            self.tracker.to(Phase.MOUNTING)

    def _start_from_snapshot(self) -> bool:
        """Restore the snapshot, if there is one, and return True if the replica serves.

        Raises only when a cold start must not follow.
        """
        self.refused = None
        name = self.restorable()
        # After a failed page server, CRIU restores all pages itself: what ended the page server may end the next one.
        served_first = self._page_server_works and not self.page_server_error and not self.capabilities.pages
        ways = ((True, False) if served_first else (False,)) if name else ()
        for served in ways:
            assert name is not None
            try:
                with self.fetching.held(self.library, name):
                    restore_snapshot.run(self, name, served)
                return True
            except (CheckpointError, LauncherError) as failure:
                # Lost pages cause any error that follows them, so do not blame the snapshot.
                error = Failed("pages-lost", self.page_server_error) if self.page_server_error else failure
                if self._stopped:
                    self.clear()
                    raise
                again = served and not isinstance(error, Incompatible | Integrity | HostLacks | Busy)
                again = again and (not self.on_gpu or bool(self.page_server_error))  # else the driver has begun
                self._restore_failed(name, error, again)
                if again:
                    self._page_server_works = bool(self.page_server_error)
                    continue
                if self.settings.strict or self.settings.named:
                    raise
                break
        return False

    @property
    def identity(self) -> CurrentIdentity:
        """Return the identity of this launch, used to select and check a snapshot."""
        if self._identity is None:
            self._identity = compatibility.gather(self.settings, self.weights, self.criu)
        return self._identity

    def forget_identity(self) -> None:
        """Compute the identity again when it is needed: the model has been downloaded."""
        self._identity = None

    @property
    def stop_requested(self) -> bool:
        """Return True once `stop` was called."""
        return self._stopped

    @property
    def known_identity(self) -> CurrentIdentity | None:
        """Return the identity of this launch if it has been computed by now."""
        return self._identity

    def check_identity(self, snapshot: Snapshot) -> IdentityRecord:
        """Return the snapshot's identity. Raises Incompatible when it may not be restored here."""
        return compatibility.check(snapshot, self.identity, self.settings, self.weights)

    @property
    def snapshot_name(self) -> str:
        """Return the user's name for the snapshot, or one made of engine, model and identity."""
        return self.settings.name or compatibility.snapshot_name(self.settings, self.identity)

    def restorable(self) -> str | None:
        """Return the name of the snapshot to restore, or None. Log the reason where it is not obvious."""
        if not self.settings.use_snapshot or self.capabilities.snapshots:
            return None
        if self.weights.path is None and not self.settings.named:
            return None  # not downloaded yet
        name = self.snapshot_name
        if self.multi_gpu():
            return None
        health = self.library.health(name)
        if health.quarantined:
            log.warning(
                "snapshot %s is in quarantine after %d failed restores (%s); starting cold",
                name,
                health.failures,
                health.reason,
            )
            return None
        if not self.library.has(name):
            from checkpoint.compatibility.host_class import host_class

            found = self.fetching.find(name, self.check_identity, host_class(self.identity.host))
            if found is None:
                return None
            self.library = found
        return name

    def multi_gpu(self) -> bool:
        """Return True if no driver can checkpoint this launch (several GPUs, or a MIG slice). Log it once, with the remedy."""
        if self._multi_gpu is None:
            self._multi_gpu = compatibility.multi_gpu(self.settings, self.identity, self.driver)
        return self._multi_gpu

    def _restore_failed(self, name: str, error: Exception, again: bool) -> None:
        self.clear()
        self.tracker.to(Phase.FAILED, str(error))
        if again:
            log.warning("restoring %s through the page server failed (%s); CRIU restores all its pages", name, error)
            return
        if isinstance(error, Incompatible):
            self.refused = error
        elif not isinstance(error, HostLacks | Busy | NotFound) and not self.fetching.outage():
            self.library.record_failure(name, str(error))
        self.fetching.give_up()
        self.library = Library(self.settings.home)
        if self.settings.strict or self.settings.named:
            return  # this error ends the start, and is reported as such
        what = take_snapshot.refusal(error) if isinstance(error, Incompatible) else error
        log.warning("restore of %s failed: %s; starting cold under the same held requests", name, what)

    # Pages that arrive after the restore

    def on_page_server_failed(self, reason: str) -> None:
        """Kill the replica because missing pages will never arrive, as when the page server died: a fault would block forever.

        Called from any thread, at any moment during or after a restore. It kills all processes at once: those that
        outlive the first one would notice its end. The replica is then restored with all pages first.
        """
        first = not self.page_server_error
        # Set this before reading `running`: restore_snapshot sets `running` first and then reads `page_server_error`.
        self.page_server_error = self.page_server_error or reason
        cancelled = self.cancellation.cancel(Failed("pages-lost", reason))
        running = self.running
        restored = running.restored if running else None
        self._losses += first and bool(cancelled or restored)
        if restored is None:
            return
        if self.tracker.phase is Phase.SERVING:
            log.warning("%s; ending the replica and restoring it with all pages first", reason)
        assert running is not None
        running.kill()  # no process may run once the userfaultfds are closed

    def stopped(self) -> bool:
        """Return True if one of the engine's processes is stopped (SIGSTOP)."""
        return self.running is not None and self.running.stopped()

    def end_silent(self, why: str) -> None:
        """Kill an engine that runs but does not answer; `on_death` restarts it. Callable from any thread."""
        running = self.running
        if running is not None and not self._expected_end:
            self.silent = why
            running.kill()

    def kill_reason(self) -> str:
        """Return why quickthaw killed the last engine, or "" if it did not."""
        return self.page_server_failure() or self.silent

    def pages_pending(self) -> bool:
        """Return True if pages of the running engine are still to come, or were lost and no new start has begun."""
        running = self.running
        restored = running.restored if running else None
        return bool(self.page_server_error or (restored and restored.pages and not restored.pages.complete.is_set()))

    def page_server_failure(self) -> str:
        """Return why the last restored engine was killed for missing pages, or ""."""
        return self.page_server_error if self.restored else ""

    def page_counts(self) -> dict[str, float]:
        """Return the page servers' totals over all restores (PageFollower.counts), and how often pages were `lost`."""
        return {**self.page_follower.counts(), "lost": self._losses}

    def driver(self) -> Driver | None:
        """Return the CUDA driver's checkpoint API, or None without an NVIDIA device. The first call starts its process."""
        if self._cuda is None and NVIDIA.exists():
            from checkpoint.cuda.helper import Helper

            self._cuda = Helper()
            with contextlib.suppress(OSError):  # its first call tries again, and reports the error
                self._cuda.start()
        return self._cuda

    # Cold start

    def _cold(self) -> None:
        from plugin.runtime.steps.cold_start import ModelLost

        try:
            self._cold_once()
        except (ModelLost, take_snapshot.NotResumed) as error:
            self._no_snapshot |= isinstance(error, take_snapshot.NotResumed)
            without = " without a snapshot" * self._no_snapshot
            log.warning("%s; a new one starts%s, under the same held requests", error, without)
            self.tracker.to(Phase.FAILED, str(error))
            self.clear()
            self._cold()

    def _cold_once(self) -> None:
        from plugin.runtime.steps import cold_start

        speculative.discard()
        prestart.end_start_phase()
        self.page_server_error = ""
        self.underway.set()
        self.mounting()
        if not self.capabilities.sandbox and (why := unusable(self.settings.home)):
            self.turn_off(why)
        cache = cold_start.kept_cache(self)
        if cache:
            cache.pull()
        mounted = None if self.capabilities.mount or not self.settings.mount else self.weights.mount()
        self.tracker.to(Phase.STARTING)
        running = cold_start.begin(self, mounted)
        self.set_running(running)
        self.tracker.to(Phase.LOADING)
        with take_snapshot.prepared(self) as found_out:
            if found_out and self.weights.content:
                self.weights.content.begin()
            place = running.place
            cold_start.wait_ready(self, running)
            self.tracker.to(Phase.WARMING)
            cold_s = sum(span.took_s for span in self.start_spans())
            self.restored = False
            snapshot_wanted = isinstance(place, Sandbox) and not self._no_snapshot and take_snapshot.wanted(self)
            if isinstance(place, Sandbox) and snapshot_wanted and take_snapshot.works(self, found_out):
                take_snapshot.take(self, place, running, cold_s)
        self.serve()
        if cache:
            cache.push_later()

    def start_spans(self) -> tuple[Span, ...]:
        """Return the spans of the current cold start, without those of a failed restore before it."""
        spans = self.tracker.timeline
        starts = [index for index, span in enumerate(spans) if span.phase is Phase.MOUNTING]
        return spans[starts[-1] :] if starts else spans

    # Common parts

    def serve(self) -> None:
        """Change the phase to serving. Raises EngineFailed (engine-died) if the engine has ended."""
        running = self.running
        if running is None or running.place.exit_code(running.pid) is not None:
            raise EngineFailed("engine-died", "the engine ended just before it served; see its log")
        self.silent = ""
        self.tracker.to(Phase.SERVING)
        if self._cuda:
            host_memory.return_later(self)

    def on_exit(self) -> Callable[[int, int], None]:
        """Return the callback for the next engine's sandbox.

        The sandbox calls it from its own thread with (pid, exit code) when the engine's root process ends.
        """
        start = self._starts = self._starts + 1

        def ended(_: int, code: int) -> None:
            ours = start == self._starts and self.tracker.phase in SERVES and not self._expected_end
            if ours and self.on_death:
                threading.Thread(target=self.on_death, args=(code,), name="engine-died", daemon=True).start()
            elif start == self._starts and self.tracker.phase is Phase.STANDBY and not self._expected_end:
                threading.Thread(target=self.resting.lost, args=(code,), name="engine-died", daemon=True).start()

        return ended

    def set_running(self, running: Running) -> None:
        """Set the running engine. From here on its end counts as a death, unless a stop was requested."""
        self._expected_end = self._stopped
        self.running = running
        if self._stopped:
            self.clear()
            raise EngineFailed("stopped", "stopped while the engine started")

    def clear(self) -> None:
        """End the engine, if one runs, and release everything made for it."""
        running, self.running = self.running, None
        if running:
            self._expected_end = True
            running.close()

    # Ending

    def stop(self, grace_s: float | None = None) -> int:
        """Stop the engine and return its exit code: send SIGTERM, wait up to `grace_s` seconds, then close the sandbox."""
        self._expected_end = self._stopped = True
        cut_short = self.cancellation.cancel(Failed("stopped", "stopped while the engine started"))
        if cut_short and self._starting.acquire(timeout=UNWIND_LIMIT_S):  # until the cancelled restore has cleaned up
            self._starting.release()
        settled = self.resting.moving.acquire(timeout=UNWIND_LIMIT_S)  # what is half frozen cannot stop in order
        running, code = self.running, -int(signal.SIGTERM)
        if running:
            if (ended := running.place.exit_code(running.pid)) is not None:
                code = ended
            # A restored engine whose canary runs would wait for that request, in vain since vLLM aborts it: `clear` ends it.
            # A frozen engine is ended as it is.
            elif self.tracker.phase not in (Phase.WAKING, Phase.VERIFYING, Phase.STANDBY):
                self.page_follower.save_working_set()
                code = running.end(self.settings.grace_s if grace_s is None else grace_s)
            self.clear()
        if settled:
            self.resting.moving.release()
        self.fetching.close()
        if self._cuda:
            self._cuda.close()
            self._cuda = None
        if self.tracker.phase is not Phase.STOPPED:
            self.tracker.to(Phase.STOPPED)
        return code

    def sleep(self) -> None:
        """End the idle engine, or the one in standby; its snapshot restores it."""
        with self.resting.moving:
            self._expected_end = True
            # The pool sends no requests here by now. Change the phase last, when nothing of the engine is left.
            self.page_follower.save_working_set()
            self.clear()
            self.tracker.to(Phase.ASLEEP)

    def standby(self) -> None:
        """Freeze the idle engine with its memory (Standby.enter); the next `start` continues it."""
        self.resting.enter()
