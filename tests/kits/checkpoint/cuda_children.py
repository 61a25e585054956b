"""Processes that use the CUDA of the driver's double (cuda_double.py), and queries about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.kits.checkpoint.cuda_double import GPU0, wait_until, write

CHILD = Path(__file__).parents[2] / "programs" / "cuda_child.py"


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

    def lost(self, pid: int) -> bool:
        """Return whether the process's restore ran out of memory."""
        return bool(json.loads((self.folder / f"{pid}.json").read_text()).get("lost"))

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
