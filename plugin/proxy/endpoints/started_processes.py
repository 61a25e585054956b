"""Record on disk what wake commands have started, so that the next proxy finds what a killed one left behind.

A record identifies the process and its proxy by PID, start time, boot and PID namespace. Each of these alone may belong
to another process by now, so a process is signalled only while all of them match.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
from dataclasses import asdict, dataclass
from pathlib import Path

from plugin.runtime.home import private_folder, state_home

log = logging.getLogger("quickthaw.proxy")
_END_GRACE_S = 10.0
_UNKNOWN = 255


@dataclass(frozen=True)
class Identity:
    """Identify one process uniquely over time."""

    pid: int
    start: int
    """Clock ticks from the boot to its start (proc(5), field 22 of stat)."""
    boot: str
    pid_namespace: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the process that has this PID now, or None if there is none or it is a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                return None
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(pid, int(fields[19]), boot, os.readlink("/proc/self/ns/pid"))
        except (OSError, ValueError, IndexError):
            return None

    def alive(self) -> bool:
        """Return True if this very process runs."""
        return Identity.of(self.pid) == self

    def elsewhere(self) -> bool:
        """Return True if it belongs to another PID namespace, where its state is unknown."""
        return self.pid_namespace != os.readlink("/proc/self/ns/pid")


class Orphan:
    """A process of an earlier proxy, with the part of `asyncio.subprocess.Process` that an endpoint uses."""

    _fd = -1

    def __init__(self, identity: Identity) -> None:
        """Open the process. Raises ProcessLookupError if it no longer runs."""
        self.pid = identity.pid
        self._fd = os.pidfd_open(identity.pid)
        if not identity.alive():  # checked after pidfd_open: from then on the PID cannot be reused unnoticed
            raise ProcessLookupError(identity.pid)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    @property
    def returncode(self) -> int | None:
        """Return None while it runs, else 255: only its parent can read the exit code."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return _UNKNOWN if poll.poll(0) else None

    async def wait(self) -> int:
        """Return once it has ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        fd = os.dup(self._fd)  # a loop allows one reader per descriptor, and several tasks may wait
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return _UNKNOWN


@dataclass(frozen=True)
class Record:
    """One process that a proxy has started for one endpoint."""

    upstream: str
    process: Identity
    owner: Identity


class Started:
    """The records of one endpoint, identified by `key`. A write error costs the record, never the start."""

    def __init__(self, key: str, upstream: str) -> None:
        self.upstream = upstream
        self._folder = state_home() / "run" / "proxy"
        self._name = hashlib.sha256(key.encode()).hexdigest()[:20]
        self._file = self._folder / f"{self._name}-{os.getpid()}.json"

    def note(self, pid: int) -> None:
        """Record that this proxy has started the process, in a session of its own."""
        process, owner = Identity.of(pid), Identity.of(os.getpid())
        if process is None or owner is None:
            return
        fresh = self._file.with_suffix(".new")
        try:
            private_folder(self._folder)
            fresh.write_text(json.dumps(asdict(Record(self.upstream, process, owner))))
            fresh.replace(self._file)
        except OSError as error:
            text = "record-not-written: %s: %s; if this proxy is killed, the next one will not find its engine"
            log.warning(text, self._file, error.strerror, extra={"event": "record-not-written", "fields": {"pid": pid}})

    def forget(self) -> None:
        """Remove the record, because the process has ended."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def orphans(self) -> list[Record]:
        """Return what dead proxies have left running for this endpoint, and remove stale records."""
        found = []
        for file in sorted(self._folder.glob(f"{self._name}-*.json")):
            try:
                raw = json.loads(file.read_text())
                record = Record(raw["upstream"], Identity(**raw["process"]), Identity(**raw["owner"]))
            except (OSError, ValueError, LookupError, TypeError):
                record = None
            if record is not None and (record.owner.elsewhere() or record.owner.alive()):
                continue
            if record is not None and record.process.alive():
                found.append(record)
            with contextlib.suppress(OSError):
                file.unlink()
        return found


async def end(orphan: Orphan) -> None:
    """End an orphan with its whole session: SIGTERM, a grace period, then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if orphan.returncode is None or _session(orphan.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(orphan.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_GRACE_S):
                await orphan.wait()


def _session(leader: int) -> bool:
    """Return True if processes of a session outlive its leader, whose PID is not reused until they end."""
    if Path(f"/proc/{leader}").exists():
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if stat.read_text().rpartition(")")[2].split()[3] == str(leader):
                return True
    return False
