"""The handle of a running engine, restored or started cold."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError
from checkpoint.sandbox.process_tree import processes, state
from checkpoint.sandbox.sandbox import Sandbox
from launchers.client import Client

if TYPE_CHECKING:
    from checkpoint.sandbox.freezer import Freezer
    from checkpoint.snapshot.restore import Restored
    from launchers.bare import BareProcess
    from launchers.base import EngineCommand
    from plugin.runtime.steps.engine_output import Output


def client_of(place: Sandbox | BareProcess, port: int, command: EngineCommand) -> Client:
    """Return a client for the engine at `place`, with the keys of its command line. Control is only for a sandboxed engine."""
    folder = place.control_dir if isinstance(place, Sandbox) else None
    return Client(lambda: place.connect(port), command.api_key, admin_token=command.admin_key, control_dir=folder)


@dataclass
class Running:
    """A running engine, and how to reach it."""

    place: Sandbox | BareProcess
    pid: int
    port: int
    client: Client
    outputs: dict[str, Output]
    restored: Restored | None = None
    freezer: Freezer | None = None
    """Made at the first standby."""
    leave_gpu: Callable[[], bool] | None = None
    """Called once before the engine is ended, if the CUDA driver has restored it: takes it off the GPU where its end
    could hang the host, and returns True if it left (plugin.runtime.gpu.ending)."""
    _closing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def close(self) -> None:
        """End the engine and release everything made for it. Idempotent, and thread-safe: a second signal closes beside the stop."""
        with self._closing:
            self._left_gpu()
            if self.restored:
                self.restored.close()
            else:
                self.place.close()
            if self.freezer:
                self.freezer.close()

    def end(self, grace_s: float) -> int:
        """Send SIGTERM and return the exit code: that of SIGKILL if the engine outlives `grace_s` seconds and `close` must kill it.

        An engine that left the GPU first would wait for it in vain, so it is killed; the code is then 0.
        """
        if self._left_gpu():
            self.kill()
            return 0
        try:
            self.place.signal(self.pid, signal.SIGTERM)
            code = self.place.wait(self.pid, grace_s)
        except (CheckpointError, OSError):  # a cancelled restore has closed its sandbox already
            return -signal.SIGTERM
        return -signal.SIGKILL if code is None else code

    def kill(self) -> None:
        """Kill all processes of the engine at once; their resources stay until `close`."""
        self._left_gpu()
        if not isinstance(self.place, Sandbox):
            self.place.close()
            return
        try:
            self.place.signal(-1, signal.SIGKILL)
        except CheckpointError:
            self.place.end()  # its init does not answer

    def _left_gpu(self) -> bool:
        leave, self.leave_gpu = self.leave_gpu, None
        return leave is not None and leave()

    def stopped(self) -> bool:
        """Return True if one of the engine's processes is stopped (SIGSTOP): its work then does not progress."""
        if not isinstance(self.place, Sandbox):
            return process_stopped(self.pid)
        return any(process_stopped(pid) for pid in processes(self.place.init_pid))

    def last_line(self) -> str:
        """Return the last line of stderr, or of stdout if stderr is empty."""
        words = self.outputs["stderr"].last()
        return self.outputs["stdout"].last() if words.startswith("(") else words


def process_stopped(pid: int) -> bool:
    """Return True if a process is stopped (SIGSTOP), False also if it has ended."""
    return state(pid) == "T"
