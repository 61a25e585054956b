"""Restore a snapshot in a sandbox of its own, ask it what users ask, and mark it as rehearsed.

The first restore records the working set (or adds to the one that is there), and ends once it is written. A second one,
with that working set, leaves the plans, the pack and the list of reads beside the images. Both are the restore that a launch does
(plugin/runtime/steps/restore_snapshot.py).

Guarantees: whatever happens, and at whichever moment `end` is called, no process, mount, namespace or file of the
sandboxes is left. The snapshot itself is never changed. One that cannot be restored, or answers otherwise, in two
attempts is put into quarantine, and the next cold start takes it again. What this host lacks, another process that
needs the snapshot, a full disk and an `end` are no failures of the snapshot.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import launchers
from checkpoint.compatibility.check import Identity
from checkpoint.cuda import checkpoint as cuda
from checkpoint.errors import Busy, CheckpointError, Failed, HostLacks, Incompatible, NotFound
from checkpoint.sandbox.freezer import Freezer
from checkpoint.sandbox.process_tree import processes
from checkpoint.sandbox.sandbox import Sandbox
from checkpoint.snapshot import rehearsal
from checkpoint.snapshot.library import Library
from launchers.base import EngineCommand
from launchers.errors import LauncherError
from plugin.rehearsal import memory, priority, requests
from plugin.runtime.capabilities import detect
from plugin.runtime.config import LaunchSettings
from plugin.runtime.phases import PhaseTracker
from plugin.runtime.replica import Replica
from plugin.runtime.steps import restore_snapshot
from plugin.runtime.steps.model_mount import Weights
from plugin.runtime.steps.paging import ALL, Pace, PageFollower

if TYPE_CHECKING:
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.steps.engine_process import Running

log = logging.getLogger("quickthaw")
ATTEMPTS = 2
"""After so many failures in a row the snapshot itself is at fault."""
CHECK_EVERY_S = 0.25
"""Seconds between two looks at the host's memory."""
NO_FAULT = (
    "disk-full",
    "disk-read-only",
    "stopped",
    "rehearsal-ended",
    "engine-stalled",
    "sandbox-timeout",
    "pages-lost",
)
"""Codes of errors that say nothing about the snapshot."""
ROUNDS = 4
"""Most restores. One that adds pages to the working set is followed by another, which makes its plans."""
FREEZE_LIMIT_S = 2.0
"""Maximum seconds in which every process of a paused engine must stand still."""
PLACED_LIMIT_S = 600.0
"""Maximum seconds after the last answer for the working set to be written, and for the last page to be in place."""


class GivenUp(Exception):
    """The rehearsal ended without a result; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class RehearsalFailed(CheckpointError):
    """The snapshot cannot be restored, or answers otherwise, and is in quarantine."""


class _Rehearsed(Replica):
    """A replica whose engine can be paused, and runs at the lowest priority if this process does: CRIU restores that of the dump."""

    pausing: Pausing

    def set_running(self, running: Running) -> None:
        """See Replica."""
        if isinstance(running.place, Sandbox):
            if priority.is_lowest():
                priority.lower([running.place.init_pid, *processes(running.place.init_pid)])
            self.pausing.begin(running.place.init_pid)
        running.client = requests.PatientClient(**vars(running.client))
        super().set_running(running)


class Pausing:
    """Freezes the engine of one sandbox after the other while the rehearsal pauses. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paused = False
        self._freezer: Freezer | None = None

    def begin(self, init_pid: int) -> None:
        """Take over the engine of a new sandbox."""
        with self._lock:
            self._freezer = Freezer(init_pid)
            if self._paused:
                self._freeze(self._freezer)

    def over(self) -> None:
        """Release what was made for the sandbox, after its end."""
        with self._lock:
            freezer, self._freezer = self._freezer, None
        if freezer is not None:
            freezer.close()

    def set(self, paused: bool) -> None:
        """Pause, or go on."""
        with self._lock:
            if paused == self._paused:
                return
            self._paused = paused
            if self._freezer is not None:
                if paused:
                    self._freeze(self._freezer)
                else:
                    self._freezer.thaw()

    @staticmethod
    def _freeze(freezer: Freezer) -> None:
        """Freeze, or leave an engine that does not stand still running: at its priority it costs little."""
        try:
            freezer.freeze(FREEZE_LIMIT_S)
        except (CheckpointError, OSError) as error:
            log.debug("a rehearsal is not paused: %s", error)


def named_settings(
    found: Snapshot,
    home: Path,
    python: str = "",
    api_key: str | None = None,
    admin_key: str | None = None,
    **more: Any,
) -> LaunchSettings:
    """Return the settings with which a snapshot is restored by its name. `python`: the engine's interpreter, if it is another one."""
    interpreter = python or str(found.identity.get("engine", {}).get("interpreter", ""))
    model = found.model_path if Path(found.model_path or "/nonexistent").is_dir() else found.model
    return LaunchSettings(
        engine=found.engine,
        command=EngineCommand(found.engine, (), model, "127.0.0.1", 0, api_key, admin_key=admin_key),
        engine_python=interpreter,
        home=home,
        name=found.name,
        named=True,
        mount=Path(model).is_dir(),
        take_snapshot=False,
        **more,
    )


class Rehearsal:
    """One rehearsal of one snapshot. `run` it once; any other thread may `end` it."""

    def __init__(self, settings: LaunchSettings) -> None:
        """`settings`: as `named_settings` returns them."""
        assert settings.name
        self.settings, self.name = settings, settings.name
        self.library = Library(settings.home)
        self._replica: Replica | None = None
        self._ended: GivenUp | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._pausing = Pausing()

    def pause(self, paused: bool) -> None:
        """Stop the engine that is being rehearsed, or have it go on; any thread may call it, at any moment."""
        self._pausing.set(paused)

    # Ending, from any thread

    def end(self, code: str, why: str) -> None:
        """End it at once: `run` raises GivenUp. Returns before everything is cleaned up, which `run` does."""
        with self._lock:
            self._ended = self._ended or GivenUp(code, why)
            replica = self._replica
        self._over.set()
        if replica is not None:
            replica.cancellation.cancel(Failed("rehearsal-ended", why))
            if running := replica.running:
                running.kill()

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended

    # Running

    def run(self) -> rehearsal.Mark:
        """Rehearse and return the mark. Raises GivenUp, RehearsalFailed, NotFound, Integrity (the manifest is damaged)."""
        began = time.monotonic()
        found = self.library.load(self.name)
        folder = self.library.path(self.name)
        lazy = self.settings.lazy_restore and not found.gpu.processes
        if (before := self._done(found)) and (not lazy or rehearsal.prepared_here(folder, found)):
            self._over.set()
            return before
        with rehearsal.lock(folder), self._watching_memory(found):
            before = self._done(found)
            asked = list(before.requests) if before else []
            for number in range(ROUNDS):
                full, known = number == 0 and before is None, self._known()
                got = self._attempt(found, partial(self._once, found, lazy, full=full))
                asked = got if full else asked
                if not lazy or self._known() == known:
                    break
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            mark = rehearsal.Mark(found.digest, now, asked, round(time.monotonic() - began, 2))
            self._check()
            with self.library.in_use(self.name) as folder:
                if self.library.load(self.name).digest != found.digest:
                    raise GivenUp("snapshot-replaced", f"{self.name} was replaced meanwhile")
                rehearsal.write(folder, mark)
            return mark

    def _done(self, found: Snapshot) -> rehearsal.Mark | None:
        return rehearsal.read(self.library.path(self.name), found)

    def _known(self) -> bytes:
        """Return the working set as it is now, empty if there is none."""
        try:
            return self.library.working_set(self.name).read_bytes()
        except OSError:
            return b""

    def _attempt(self, found: Snapshot, once: Callable[[], list[str]]) -> list[str]:
        """Return what `once` returns, in one of ATTEMPTS. Raises GivenUp, or RehearsalFailed with the snapshot in quarantine."""
        for attempt in range(ATTEMPTS):
            self._check()
            try:
                return once()
            except (CheckpointError, LauncherError, OSError) as error:
                self._check()
                self._blameless(error, found)
                log.debug("rehearsal of %s, attempt %d: %s", self.name, attempt + 1, error)
                last = error
        why = f"rehearsal-failed: {last}"
        self.library.quarantine(self.name, why)
        raise RehearsalFailed(
            "rehearsal-failed", f"{self.name} is not offered, and the next cold start takes it again: {last}"
        )

    def _blameless(self, error: Exception, found: Snapshot) -> None:
        """Raise GivenUp if an error says nothing about the snapshot."""
        cause: BaseException | None = error
        while cause is not None:
            code = getattr(cause, "code", "")
            if isinstance(cause, Busy | HostLacks | NotFound | Incompatible | OSError) or code in NO_FAULT:
                raise GivenUp(code or "host-io", str(getattr(error, "args", [error])[0])) from error
            cause = cause.__cause__
        if why := memory.short(0):
            raise GivenUp("memory-short", why) from error

    def _forget(self) -> None:
        with self._lock:
            self._replica = None

    @property
    def over(self) -> bool:
        """Return whether nothing of it is left to end."""
        return self._over.is_set()

    @contextlib.contextmanager
    def _watching_memory(self, found: Snapshot) -> Iterator[None]:
        """End the rehearsal when memory gets short. Raises GivenUp if it is from the beginning."""
        if why := memory.short(found.image_bytes):
            raise GivenUp("memory-short", why)

        def watch() -> None:
            while not self._over.wait(CHECK_EVERY_S):
                if short := memory.short(0):
                    self.end("memory-short", short)

        threading.Thread(target=watch, name="memory", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _once(self, found: Snapshot, lazy: bool, *, full: bool) -> list[str]:
        """Restore once, ask, and close everything; `full`: all the typical requests, else one. Return the names of those asked."""
        host = detect(self.settings.home)
        if off := host.capabilities.snapshots or host.capabilities.sandbox:
            raise HostLacks("cannot-restore", off)
        if lazy and host.capabilities.pages:
            raise HostLacks("cannot-record", host.capabilities.pages)
        weights = Weights.of(self.settings, enabled=self.settings.mount and not host.capabilities.mount)
        engine = launchers.engine(self.settings.engine)
        replica = _Rehearsed(
            self.settings, engine, host.capabilities, host.criu, weights, PhaseTracker(), stdout=None, stderr=None
        )
        answered = [0]
        replica.page_follower = PageFollower(
            replica.fetching, lambda: answered[0], lambda: replica.running is not None, Pace.patient()
        )
        replica.pausing = self._pausing
        with contextlib.ExitStack() as ending:
            # Each of these runs, in the reverse order, whatever the ones before it raise.
            for end in (weights.close, self._pausing.over, partial(replica.stop, 0.0), replica.clear, self._forget):
                ending.callback(end)
            with self._lock:
                self._replica = replica
            self._check()
            if found.gpu.processes and (driver := replica.driver()) is not None:
                then = Identity.decode(found.identity).host.gpus
                cuda.check_memory(driver, found.gpu, cuda.gpu_pairs(then, replica.identity.host.gpus))
            with replica.fetching.held(self.library, self.name):
                restore_snapshot.run(replica, self.name, served=not host.capabilities.pages)
            self._check()
            running = replica.running
            assert running is not None
            asked = requests.first(engine, running.client, found.canary)
            answered[0] = 1
            if full:
                asked += requests.typical(engine, running.client, found.canary, found.identity.get("arguments", {}))
            answered[0] = ALL
            if lazy and not replica.page_follower.wait_saved(PLACED_LIMIT_S):
                raise GivenUp("working-set-late", "the working set was not written in time")
            if lazy and not self._known():
                raise Failed("disk-full", "the working set could not be written; make room")
            pages = running.restored.pages if running.restored and lazy and not replica.recording else None
            if pages and not pages.wait_complete(PLACED_LIMIT_S):
                raise GivenUp(
                    "pages-late", "not every page was in place in time, and the plans are written after the last"
                )
            return asked
