"""A double of the CUDA driver for real processes.

It keeps the documented state machine (RUNNING, LOCKED, CHECKPOINTED, FAILED), refuses illegal transitions as the
driver does, counts GPU memory, loses a process whose restore runs out of memory, and fails on request. It does what the
real one was seen to do around that:

* A checkpoint and a restore take time by the bytes of state (`configure`), in parallel or one after the other.
* The host copy lies in the process, in memory that is locked while it is filled and read: a thread of the process does
  that (tests/programs/cuda_thread.py). A process without that thread has its largest private mapping as copy.
* A restore is refused (EFAULT) while a page of the copy is absent.

All state lies in one folder, as the real driver's state lies in the processes: the death of a helper loses nothing.
Calls may come from several threads and processes. `timed` returns when each began and ended. cuda_children.py starts processes
for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.cuda.driver import DeviceMemory, DriverError, State
from tests.programs.cuda_thread import EMPTIED, EMPTY, FILL, FILLED, GPU_OFF, GPU_ON

GPU0, GPU1 = (f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in (0, 1))
TOTAL = 1 << 30
PAGE = 4096


def write(path: Path, value: object) -> None:
    new = path.with_name(f"{path.name}.{threading.get_native_id()}")
    new.write_text(json.dumps(value))
    new.replace(path)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


PRESENT = 1 << 63


def present_pages(pid: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the parts (start, end) of these ranges whose pages are present, from the kernel's page tables."""
    found: list[tuple[int, int]] = []
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        for start, end in ranges:
            entries = array("Q", os.pread(file.fileno(), (end - start) // PAGE * 8, start // PAGE * 8))
            for index, entry in enumerate(entries):
                page = start + index * PAGE
                if not entry & PRESENT:
                    continue
                if found and found[-1][1] == page:
                    found[-1] = found[-1][0], page + PAGE
                else:
                    found.append((page, page + PAGE))
    return found


def size_of(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def host_copy(pid: int) -> list[tuple[int, int]]:
    """Return the present pages of a process's largest private anonymous mapping."""
    mappings = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        place, access, _, _, inode, *name = line.split()
        if access == "rw-p" and inode == "0" and not name:
            low, _, high = place.partition("-")
            mappings.append((int(low, 16), int(high, 16)))
    return max((present_pages(pid, [mapping]) for mapping in mappings), key=size_of, default=[])


def status(pid: int, field: str) -> str:
    """Return a field of /proc/PID/status, or "" if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:")), "")


def driver_thread(pid: int) -> str:
    """Return where the state of a process with the double's thread is, GPU_ON or GPU_OFF; "" if it has no such thread."""
    try:
        names = {(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()}
    except OSError:
        return ""
    return next(iter(names & {GPU_ON, GPU_OFF}), "")


def locked_bytes(pid: int) -> int:
    return int((status(pid, "VmLck").split() or ["0"])[0]) << 10


def locked_ranges(pid: int) -> list[tuple[int, int]]:
    """Return the mappings (start, end) of a process whose pages are locked in memory."""
    found, place = [], (0, 0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, _, high = first.partition("-")
            place = int(low, 16), int(high, 16)
        elif first == "VmFlags:" and "lo" in rest:
            found.append(place)
    return found


@dataclass(frozen=True)
class Call:
    """One ended call: begin and end in seconds of time.monotonic, `result` "" or the driver's error."""

    op: str
    pid: int | None
    begin: float
    end: float
    result: str

    def overlaps(self, other: Call) -> bool:
        return self.begin < other.end and other.begin < self.end


def timed(folder: Path, *operations: str) -> list[Call]:
    """Return the ended calls of a folder, in the order in which they ended; of these operations only, if any are named."""
    file = folder / "times"
    found = [Call(*json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    return [call for call in found if call.op in (operations or (call.op,))]


def configure(folder: Path, **settings: Any) -> None:
    """Set what the double does from now on.

    `init_until`: the driver's initialisation ends once this file exists. `checkpoint`, `restore`: (seconds, bytes per second) of such a call. `concurrent`: what becomes of a move while another
    is under way: "parallel" (the default), "one-by-one" (it waits), or the error that refuses it. `memory`: bytes by GPU of
    each process that `TreeDouble` finds. `entry_points`: names that `finds` knows.
    """
    file = folder / "settings.json"
    write(file, (json.loads(file.read_text()) if file.exists() else {}) | settings)


class Double:
    """A Driver over a folder with one record for each child, `gpus.json`, `faults.json`, `settings.json`, `calls` and `times`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        if file := self._settings().get("init_until"):
            with self._call("init"):
                wait_until(Path(file).exists)

    # Faults: [{"op": "lock", "pid": 1 or null, "at": "begin" or "end" (of the time that a move takes), "result": "CUDA_…",
    # "hang": s, "state": "FAILED", "exit": true, "kill": true, "gpus": {…} (memory that others took)}]

    @contextlib.contextmanager
    def _call(self, operation: str, pid: int | None = None) -> Iterator[None]:
        begin, result = time.monotonic(), ""
        with (self.folder / "calls").open("a") as log:
            log.write(f"{operation} {pid}\n")
        try:
            self._fault(operation, pid)
            yield
        except DriverError as error:
            result = error.result
            raise
        finally:
            with (self.folder / "times").open("a") as log:
                log.write(json.dumps([operation, pid, begin, time.monotonic(), result]) + "\n")

    def _fault(self, operation: str, pid: int | None, at: str = "begin") -> None:
        with self._locked():
            fault = self._take_fault(operation, pid, at)
            if fault.get("kill") and pid:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not alive(pid))
            if fault.get("state") and pid:
                write(self.folder / f"{pid}.json", {**self._record(pid), "state": fault["state"]})
            if fault.get("gpus"):
                write(self.folder / "gpus.json", fault["gpus"])
        if fault.get("exit"):
            os._exit(9)
        if fault.get("hang"):
            time.sleep(fault["hang"])
        if fault.get("result"):
            raise DriverError(fault["result"])

    def _take_fault(self, operation: str, pid: int | None, at: str) -> dict[str, Any]:
        file = self.folder / "faults.json"
        faults: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        for index, fault in enumerate(faults):
            if (fault["op"], fault.get("at", "begin")) == (operation, at) and fault.get("pid") in (None, pid):
                if not fault.get("always"):
                    write(file, faults[:index] + faults[index + 1 :])
                return fault
        return {}

    @contextlib.contextmanager
    def _locked(self, name: str = "records", how: int = fcntl.LOCK_EX) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, how)
            yield

    def _settings(self) -> dict[str, Any]:
        file = self.folder / "settings.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def _record(self, pid: int) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self.folder / f"{pid}.json").read_text())
        except OSError:
            raise DriverError("CUDA_ERROR_INVALID_VALUE") from None
        if not alive(pid):
            raise DriverError("CUDA_ERROR_INVALID_VALUE")
        return record

    def _move(self, pid: int, allowed: State, to: State) -> dict[str, Any]:
        record = self._record(pid)
        if record["state"] != allowed.name or self._moving(record):
            raise DriverError("CUDA_ERROR_ILLEGAL_STATE")
        return {**record, "state": to.name}

    @staticmethod
    def _moving(record: dict[str, Any]) -> bool:
        """Return whether a call moves the process's state at this moment; one that was killed does not."""
        return "mover" in record and alive(record["mover"])

    def _gpus(self) -> dict[str, int]:
        file = self.folder / "gpus.json"
        return json.loads(file.read_text()) if file.exists() else {GPU0: TOTAL}

    def _used(self) -> dict[str, int]:
        used = dict.fromkeys(self._gpus(), 0)
        for file in self.folder.glob("[0-9]*.json"):
            record = json.loads(file.read_text())
            if alive(int(file.stem)) and (record["state"] in ("RUNNING", "LOCKED") or self._moving(record)):
                for uuid, size in record.get("target", record["memory"]).items():
                    used[uuid] = used.get(uuid, 0) + size
        return used

    @contextlib.contextmanager
    def _underway(self, operation: str, pid: int, **fields: Any) -> Iterator[None]:
        """Mark a process's record while its state moves, to the memory of `target` if that is given."""
        concurrent = self._settings().get("concurrent", "parallel")
        turns = {"parallel": fcntl.LOCK_SH, "one-by-one": fcntl.LOCK_EX}.get(concurrent, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file = self.folder / f"{pid}.json"
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._locked("moves", turns))
            except BlockingIOError:
                raise DriverError(concurrent) from None
            try:
                with self._locked():
                    write(file, {**self._record(pid), "mover": os.getpid(), **fields})
                    if "target" in fields:
                        self._check_room(pid)
                yield
            finally:
                with self._locked(), contextlib.suppress(DriverError):  # it may have ended
                    record = self._record(pid)
                    write(file, {name: value for name, value in record.items() if name not in ("mover", *fields)})

    def _take_time(self, operation: str, pid: int) -> None:
        """Wait as long as a move of the process's state takes; then a fault at its end comes true."""
        seconds, rate = self._settings().get(operation, (0.0, 0.0))
        time.sleep(seconds + (sum(self._record(pid)["memory"].values()) / rate if rate else 0.0))
        self._fault(operation, pid, at="end")

    # The Driver

    def version(self) -> str:
        with self._call("version"):
            return "580.159.03"

    def finds(self, name: str) -> bool:
        with self._call("finds"):
            return name in self._settings().get("entry_points", ())

    def devices(self) -> list[DeviceMemory]:
        with self._call("devices"), self._locked():
            used = self._used()
            return [DeviceMemory(uuid, "Double", total - used[uuid], total) for uuid, total in self._gpus().items()]

    def usage(self, pid: int) -> dict[str, int]:
        with self._call("usage", pid):
            return dict(self._record(pid)["memory"])

    def state(self, pid: int) -> State | None:
        with self._call("state", pid):
            try:
                return State[self._record(pid)["state"]]
            except DriverError:
                return None

    def lock(self, pid: int, timeout_ms: int) -> None:
        with self._call("lock", pid), self._locked():
            write(self.folder / f"{pid}.json", self._move(pid, State.RUNNING, State.LOCKED))

    def checkpoint(self, pid: int, limit_s: float = 0.0) -> None:
        with self._call("checkpoint", pid):
            with self._locked():
                record = self._move(pid, State.LOCKED, State.CHECKPOINTED)
            with self._underway("checkpoint", pid):
                pages = self._fill_copy(pid) if driver_thread(pid) else self._find_copy(pid)
                with self._locked():
                    self._record(pid)
                    (self.folder / f"{pid}.vram").rename(self.folder / f"{pid}.host")
                    write(self.folder / f"{pid}.json", {**record, "pages": pages, "gpus": list(self._gpus())})

    def _find_copy(self, pid: int) -> list[tuple[int, int]]:
        self._take_time("checkpoint", pid)
        return host_copy(pid)

    def _fill_copy(self, pid: int) -> list[tuple[int, int]]:
        signal_and_wait(pid, FILL, lambda: locked_bytes(pid) > 0)
        try:
            pages = locked_ranges(pid)
            self._take_time("checkpoint", pid)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, EMPTIED)
            raise
        signal_and_wait(pid, FILLED, lambda: not locked_bytes(pid))
        return pages

    def restore(self, pid: int, pairs: list[tuple[str, str]], limit_s: float = 0.0) -> None:
        with self._call("restore", pid):
            with self._locked():
                record = self._move(pid, State.CHECKPOINTED, State.LOCKED)
            if record.get("lost"):
                raise DriverError("CUDA_ERROR_OPERATING_SYSTEM")
            pages = [(start, end) for start, end in record.pop("pages", ())]
            if missing := size_of(pages) - size_of(present_pages(pid, pages)):
                raise DriverError(f"CUDA_ERROR_OPERATING_SYSTEM (EFAULT: {missing} bytes are absent)")
            where = dict(pairs)
            known = record.pop(
                "gpus", ()
            )  # every GPU, also one that CUDA_VISIBLE_DEVICES hides, each mapped to another
            if pairs and not ({*record["memory"], *known} <= where.keys() and len({*where.values()}) == len(pairs)):
                raise DriverError("CUDA_ERROR_INVALID_VALUE")
            memory = {where.get(uuid, uuid): size for uuid, size in record["memory"].items()}
            with self._underway("restore", pid, target=memory):
                if driver_thread(pid):
                    self._empty_copy(pid)
                else:
                    self._take_time("restore", pid)
                with self._locked():
                    self._record(pid)
                    (self.folder / f"{pid}.host").rename(self.folder / f"{pid}.vram")
                    write(self.folder / f"{pid}.json", {**record, "memory": memory})

    def _empty_copy(self, pid: int) -> None:
        signal_and_wait(pid, EMPTY, lambda: locked_bytes(pid) > 0)
        try:
            self._take_time("restore", pid)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, FILLED)
            raise
        signal_and_wait(pid, EMPTIED, lambda: driver_thread(pid) == GPU_ON)

    def _check_room(self, pid: int) -> None:
        """Lose a process, whose restore is marked as under way, if its GPUs do not hold it as well.

        Its state does not change, and the driver refuses it from then on (cuda-checkpoint #44, driver 580.95).
        """
        used, total = self._used(), self._gpus()
        record = self._record(pid)
        for uuid in record["target"]:
            if uuid not in total:
                raise DriverError("CUDA_ERROR_INVALID_DEVICE")
            if used[uuid] > total[uuid]:
                write(self.folder / f"{pid}.json", {**record, "lost": True})
                raise DriverError("CUDA_ERROR_OUT_OF_MEMORY")

    def unlock(self, pid: int) -> None:
        with self._call("unlock", pid), self._locked():
            write(self.folder / f"{pid}.json", self._move(pid, State.LOCKED, State.RUNNING))


def signal_and_wait(pid: int, number: int, done: Any) -> None:
    """Have the double's thread of a process do one thing. Raises DriverError if the process ends instead."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    wait_until(lambda: not alive(pid) or done())
    if not alive(pid):
        raise DriverError("CUDA_ERROR_OPERATING_SYSTEM")


class TreeDouble(Double):
    """The double for processes that tests do not start themselves, such as an engine's in a sandbox.

    Each process with the double's thread holds a context, with the configured `memory`. One that was restored has the
    record of its dump, found by its number in the sandbox: as the real driver's, the state is in the process's memory.
    """

    def _record(self, pid: int) -> dict[str, Any]:
        file = self.folder / f"{pid}.json"
        if not file.exists() and (where := driver_thread(pid)):
            dumped = self.folder / f"dumped-{inner_number(pid)}.json"
            fresh = {"state": "RUNNING", "memory": self._settings()["memory"]}
            (self.folder / f"{pid}.{'vram' if where == GPU_ON else 'host'}").write_text("contents")
            write(file, fresh if where == GPU_ON else json.loads(dumped.read_text()))
        return super()._record(pid)

    def checkpoint(self, pid: int, limit_s: float = 0.0) -> None:
        super().checkpoint(pid)
        write(self.folder / f"dumped-{inner_number(pid)}.json", json.loads((self.folder / f"{pid}.json").read_text()))

    def changes(self) -> list[str]:
        """Return the operations that change something, in the order in which they began."""
        words = [line.split()[0] for line in (self.folder / "calls").read_text().splitlines()]
        return [word for word in words if word in ("lock", "checkpoint", "restore", "unlock")]

    def close(self) -> None:
        """Do nothing: no helper runs."""


def inner_number(pid: int) -> str:
    """Return a process's number in its own PID namespace, or "" if it has ended."""
    return status(pid, "NSpid").rpartition("\t")[2]


def wait_until(done: Any, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise AssertionError("it did not happen in time")
        time.sleep(0.002)
