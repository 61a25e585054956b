"""Prestart helper processes, so that they are ready when their owner has finished importing.

The helpers are the init of the first sandbox, the page server of the first restore, and on a host with a GPU the one that
calls the CUDA driver, whose initialisation takes up to a second. A command that will need them calls `start` first of
all. `take_init` and `take_page_server` return the prestarted helper, or start a new one. An unused helper exits when its
control socket closes: a page server at `settled`, any helper when its owner ends.

Prestarted helpers are forked: the owner has no threads yet, and a fork saves each helper an interpreter's start and
half of its imports (20 to 30 ms of CPU time, which the owner's own imports need). Later helpers are spawned, because
a fork of a process with threads is not safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Protocol


class Child(Protocol):
    """A child process: the common interface of Popen and Forked."""

    @property
    def pid(self) -> int:
        """Its process number."""

    def poll(self) -> int | None:
        """Return its exit code (negative: the signal that ended it), or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, sig: int) -> None:
        """Send a signal; do nothing if it has ended."""

    def kill(self) -> None:
        """Send SIGKILL."""


class Forked:
    """A Child made by os.fork. Thread-safe."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """See Child."""
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self._code = os.waitstatus_to_exitcode(status)
            return self._code

    def wait(self, timeout: float | None = None) -> int:
        """See Child."""
        with self._lock:
            if self._code is not None:
                return self._code
            fd = os.pidfd_open(self.pid)  # not reaped yet, so the number is still its own
        try:
            ended = select.poll()
            ended.register(fd, select.POLLIN)
            ended.poll(None if timeout is None else max(0, int(timeout * 1000)))
        finally:
            os.close(fd)
        if (code := self.poll()) is None:
            from subprocess import TimeoutExpired

            raise TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """See Child."""
        with self._lock:
            if self._code is None:
                os.kill(self.pid, sig)

    def kill(self) -> None:
        """See Child."""
        self.send_signal(signal.SIGKILL)


Started = tuple[Child, socket.socket]

_PR_SET_NAME = 15
_INIT, _PAGE_SERVER, _CUDA = "checkpoint.sandbox.init", "checkpoint.lazy_pages.main", "checkpoint.cuda.helper"
"""The modules of the helpers. Each has a `main(control_fd)` that returns an exit code."""
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from {} import main; sys.exit(main(int(sys.argv[2])))"
_PACKAGES = str(Path(__file__).resolve().parents[2])
_END_LIMIT_S = 5.0
_SYS_CLOSE_RANGE, _MOST_FDS = 436, (1 << 32) - 1  # the same on every architecture
_init: list[Started] = []
_page_server: list[Started] = []
_cuda: list[Started] = []
NVIDIA = Path("/dev/nvidiactl")


def _fork(name: str, module: str) -> Started:
    """Fork a helper from this process. Only safe while this process has one thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return Forked(pid), ours
    code = 1
    try:
        code = _detach_child(name, module, theirs.detach())
    finally:
        os._exit(code)


def _detach_child(name: str, module: str, control_fd: int) -> int:
    """Turn a forked child into a helper: detach it from the parent's session and close all of the parent's descriptors."""
    os.setsid()  # see _spawn
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # as `main` sets them, but from the first moment on
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _close(3, control_fd - 1)
    _close(control_fd + 1, _MOST_FDS)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
    return int(importlib.import_module(module).main(control_fd))


def _close(first: int, last: int) -> None:
    """Close all descriptors from `first` to `last`, however high the limit is (in a container it may be 2^30)."""
    if first > last or not ctypes.CDLL(None).syscall(_SYS_CLOSE_RANGE, first, last, 0):
        return
    for name in os.listdir("/proc/self/fd"):  # Linux before 5.9
        if first <= int(name) <= last:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def _spawn(module: str) -> Started:
    """Start a helper in an interpreter of its own; it waits for its configuration on a socket.

    Return the process and our end of the socket.
    """
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM.format(module), _PACKAGES, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # A terminal's interrupt reaches the whole foreground group; it would end the sandbox before its owner can
            # stop the engine.
            start_new_session=True,
        )
    return process, ours


def start() -> None:
    """Prestart one helper of each kind that this host may need, and tune this interpreter for a fast start.

    The thread switch interval drops from 5 ms to 0.5 ms, because the restoring thread waits for the interpreter
    after every other wait. Garbage collection is off until `settled`.
    """
    _init.append(_fork("quickthaw-outer", _INIT))
    _page_server.append(_fork("quickthaw-pages", _PAGE_SERVER))
    if NVIDIA.exists():
        _cuda.append(_fork("quickthaw-cuda", _CUDA))
    gc.disable()
    sys.setswitchinterval(0.0005)


def add_init() -> None:
    """Prestart one more init, for a sandbox beside the first one. Does nothing once this process has other threads."""
    if threading.active_count() == 1:
        _init.append(_fork("quickthaw-outer", _INIT))


def end_start_phase() -> None:
    """End the start phase: restore the interpreter's defaults, and end an unused page server.

    Objects imported so far are excluded from later garbage collections.
    """
    if not gc.isenabled():
        sys.setswitchinterval(0.005)
        gc.freeze()
        gc.enable()
    while _page_server:
        process, ours = _page_server.pop()
        ours.close()
        end(process)


def end_unused() -> None:
    """End the start phase as `end_start_phase` does, and an unused init and CUDA helper too."""
    end_start_phase()
    for unused in (_init, _cuda):
        while unused:
            process, ours = unused.pop()
            ours.close()
            if unused is _cuda:
                process.kill()  # it may be initialising the driver, for seconds
            end(process)


def end(process: Child) -> None:
    """Wait for a helper whose control socket is closed, and kill it on timeout."""
    from subprocess import TimeoutExpired

    try:
        process.wait(_END_LIMIT_S)
    except TimeoutExpired:
        process.kill()
        # A process in uninterruptible sleep ends when the kernel releases it.
        with contextlib.suppress(TimeoutExpired):
            process.wait(_END_LIMIT_S)


def _take(waiting: list[Started]) -> Started | None:
    while waiting:
        process, ours = waiting.pop()
        if process.poll() is None:
            return process, ours
        ours.close()
    return None


def take_init() -> Started:
    """Return the prestarted init of a sandbox, or start a new one."""
    return _take(_init) or _spawn(_INIT)


def take_page_server() -> Started:
    """Return the prestarted page server, or start a new one."""
    return _take(_page_server) or _spawn(_PAGE_SERVER)


def take_cuda_helper() -> Started | None:
    """Return the prestarted helper of the CUDA driver, if there is one."""
    return _take(_cuda)
