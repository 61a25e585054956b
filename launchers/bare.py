"""An engine without a sandbox, where the host cannot make one: a child process on a free port of the host's own network.

The same calls as checkpoint.sandbox.sandbox.Sandbox, so that whoever drives a replica need not know which it has. It cannot be snapshotted.
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
    """One engine process and its children, in a session of their own, ended with this object."""

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
        """Start the engine; its process number. Raises LauncherError when it cannot be executed."""
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
        """The exit code (negative for a signal), or None while it runs."""
        return self._process.poll() if self._process else None

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to the engine's main process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Wait for the engine's end; its exit code, or None when it still runs after `timeout_s` seconds."""
        try:
            return self._process.wait(timeout_s) if self._process else None
        except subprocess.TimeoutExpired:
            return None

    def connect(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        """A non-blocking TCP socket on which a connect has been started. Raises OSError where another user listens at that port.

        The port stands in the engine's command line, which every user can read, and is free until the engine has been imported: who
        listens there first would get the clients' requests and keys.
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
            text = f"engine-port-taken: user {min(others)} listens at port {port}, which was chosen for the engine; it gets nothing"
            if not self._warned:
                self._warned = True
                log.warning("%s", text)
            raise ConnectionRefusedError(111, text)
        return sock

    def close(self, timeout_s: float = 10.0) -> None:
        """Kill the engine's whole session and wait for it."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)


def listening_users(port: int) -> set[int]:
    """The users with a TCP socket that listens at this port, on whichever address. Raises OSError."""
    users = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table) as file:  # a kernel without IPv6
            next(file, None)
            for line in file:
                words = line.split(maxsplit=8)
                if words[3] != _LISTENS:
                    break  # those that listen come first
                if int(words[1].rpartition(":")[2], 16) == port:
                    users.add(int(words[7]))
    return users


def free_port() -> int:
    """A TCP port of loopback that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
