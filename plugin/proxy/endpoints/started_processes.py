"""What wake commands have started: a record of each on disk, so that the next proxy finds what a killed one left behind.

A record names the process and the proxy that started it by number, start time, boot and PID namespace; one of these alone may
belong to another process by now. A process is signalled only while all of them agree.
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

from plugin.runtime.home import state_home

log = logging.getLogger("quickthaw.proxy")
_END_GRACE_S = 10.0
_UNKNOWN = 255


@dataclass(frozen=True)
class Identity:
    """One process, told apart from every other one before and after it."""

    pid: int
    start: int
    """Clock ticks from the boot to its start (proc(5), field 22 of stat)."""
    boot: str
    pid_namespace: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """The process that has this number now; None for none, and for a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                return None
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(pid, int(fields[19]), boot, os.readlink("/proc/self/ns/pid"))
        except (OSError, ValueError, IndexError):
            return None

    def alive(self) -> bool:
        """Whether this very process runs."""
        return Identity.of(self.pid) == self

    def elsewhere(self) -> bool:
        """Whether it belongs to another PID namespace, from which nothing can be said of it."""
        return self.pid_namespace != os.readlink("/proc/self/ns/pid")


class Orphan:
    """A process of an earlier proxy, with as much of `asyncio.subprocess.Process` as an endpoint uses."""

    _fd = -1

    def __init__(self, identity: Identity) -> None:
        """Raises ProcessLookupError when it does not run any more."""
        self.pid = identity.pid
        self._fd = os.pidfd_open(identity.pid)
        if not identity.alive():  # looked at after the pidfd was opened: the number cannot change hands between
            raise ProcessLookupError(identity.pid)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    @property
    def returncode(self) -> int | None:
        """None while it runs; its exit code is known to nobody but its parent."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return _UNKNOWN if poll.poll(0) else None

    async def wait(self) -> int:
        """Return once it has ended."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        fd = os.dup(self._fd)  # a loop knows one reader for each descriptor, and several may wait
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return _UNKNOWN


@dataclass(frozen=True)
class Record:
    """What one proxy has started for one endpoint."""

    upstream: str
    process: Identity
    owner: Identity


class Started:
    """The records of one endpoint, which `key` tells apart. What cannot be written costs the record, never the start."""

    def __init__(self, key: str, upstream: str) -> None:
        self.upstream = upstream
        self._folder = state_home() / "run" / "proxy"
        self._name = hashlib.sha256(key.encode()).hexdigest()[:20]
        self._file = self._folder / f"{self._name}-{os.getpid()}.json"

    def note(self, pid: int) -> None:
        """Write down that this process was started by us, in a session of its own."""
        process, owner = Identity.of(pid), Identity.of(os.getpid())
        if process is None or owner is None:
            return
        fresh = self._file.with_suffix(".new")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh.write_text(json.dumps(asdict(Record(self.upstream, process, owner))))
            fresh.replace(self._file)
        except OSError as error:
            text = "record-not-written: %s: %s; if this proxy is killed, the next one will not find its engine"
            log.warning(text, self._file, error.strerror, extra={"event": "record-not-written", "fields": {"pid": pid}})

    def forget(self) -> None:
        """It has ended: remove the record."""
        with contextlib.suppress(OSError):
            self._file.unlink()

    def orphans(self) -> list[Record]:
        """What dead proxies have left running for this endpoint. Removes the records that are out of date."""
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
    """End an orphan with its whole session: SIGTERM, a grace, then SIGKILL for what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if orphan.returncode is None or _session(orphan.pid):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(orphan.pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_GRACE_S):
                await orphan.wait()


def _session(leader: int) -> bool:
    """Whether processes of a session outlive its leader. Its number is not given to another process before they end."""
    if Path(f"/proc/{leader}").exists():
        return False
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if stat.read_text().rpartition(")")[2].split()[3] == str(leader):
                return True
    return False
