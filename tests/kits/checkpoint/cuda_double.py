"""A double of the CUDA driver for real child processes.

It keeps the documented state machine (RUNNING, LOCKED, CHECKPOINTED, FAILED), refuses illegal transitions as the
driver does, counts GPU memory, loses a process whose restore runs out of memory, and fails on request. As the real one
pins the host memory that it copies from, a restore is refused (EFAULT) while a page of it is absent; its place is taken by
the process's private mapping with the most pages at the checkpoint. All state lies
in one folder, as the real driver's state lies in the processes: the death of a helper loses nothing. The children run
cuda_child.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path
from typing import Any

from checkpoint.cuda.driver import DeviceMemory, DriverError, State

GPU0, GPU1 = (f"GPU-0000000{n}-0000-0000-0000-000000000000" for n in (0, 1))
TOTAL = 1 << 30
PAGE = 4096
CHILD = Path(__file__).parents[2] / "programs" / "cuda_child.py"


def write(path: Path, value: object) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}")
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


class Double:
    """A Driver over a folder with one record for each child, `gpus.json`, `faults.json` and `calls`."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    # Faults: [{"op": "lock", "pid": 1 or null, "result": "CUDA_…", "hang": s, "state": "FAILED", "exit": true, "kill": true}]

    def _call(self, operation: str, pid: int | None = None) -> None:
        with (self.folder / "calls").open("a") as log:
            log.write(f"{operation} {pid}\n")
        faults = json.loads((self.folder / "faults.json").read_text()) if (self.folder / "faults.json").exists() else []
        for index, fault in enumerate(faults):
            if fault["op"] != operation or fault.get("pid") not in (None, pid):
                continue
            if not fault.get("always"):
                write(self.folder / "faults.json", faults[:index] + faults[index + 1 :])
            if fault.get("kill") and pid:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: not alive(pid))
            if fault.get("state") and pid:
                record = self._record(pid)
                record["state"] = fault["state"]
                write(self.folder / f"{pid}.json", record)
            if fault.get("exit"):
                os._exit(9)
            if fault.get("hang"):
                time.sleep(fault["hang"])
            if fault.get("result"):
                raise DriverError(fault["result"])

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
        if record["state"] != allowed.name:
            raise DriverError("CUDA_ERROR_ILLEGAL_STATE")
        return {**record, "state": to.name}

    def _gpus(self) -> dict[str, int]:
        file = self.folder / "gpus.json"
        return json.loads(file.read_text()) if file.exists() else {GPU0: TOTAL}

    def _used(self) -> dict[str, int]:
        used = dict.fromkeys(self._gpus(), 0)
        for file in self.folder.glob("[0-9]*.json"):
            record = json.loads(file.read_text())
            if alive(int(file.stem)) and record["state"] in ("RUNNING", "LOCKED"):
                for uuid, size in record["memory"].items():
                    used[uuid] = used.get(uuid, 0) + size
        return used

    # The Driver

    def version(self) -> str:
        self._call("version")
        return "580.159.03"

    def devices(self) -> list[DeviceMemory]:
        self._call("devices")
        used = self._used()
        return [DeviceMemory(uuid, "Double", total - used[uuid], total) for uuid, total in self._gpus().items()]

    def usage(self, pid: int) -> dict[str, int]:
        self._call("usage", pid)
        return dict(self._record(pid)["memory"])

    def state(self, pid: int) -> State | None:
        self._call("state", pid)
        try:
            return State[self._record(pid)["state"]]
        except DriverError:
            return None

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("lock", pid)
        write(self.folder / f"{pid}.json", self._move(pid, State.RUNNING, State.LOCKED))

    def checkpoint(self, pid: int) -> None:
        self._call("checkpoint", pid)
        record = self._move(pid, State.LOCKED, State.CHECKPOINTED)
        (self.folder / f"{pid}.vram").rename(self.folder / f"{pid}.host")
        write(self.folder / f"{pid}.json", {**record, "pages": host_copy(pid)})

    def restore(self, pid: int, pairs: list[tuple[str, str]]) -> None:
        self._call("restore", pid)
        record = self._move(pid, State.CHECKPOINTED, State.LOCKED)
        pages = [(start, end) for start, end in record.pop("pages", ())]
        if missing := size_of(pages) - size_of(present_pages(pid, pages)):
            raise DriverError(f"CUDA_ERROR_OPERATING_SYSTEM (EFAULT: {missing} bytes are absent)")
        where = dict(pairs)
        if pairs and not record["memory"].keys() <= where.keys():
            raise DriverError("CUDA_ERROR_INVALID_VALUE")
        memory = {where.get(uuid, uuid): size for uuid, size in record["memory"].items()}
        used, total = self._used(), self._gpus()
        for uuid, size in memory.items():
            if uuid not in total:
                raise DriverError("CUDA_ERROR_INVALID_DEVICE")
            if used[uuid] + size > total[uuid]:
                write(self.folder / f"{pid}.json", {**record, "state": "FAILED"})
                raise DriverError("CUDA_ERROR_OUT_OF_MEMORY")
        (self.folder / f"{pid}.host").rename(self.folder / f"{pid}.vram")
        write(self.folder / f"{pid}.json", {**record, "memory": memory})

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid)
        write(self.folder / f"{pid}.json", self._move(pid, State.LOCKED, State.RUNNING))


# Child processes and queries about them


def wait_until(done: Any, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not done():
        if time.monotonic() > end:
            raise AssertionError("it did not happen in time")
        time.sleep(0.002)


class Children:
    """Real processes that use the double's CUDA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, size: int = 1 << 20, gpu: str = GPU0) -> int:
        process = subprocess.Popen(
            [sys.executable, "-S", str(CHILD), str(self.folder), str(size), gpu], stdin=subprocess.DEVNULL
        )
        self.processes.append(process)
        wait_until(lambda: process.poll() is not None or (self.folder / f"{process.pid}.count").exists())
        assert process.poll() is None
        return process.pid

    def plain(self) -> int:
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        self.processes.append(process)
        return process.pid

    def state(self, pid: int) -> str:
        return str(json.loads((self.folder / f"{pid}.json").read_text())["state"])

    def states(self, pids: list[int]) -> list[str]:
        return [self.state(pid) for pid in pids]

    def count(self, pid: int) -> int:
        return int((self.folder / f"{pid}.count").read_text() or 0)

    def calls(self) -> list[tuple[str, int]]:
        lines = (line.split() for line in (self.folder / "calls").read_text().splitlines())
        return [
            (operation, int(pid))
            for operation, pid in lines
            if operation in ("lock", "checkpoint", "restore", "unlock")
        ]

    def faults(self, *faults: dict[str, Any]) -> None:
        write(self.folder / "faults.json", list(faults))

    def wait_running(self, pid: int) -> None:
        """Wait until the child's CUDA calls succeed again, with the device memory it had."""
        before = self.count(pid)
        wait_until(lambda: self.count(pid) > before + 1)
        assert (self.folder / f"{pid}.vram").read_text() == f"contents of {pid}"

    def wait_blocked(self, pid: int) -> None:
        """Wait until the child is blocked in a CUDA call."""
        wait_until(lambda: (self.folder / f"{pid}.blocked").read_text() == "yes")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
