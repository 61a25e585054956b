"""Helper processes started before it is known what they will be for: they are ready by the time their owner has imported what it needs.

Process 1 of the first sandbox, and the page server of the first restore. `start` is called as the very first thing of a command that will
want them; `take_init` and `take_page_server` hand over what was started, or start one. What nobody takes sees its control socket close,
at `settled` or at the owner's end, and exits.

Beforehand they are forked: the owner has no thread yet, and each helper is spared an interpreter's start and half of its imports (20 to
30 ms of a processor that the owner's own imports want). Later ones are started anew, since a fork beside threads is not safe.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Child(Protocol):
    """A process of ours: what both a Popen and a Forked can."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit code (negative: the signal that ended it), or None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, sig: int) -> None:
        """Nothing where it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


class Forked:
    """A Child made by os.fork. Any thread may ask."""

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
            fd = os.pidfd_open(self.pid)  # nobody has reaped it, so the number is still its own
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
_PAGE_SERVER = "import sys; sys.path.insert(0, sys.argv[1]); from checkpoint.lazy_pages.main import main; sys.exit(main(int(sys.argv[2])))"
_END_LIMIT_S = 5.0
_SYS_CLOSE_RANGE, _MOST_FDS = 436, (1 << 32) - 1  # the same on every architecture
_init: list[Started] = []
_page_server: list[Started] = []


def _fork(name: str, main: Callable[[int], int]) -> Started:
    """A helper that begins as a copy of this process; only while this process has one thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        return Forked(pid), ours
    code = 1
    try:
        code = _become(name, main, theirs.detach())
    finally:
        os._exit(code)


def _become(name: str, main: Callable[[int], int], control_fd: int) -> int:
    """What a child does instead of going on with its parent's work: nothing of the parent's is left open."""
    os.setsid()  # see _spawn
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # as `main` will have it, and from the first moment on
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _close(3, control_fd - 1)
    _close(control_fd + 1, _MOST_FDS)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode())
    return main(control_fd)


def _close(first: int, last: int) -> None:
    """Close every descriptor from `first` to `last`, however many the limit allows (a container's may be 2^30)."""
    if first > last or not ctypes.CDLL(None).syscall(_SYS_CLOSE_RANGE, first, last, 0):
        return
    for name in os.listdir("/proc/self/fd"):  # Linux before 5.9
        if first <= int(name) <= last:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(int(name))


def _spawn(*program: str) -> Started:
    """Start a helper; it waits for its configuration on a socket. Returns the process and our end of it."""
    import subprocess

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", *program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            # An interrupt at a terminal goes to the whole foreground group, and would end the sandbox before its owner can stop the engine.
            start_new_session=True,
        )
    return process, ours


def _init_main(control_fd: int) -> int:
    from checkpoint.sandbox import init

    return init.main(control_fd)


def _page_server_main(control_fd: int) -> int:
    from checkpoint.lazy_pages import main as host

    return host.main(control_fd)


def start() -> None:
    """Start one of each beforehand, and let this interpreter do as little as it can beside importing.

    Its threads take turns every half millisecond instead of every five: the one that restores waits for the interpreter whenever it has
    waited for something else. Collecting garbage starts with `settled`.
    """
    _init.append(_fork("quickthaw-outer", _init_main))
    _page_server.append(_fork("quickthaw-pages", _page_server_main))
    gc.disable()
    sys.setswitchinterval(0.0005)


def settled() -> None:
    """The start is over, or no longer this process's to hurry: back to an interpreter's usual ways, without a page server that nobody took.

    What has been imported stays out of every later collection.
    """
    if not gc.isenabled():
        sys.setswitchinterval(0.005)
        gc.freeze()
        gc.enable()
    while _page_server:
        process, ours = _page_server.pop()
        ours.close()
        end(process)


def end(process: Child) -> None:
    """Wait for a helper whose control socket is closed; one that does not end is killed."""
    from subprocess import TimeoutExpired

    try:
        process.wait(_END_LIMIT_S)
    except TimeoutExpired:
        process.kill()
        # One in uninterruptible sleep ends when the kernel lets it go.
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
    """Process 1 of a sandbox: the one that was started beforehand, or a new one."""
    return _take(_init) or _spawn(str(Path(__file__).with_name("init.py")))


def take_page_server() -> Started:
    """A page server: the one that was started beforehand, or a new one."""
    return _take(_page_server) or _spawn("-c", _PAGE_SERVER, str(Path(__file__).resolve().parents[2]))
