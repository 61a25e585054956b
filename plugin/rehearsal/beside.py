"""Rehearse a launch's snapshot beside the engine that serves: when to begin, when to drop it, and what comes of it.

It begins once a replica serves or rests that has a snapshot and no request has been there for QUIET_S seconds, or after LATEST_S
seconds at most. It pauses for requests, and is dropped when they suffer (plugin.rehearsal.yielding), when a replica of
this launch starts or wakes, and by its own process when memory gets short. A dropped one is tried again after a pause
that doubles, TRIES times; then the next launch tries. The process ends with this one, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec

from checkpoint.errors import CheckpointError
from checkpoint.snapshot import rehearsal
from checkpoint.snapshot.library import Library
from lazyfs.content.records import ready
from plugin.proxy.pool.replica import STARTING
from plugin.rehearsal import priority
from plugin.rehearsal.process import END_LIMIT_S, GO_ON, PAUSE, Order, Report
from plugin.rehearsal.yielding import Course, MeanTime, Yielding
from plugin.runtime.gpu.placement import chosen_gpu
from plugin.runtime.phases import Phase
from plugin.runtime.steps import restore_snapshot
from plugin.startup.own_module import own_module

if TYPE_CHECKING:
    from checkpoint.snapshot.manifest import Snapshot
    from plugin.runtime.config import LaunchSettings
    from plugin.runtime.replica import Replica

log = logging.getLogger("quickthaw")
QUIET_S, LATEST_S = 1.0, 30.0
POLL_S, POLL_RUNNING_S = 0.25, 0.02
TRIES, PAUSE_S = 4, 30.0
LIMIT_S = 900.0
"""Seconds after which a rehearsal is dropped whatever it does: on a host that is always busy it gets no processor."""
REHEARSES = (Phase.SERVING, Phase.STANDBY, Phase.ASLEEP)


class Answering(Protocol):
    """A replica as the proxy sees it."""

    served: int
    """How many requests it has answered."""


class Requests(Protocol):
    """What is known of the requests (`plugin.proxy.pool.pool.ReplicaPool`)."""

    @property
    def held(self) -> int:
        """Return the number of requests waiting for a replica."""

    @property
    def outstanding(self) -> int:
        """Return the number of requests that replicas are answering."""

    @property
    def replicas(self) -> Mapping[str, Answering]:
        """Return the replicas by their names."""


@dataclass
class Timing:
    """When to begin. All times are seconds of the monotonic clock."""

    due_since: float | None = None
    quiet_since: float | None = None
    not_before: float = 0.0
    tries: int = 0

    def may_begin(self, now: float, due: bool, busy: bool) -> bool:
        """Return whether to begin now.

        `due`: a replica serves or rests whose snapshot may need a rehearsal, and none starts. `busy`: requests are there.
        """
        if not due:
            self.due_since = self.quiet_since = None
            return False
        self.due_since = now if self.due_since is None else self.due_since
        self.quiet_since = None if busy else now if self.quiet_since is None else self.quiet_since
        if now < self.not_before or self.tries >= TRIES:
            return False
        quiet = self.quiet_since is not None and now - self.quiet_since >= QUIET_S
        return quiet or now - self.due_since >= LATEST_S

    def dropped(self, now: float) -> None:
        """Note that a try came to nothing."""
        self.not_before = now + PAUSE_S * 2**self.tries
        self.tries += 1
        self.due_since = self.quiet_since = None


@dataclass
class Beside:
    """Rehearse the snapshot of one launch. `run` is a coroutine for the pool's background."""

    settings: LaunchSettings
    replicas: Sequence[Replica]
    requests: Requests
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        self._settled = ""
        """The digest of the snapshot's manifest for which nothing is left to do."""
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()
        self._closed = False
        self._said = ""
        """Why it was given up last: said once, and at the last try."""
        self._alone = MeanTime()

    async def run(self) -> None:
        """Rehearse whenever there is something to rehearse. Runs until cancelled."""
        try:
            while True:
                await asyncio.sleep(POLL_S)
                snapshot = self._candidate()
                now, there = time.monotonic(), self._there
                if snapshot is None:
                    self._alone = MeanTime()
                else:
                    self._alone.add(now, there, self._answered)
                if self.timing.may_begin(now, snapshot is not None, there > 0):
                    assert snapshot is not None
                    # Reads files, on what may be a slow disk.
                    if not await asyncio.to_thread(self._nothing_to_do, snapshot):
                        beside = not await asyncio.to_thread(priority.limited)
                        await self._rehearse(snapshot, Yielding(self._alone, may_run_beside=beside))
        finally:
            # In a thread: the loop has requests to finish.
            await asyncio.to_thread(self._close)

    @property
    def _there(self) -> int:
        return self.requests.held + self.requests.outstanding

    @property
    def _answered(self) -> int:
        return sum(replica.served for replica in self.requests.replicas.values())

    def _candidate(self) -> Snapshot | None:
        """Return the snapshot of a replica that serves or rests, unless it is settled or a replica starts."""
        if any(replica.tracker.phase in STARTING for replica in self.replicas):
            return None
        for replica in self.replicas:
            found = replica.snapshot
            if found is not None and replica.tracker.phase in REHEARSES and not replica.pages_pending():
                return found if found.digest != self._settled else None
        return None

    def _nothing_to_do(self, snapshot: Snapshot) -> bool:
        """Return whether the snapshot is rehearsed, prepared on this host, and pushed; it is settled then."""
        library = Library(self.settings.home)
        folder = library.path(snapshot.name)
        if not library.has(snapshot.name):
            return True  # still on its way from a store, or removed
        prepared = not self.settings.lazy_restore or rehearsal.prepared_here(folder, snapshot)
        if rehearsal.read(folder, snapshot) is None or not prepared:
            return False
        store = self.settings.push_to
        if store and not rehearsal.pushed(folder, store):
            return False
        self._settled = snapshot.digest
        return True

    def order(self, snapshot: Snapshot) -> Order:
        """Return what the process is asked to do."""
        settings, command = self.settings, self.settings.command
        return Order(
            home=str(settings.home),
            name=snapshot.name,
            engine_python=settings.engine_python,
            api_key=command.api_key,
            admin_key=command.admin_key,
            lazy_restore=settings.lazy_restore,
            verify=settings.verify,
            trust_keys=[str(path) for path in settings.trust_keys],
            store_url=settings.store_url,
            push_to=settings.push_to,
            sign_key=str(settings.sign_key) if settings.sign_key else "",
        )

    async def _rehearse(self, snapshot: Snapshot, yielding: Yielding) -> None:
        log.info("snapshot %s: rehearsing it beside the engine, at the lowest priority", snapshot.name)
        try:
            process = await asyncio.to_thread(self._start, self.order(snapshot))
        except OSError as error:
            self._settle(snapshot, [Report("given-up", "host-io", str(error.strerror or error))], "")
            return
        reading = asyncio.ensure_future(asyncio.to_thread(self._read, process))
        why, course, began = "", Course.RUN, time.monotonic()
        try:
            while not (await asyncio.wait((reading,), timeout=POLL_RUNNING_S))[0]:
                before, course = course, yielding.course(time.monotonic(), self._there, self._answered)
                if any(replica.tracker.phase in STARTING for replica in self.replicas):
                    why = "a replica of this launch starts"
                elif course is Course.DROP:
                    why = yielding.why
                elif time.monotonic() - began > LIMIT_S:
                    why = f"not done after {LIMIT_S:.0f} s"
                elif course is not before:
                    self._tell(PAUSE if course is Course.PAUSE else GO_ON)
                if why:
                    await asyncio.to_thread(self._end)
                    break
            reports = await reading
        finally:
            reading.cancel()
        await asyncio.to_thread(self._end)
        self._alone.interrupt()
        if any(report.event == "rehearsed" for report in reports):
            await asyncio.to_thread(self._save_plan, snapshot)
        self._settle(snapshot, reports, why)

    def _settle(self, snapshot: Snapshot, reports: Sequence[Report], why: str) -> None:
        """Log what came of it, and have it tried again if it was dropped."""
        for report in reports:
            if report.event == "rehearsed":
                log.info("snapshot %s: rehearsed; its next restore is a fast one", snapshot.name)
            elif report.event == "pushed":
                what = f"{report.bytes / 1e9:.2f} GB written" if report.bytes else "the store has it"
                log.info("snapshot %s: pushed (%s)", snapshot.name, what)
            elif report.event == "failed":
                log.warning("%s: %s", report.code, report.message)
                for replica in self.replicas:
                    if replica.snapshot is not None and replica.snapshot.digest == snapshot.digest:
                        replica.snapshot = None  # not to be put to sleep: there would be nothing to wake it from
        last = reports[-1] if reports else Report("given-up", "rehearsal-ended", "its process ended")
        if last.event == "given-up":
            self.timing.dropped(time.monotonic())
            again = self.timing.tries < TRIES
            known, self._said = self._said, why or last.code
            log.log(
                logging.DEBUG if known == self._said and again else logging.INFO,
                "snapshot %s: not %s (%s); %s",
                snapshot.name,
                "pushed" if any(report.event == "rehearsed" for report in reports) else "rehearsed",
                why or f"{last.code}: {last.message}",
                "it is tried again" if again else "the next launch tries again",
            )
        else:
            self._settled = snapshot.digest

    def _save_plan(self, snapshot: Snapshot) -> None:
        replica = self.replicas[0]
        try:
            restore_snapshot.save_next_plan(replica, snapshot)
        except (CheckpointError, OSError) as error:
            log.debug("no plan for the next restore of %s: %s", snapshot.name, error)

    # The process

    def _start(self, order: Order) -> subprocess.Popen[bytes]:
        """Start the process. Raises OSError, also when the launch is ending."""
        with self._starting:
            if self._closed:
                raise OSError("the launch ends")
            process = self._process = subprocess.Popen(
                own_module("plugin.rehearsal.process"),  # in the launch's folder: paths in the order may be relative
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env=os.environ | chosen_gpu(self.settings),
            )
        self._tell(msgspec.json.encode(order) + b"\n")
        return process

    def _tell(self, word: bytes) -> None:
        """Send the process a word, unless it has ended."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.write(word)
                self._process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[bytes]) -> list[Report]:
        """Return the process's reports, once it has ended."""
        assert process.stdout is not None
        found = []
        with process.stdout, contextlib.suppress(msgspec.DecodeError):  # a last line that was cut off
            for line in process.stdout:
                found.append(msgspec.json.decode(line, type=ready(Report)))
        process.wait()
        return found

    def _close(self) -> None:
        """End the process, and start no other."""
        with self._starting:
            self._closed = True
        self._end()

    def _end(self) -> None:
        """End the process, and with it its sandbox: in order within its own limit, else by force. Also where it has ended."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(2 * END_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        priority.remove_groups()
        if process.returncode not in (0, 1):
            with contextlib.suppress(OSError):
                Library(self.settings.home).sweep()  # what it did not get to remove
