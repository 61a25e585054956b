"""A helper process that has initialised the CUDA driver and makes its checkpoint calls for the owner.

cuInit takes 0.1 to 1 s and would otherwise delay every restore; the helper pays it once, in parallel with the
owner's other work. A driver call that never returns is ended by killing the helper, and the owner's next call starts
a new one. The driver and the target processes hold all state, so nothing is lost with a helper. It ends with its
owner.

`python -m checkpoint.cuda.helper FD MODULE:FACTORY [ARGUMENT]` is the process; `Helper` is the owner's side and
itself a Driver.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from checkpoint.cuda.driver import DeviceMemory, Driver, DriverError, State
from checkpoint.errors import HostLacks
from lazyfs.content.records import ready

READY_TIMEOUT_S = 60.0
"""cuInit on a host with eight GPUs and no persistence mode takes tens of seconds."""
QUERY_TIMEOUT_S = 30.0
MOVE_TIMEOUT_S = 900.0
"""Timeout of checkpoint and restore, which move GPU memory. At the measured 1.4 to 5 GB/s it suffices for a terabyte."""
_MAX_MESSAGE = 1 << 20
STALLED = "QUICKTHAW_STALLED"
"""The `result` of a call that exceeded its timeout; the helper was killed."""


@dataclass
class Helper:
    """A Driver in its own process.

    `start` returns at once; the first call waits for the process. Thread-safe; calls are serialized.

    `factory`: import string of the function that creates the driver in the helper.
    """

    factory: str = "checkpoint.cuda.driver:RealDriver"
    argument: str | None = None
    move_timeout_s: float = MOVE_TIMEOUT_S
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _socket: socket.socket | None = field(default=None, repr=False)
    _ready: bool = False
    _closed: bool = False

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Helper:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process unless it runs. Its driver initialises in the background."""
        with self._lock:
            self._closed = False
            self._start()

    def _start(self) -> None:
        if self._closed:
            raise DriverError(f"{STALLED} (the helper was closed)")
        if self._process and self._process.poll() is None:
            return
        self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # The helper handles all GPUs, regardless of those visible to the engine.
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        with theirs:
            argv = [sys.executable, "-P", "-m", "checkpoint.cuda.helper", str(theirs.fileno()), self.factory]
            self._process = subprocess.Popen(
                [*argv, *([self.argument] if self.argument is not None else [])],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._socket, self._ready = ours, False

    @property
    def pid(self) -> int | None:
        """The helper's process number while it runs, else None."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def close(self) -> None:
        """Kill the helper. A running call in another thread fails at once. Idempotent."""
        self._closed = True
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()  # before taking the lock, which a moving call holds for up to `move_timeout_s`
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._socket:
            self._socket.close()
            self._socket = None
        if self._process:
            if self._process.poll() is None:
                self._process.kill()
            # A process in an uninterruptible driver call ends when the driver releases it; do not wait for that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process = None
        self._ready = False

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._socket is not None
        self._socket.settimeout(timeout_s)
        try:
            data = self._socket.recv(_MAX_MESSAGE)
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            data = b""
        return cast("dict[str, Any]", json.loads(data)) if data else None

    def _call(self, operation: str, *arguments: Any, timeout_s: float = QUERY_TIMEOUT_S) -> Any:
        with self._lock:
            self._start()
            try:
                if not self._ready:
                    self._await_ready()
                assert self._socket is not None
                self._socket.sendall(json.dumps([operation, *arguments]).encode())
                answer = self._receive(timeout_s)
            except TimeoutError as error:
                self._end()
                raise DriverError(f"{STALLED} ({operation} took longer than {timeout_s:.0f} s)") from error
            except OSError:
                answer = None
            if answer is None:
                self._end()
                raise DriverError(f"{STALLED} (the helper died in {operation})")
        if "error" in answer:
            raise DriverError(answer["error"])
        return answer["value"]

    def _await_ready(self) -> None:
        first = self._receive(READY_TIMEOUT_S)
        if first is None or "error" in first:
            why = first["error"] if first else "its process died"
            self._end()
            raise HostLacks(
                "cuda-unavailable",
                f"the CUDA driver cannot be used: {why}; install driver 570 or newer and quickthaw[cuda], and see whether nvidia-smi works",
            )
        self._ready = True

    # The Driver's methods

    def version(self) -> str:
        return str(self._call("version"))

    def devices(self) -> list[DeviceMemory]:
        return [msgspec.convert(d, ready(DeviceMemory)) for d in self._call("devices")]

    def usage(self, pid: int) -> dict[str, int]:
        return {str(uuid): int(size) for uuid, size in self._call("usage", pid).items()}

    def state(self, pid: int) -> State | None:
        value = self._call("state", pid)
        return None if value is None else State(value)

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("lock", pid, timeout_ms, timeout_s=timeout_ms / 1000 + QUERY_TIMEOUT_S)

    def checkpoint(self, pid: int) -> None:
        self._call("checkpoint", pid, timeout_s=self.move_timeout_s)

    def restore(self, pid: int, pairs: list[tuple[str, str]]) -> None:
        self._call("restore", pid, pairs, timeout_s=self.move_timeout_s)

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid)


# The process

OPERATIONS = ("version", "devices", "usage", "state", "lock", "checkpoint", "restore", "unlock")


def _answer(driver: Driver, request: list[Any]) -> dict[str, Any]:
    operation, *arguments = request
    if operation not in OPERATIONS:
        return {"error": f"unknown operation {operation}"}
    try:
        value = getattr(driver, operation)(*arguments)
    except DriverError as error:
        return {"error": error.result}
    return {"value": value.value if isinstance(value, State) else msgspec.to_builtins(value)}


def serve(fd: int, factory: str, *arguments: str) -> None:
    """Answer requests on a socket until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C: it brings processes back first
    connection = socket.socket(fileno=fd)
    module, _, name = factory.partition(":")
    try:
        driver = getattr(importlib.import_module(module), name)(*arguments)
    except DriverError as error:
        connection.sendall(json.dumps({"error": error.result}).encode())
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(b'{"ready": true}')
        while request := connection.recv(_MAX_MESSAGE):
            connection.sendall(json.dumps(_answer(driver, json.loads(request))).encode())


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
