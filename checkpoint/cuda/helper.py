"""A helper process that has initialised the CUDA driver and makes its checkpoint calls for the owner.

cuInit takes 0.1 to 1 s and would otherwise delay every restore; the helper pays it once, in parallel with the
owner's other work, and from the first moment of a command that will need it (checkpoint.sandbox.prestart). Calls run
side by side: cuda-bindings release the interpreter during a call (since 12.9.1; before, they wait for each other). A
driver call that never returns is ended by killing the helper, with all others under way, and the owner's next call starts
a new one. The driver and the target processes hold all state, so nothing is lost with a helper. It ends with its
owner.

`python -m checkpoint.cuda.helper FD MODULE:FACTORY [ARGUMENT]` is the process; `Helper` is the owner's side and
itself a Driver.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec

from checkpoint.cuda.driver import MOVE_TIMEOUT_S, STALLED, DeviceMemory, Driver, DriverError, State
from checkpoint.errors import HostLacks
from checkpoint.sandbox import prestart
from lazyfs.content.records import ready

READY_TIMEOUT_S = 60.0
"""cuInit on a host with eight GPUs and no persistence mode takes tens of seconds."""
QUERY_TIMEOUT_S = 30.0
REAL = "checkpoint.cuda.driver:RealDriver"
END_LIMIT_S = 5.0
MOST_CALLS = 64
"""Calls that a helper runs at the same time."""
_MAX_MESSAGE = 1 << 20


class _Process:
    """A started helper process, and the calls that wait for its answers. Thread-safe."""

    def __init__(self, process: prestart.Child, connection: socket.socket) -> None:
        self.child = process
        self.socket = connection
        self._calls: dict[int, Future[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.started: Future[dict[str, Any]] = Future()
        """Its first message: its driver is initialised, or the error."""
        self._reader = threading.Thread(target=self._read, name="cuda-helper", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        waiting: Future[dict[str, Any]] | None = self.started
        while data := self._receive():
            message = json.loads(data)
            if "call" in message:
                with self._lock:
                    waiting = self._calls.pop(message["call"], None)  # None: its caller was interrupted
            if waiting:
                waiting.set_result(message)
        with self._lock:
            self._ended = True
            left = [*self._calls.values(), *([] if self.started.done() else [self.started])]
            self._calls.clear()
        for call in left:
            call.set_exception(EOFError())

    _ended = False

    def _receive(self) -> bytes:
        try:
            return self.socket.recv(_MAX_MESSAGE)
        except OSError:
            return b""

    def ask(self, operation: str, arguments: Sequence[Any], timeout_s: float) -> dict[str, Any]:
        """Return the answer to one call. Raises EOFError if the process ends instead, TimeoutError."""
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._ended:
                raise EOFError
            number = next(self._numbers)
            self._calls[number] = answer
        try:
            self.socket.sendall(json.dumps([number, operation, *arguments]).encode())
        except OSError:
            raise EOFError from None
        return answer.result(timeout_s)

    def end(self) -> None:
        """Kill the process; every call under way fails with EOFError. Idempotent."""
        if self.child.poll() is None:
            self.child.kill()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        # A process in an uninterruptible driver call ends when the driver releases it; do not wait for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5.0)
        self._reader.join()
        self.socket.close()


@dataclass
class Helper:
    """A Driver in its own process.

    `start` returns at once; the first call waits for the process. Calls may come from several threads, and run at the
    same time.

    `factory`: import string of the function that creates the driver in the helper.
    """

    factory: str = REAL
    argument: str | None = None
    move_timeout_s: float = MOVE_TIMEOUT_S
    _process: _Process | None = field(default=None, repr=False)
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
        self._closed = False
        self._start()

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise DriverError(f"{STALLED} (the helper was closed)")
            if self._process and self._process.child.poll() is None:
                return self._process
            if self._process:
                self._process.end()
            self._process = _Process(*(self._prestarted() or self._spawn()))
            return self._process

    def _prestarted(self) -> prestart.Started | None:
        return prestart.take_cuda_helper() if self.factory == REAL else None

    def _spawn(self) -> prestart.Started:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
        with theirs:
            argv = [sys.executable, "-P", "-m", "checkpoint.cuda.helper", str(theirs.fileno()), self.factory]
            process = subprocess.Popen(
                [*argv, *([self.argument] if self.argument is not None else [])],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        return process, ours

    @property
    def pid(self) -> int | None:
        """The helper's process number while it runs, else None."""
        process = self._process
        return process.child.pid if process and process.child.poll() is None else None

    def close(self) -> None:
        """Kill the helper. Calls under way in other threads fail at once. Idempotent."""
        with self._lock:
            self._closed = True
            process, self._process = self._process, None
        if process:
            process.end()

    def _end(self, process: _Process) -> None:
        """End a helper that stalled or died, unless another call has done so. The next call starts a new one."""
        with self._lock:
            if self._process is process:
                self._process = None
        process.end()

    def _call(self, operation: str, *arguments: Any, timeout_s: float = QUERY_TIMEOUT_S) -> Any:
        process = self._start()
        self._await_started(process)
        try:
            answer = process.ask(operation, arguments, timeout_s)
        except TimeoutError as error:
            self._end(process)
            raise DriverError(f"{STALLED} ({operation} took longer than {timeout_s:.0f} s)") from error
        except EOFError as error:
            self._end(process)
            raise DriverError(f"{STALLED} (the helper died in {operation})") from error
        if "error" in answer:
            raise DriverError(answer["error"])
        return answer["value"]

    def _await_started(self, process: _Process) -> None:
        try:
            error = process.started.result(READY_TIMEOUT_S).get("error")
        except TimeoutError:
            error = f"it did not initialise within {READY_TIMEOUT_S:.0f} s"
        except EOFError:
            error = "its process died"
        if error is not None:
            self._end(process)
            raise HostLacks(
                "cuda-unavailable",
                f"the CUDA driver cannot be used: {error}; "
                "install driver 570 or newer and quickthaw[cuda], and see whether nvidia-smi works",
            )

    # The Driver's methods

    def version(self) -> str:
        return str(self._call("version"))

    def finds(self, name: str) -> bool:
        return bool(self._call("finds", name))

    def devices(self) -> list[DeviceMemory]:
        return [msgspec.convert(d, ready(DeviceMemory)) for d in self._call("devices")]

    def usage(self, pid: int) -> dict[str, int]:
        return {str(uuid): int(size) for uuid, size in self._call("usage", pid).items()}

    def state(self, pid: int) -> State | None:
        value = self._call("state", pid)
        return None if value is None else State(value)

    def lock(self, pid: int, timeout_ms: int) -> None:
        self._call("lock", pid, timeout_ms, timeout_s=timeout_ms / 1000 + QUERY_TIMEOUT_S)

    def checkpoint(self, pid: int, limit_s: float = MOVE_TIMEOUT_S) -> None:
        self._call("checkpoint", pid, timeout_s=min(limit_s, self.move_timeout_s))

    def restore(self, pid: int, pairs: list[tuple[str, str]], limit_s: float = MOVE_TIMEOUT_S) -> None:
        self._call("restore", pid, pairs, timeout_s=min(limit_s, self.move_timeout_s))

    def unlock(self, pid: int) -> None:
        self._call("unlock", pid)


# The process

OPERATIONS = ("version", "finds", "devices", "usage", "state", "lock", "checkpoint", "restore", "unlock")


def _answer(driver: Driver, operation: str, arguments: Sequence[Any]) -> dict[str, Any]:
    if operation not in OPERATIONS:
        return {"error": f"unknown operation {operation}"}
    try:
        value = getattr(driver, operation)(*arguments)
    except DriverError as error:
        return {"error": error.result}
    except Exception as error:  # noqa: BLE001 - it must reach the owner, who would wait for the answer
        return {"error": f"{type(error).__name__}: {error}"}
    return {"value": value.value if isinstance(value, State) else msgspec.to_builtins(value)}


def serve(fd: int, factory: str = REAL, *arguments: str) -> None:
    """Answer requests on a socket, each in a thread, until its other end closes, and END_LIMIT_S more for calls under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner handles Ctrl-C: it brings processes back first
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # it handles all GPUs, regardless of those visible to the engine
    connection = socket.socket(fileno=fd)
    module, _, name = factory.partition(":")
    try:
        driver = getattr(importlib.import_module(module), name)(*arguments)
    except DriverError as error:
        connection.sendall(json.dumps({"error": error.result}).encode())
        return

    def respond(number: int, operation: str, *given: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the owner has ended
            connection.sendall(json.dumps({"call": number, **_answer(driver, operation, given)}).encode())

    with contextlib.suppress(BrokenPipeError, ConnectionResetError), ThreadPoolExecutor(MOST_CALLS) as pool:
        connection.sendall(b'{"ready": true}')
        while request := connection.recv(_MAX_MESSAGE):
            pool.submit(respond, *json.loads(request))
        last = threading.Timer(END_LIMIT_S, os._exit, (1,))  # the owner has ended; a call may never return
        last.daemon = True
        last.start()


def main(fd: int) -> int:
    """Run a prestarted helper (checkpoint.sandbox.prestart); return its exit code."""
    serve(fd, REAL)
    return 0


if __name__ == "__main__":
    serve(int(sys.argv[1]), *sys.argv[2:])
