"""An engine without a sandbox, for hosts that cannot create one: a child process on a free port of the host's network.

Has the interface of checkpoint.sandbox.sandbox.Sandbox, so that a replica works with either. It cannot be snapshotted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence

from launchers.errors import LauncherError

log = logging.getLogger("quickthaw")
_LISTENS = "0A"


class BareProcess:
    """One engine process and its children, in their own session, killed by `close`."""

    def __init__(self, on_exit: Callable[[int, int], None] | None = None) -> None:
        self.on_exit = on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._warned = False

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> int:
        """Start the engine and return its pid.

        Raises LauncherError (engine-not-started) if it cannot be executed.
        """
        try:
            self._process = subprocess.Popen(
                list(argv),
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise LauncherError(
                "engine-not-started", f"{argv[0]}: {error.strerror}; give the interpreter with --engine-python"
            ) from error
        threading.Thread(target=self._watch, args=(self._process,), name="engine-watch", daemon=True).start()
        return self._process.pid

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self.on_exit:
            self.on_exit(process.pid, code)

    def exit_code(self, pid: int) -> int | None:
        """Return the exit code (negative for a signal), or None while it runs."""
        return self._process.poll() if self._process else None

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to the engine's main process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Wait for the engine to exit; return its exit code, or None if it still runs after `timeout_s` seconds."""
        try:
            return self._process.wait(timeout_s) if self._process else None
        except subprocess.TimeoutExpired:
            return None

    def connect(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        """Return a non-blocking TCP socket whose connect has been started.

        Raises OSError if another user listens at that port. Every user can read the port on the engine's command line, and
        it stays free until the engine has been imported. Another user who listens there first would receive the clients'
        requests and keys.
        """
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex((host, port))
        if error not in (0, 115):
            sock.close()
            raise ConnectionRefusedError(error, os.strerror(error))
        try:
            others = listening_users(port) - {os.geteuid()}
        except BaseException:
            sock.close()
            raise
        if others:
            sock.close()
            text = (
                f"engine-port-taken: user {min(others)} listens at port {port}, which was chosen for the engine, so "
                "no request is sent there; start again to choose another port"
            )
            if not self._warned:
                self._warned = True
                log.warning("%s", text)
            raise ConnectionRefusedError(111, text)
        return sock

    def close(self, timeout_s: float = 10.0) -> None:
        """Kill the engine's session and wait up to `timeout_s` seconds for the main process."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)


def listening_users(port: int) -> set[int]:
    """Return the uids with a TCP socket listening at this port, on any address. Raises OSError."""
    users = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table) as file:  # a kernel without IPv6
            next(file, None)
            for line in file:
                words = line.split(maxsplit=8)
                if words[3] != _LISTENS:
                    break  # the kernel lists listening sockets first
                if int(words[1].rpartition(":")[2], 16) == port:
                    users.add(int(words[7]))
    return users


def free_port() -> int:
    """Return a TCP port of loopback that was free at the time of the call."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
