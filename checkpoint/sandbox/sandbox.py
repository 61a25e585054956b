"""The owner's side of the sandbox that an engine runs in.

A sandbox has its own namespaces for processes, mounts, network, IPC and clocks, a private /dev/shm and TMPDIR, and
no io_uring. So a snapshot contains nothing of the host, and replicas can run side by side. The sandbox lives as long
as its owner's `Sandbox` object or process, whichever ends first (see checkpoint/sandbox/init.py). A replica's port
exists only inside its network namespace; `Sandbox.connect` creates sockets there for the proxy.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import getpass
import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.errors import Failed, HostLacks
from checkpoint.sandbox import prestart
from checkpoint.sandbox.network import ADDRESS, close_outgoing, inside, own_network
from checkpoint.snapshot import speculative

if TYPE_CHECKING:
    from checkpoint.sandbox.egress import Egress, WayOut

log = logging.getLogger("quickthaw")
RUN_DIR = "/run/quickthaw"
"""Folder of a sandbox's temporary files, caches and models: the same path in each, so that snapshots can contain it."""
TMP_DIR = f"{RUN_DIR}/tmp"
CACHE_DIR = f"{RUN_DIR}/cache"
CONTROL_DIR = f"{RUN_DIR}/control"
QUEUES_DIR = f"{RUN_DIR}/queues"
"""A mount of the sandbox's POSIX message queues (mq_overview(7)), one file each."""
READY_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
_PACKET_BYTES = 64 << 10  # the kernel takes at most SO_SNDBUF, some 200 KiB
_SYS_OPEN_TREE, _AT_FDCWD, _OPEN_TREE_CLONE = 428, -100, 1  # the same on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bind:
    """Show folder `source` of the host at `target` inside the sandbox."""

    source: Path
    target: Path
    read_only: bool = True


@dataclass(frozen=True)
class SandboxConfig:
    """Settings of a sandbox.

    `monotonic_ns`: the monotonic clock at the start (a snapshot's, in nanoseconds); 0 keeps the host's clock.
    `kernel_facts`: CRIU's cached kernel features (Criu.kernel_facts); the file need not exist. `egress`: the way out into
    this host's network; None for a sandbox with loopback only.
    """

    binds: Sequence[Bind] = ()
    refuse_io_uring: bool = True
    monotonic_ns: int = 0
    kernel_facts: Path | None = None
    egress: Egress | None = None

    def message(self) -> dict[str, Any]:
        """Return the first message to init (checkpoint.sandbox.init)."""
        return {
            "binds": [[str(b.source), str(b.target), b.read_only] for b in self.binds],
            "refuse_io_uring": self.refuse_io_uring,
            "monotonic_ns": self.monotonic_ns,
            "kernel_facts": str(self.kernel_facts or ""),
            "run_dir": RUN_DIR,
            "user": _user(),
            "address": ADDRESS if self.egress else "",
        }


def _user() -> str:
    """Return the user's name as torch uses it in folder names, or the uid of a container's user without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def make_run_dir() -> None:
    """Create the folder over which every sandbox mounts its own. Raises HostLacks (sandbox-run-dir)."""
    try:
        Path(RUN_DIR).mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        raise HostLacks(
            "sandbox-run-dir",
            f"cannot create {RUN_DIR} ({error.strerror}); run as root, and mount a tmpfs there if the root file system is read-only",
        ) from error


@dataclass
class Sandbox:
    """A running sandbox. Use it as a context manager, or call `close`; it also closes when its owner dies."""

    config: SandboxConfig = field(default_factory=SandboxConfig)
    on_exit: Callable[[int, int], None] | None = None
    """Called as `on_exit(pid, exit code)` from the sandbox's reader thread when a started or restored root process ends,
    even if it ends because init did."""
    begun: speculative.BegunRestore | None = None
    """A speculative restore whose init already has this configuration and the first requests. This object takes it over."""

    def __post_init__(self) -> None:
        self._pending: dict[int, Future[dict[str, Any]]] = {}
        self._begun: dict[int, Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._next_id = 0
        self._closed = False
        self._closing = False
        own_network()
        begun, self.begun = self.begun, None
        self._roots: set[int] = set()
        self._exits: dict[int, int] = {}
        self._network: int | None = None
        self._way_out: WayOut | None = None
        self._network_lock = threading.Lock()
        if begun and begun.init:
            (self._process, self._control), begun.init = begun.init, None
            self._begun = {request: Future[dict[str, Any]]() for request in (speculative.UNPACK, speculative.EXEC)}
            self._pending |= self._begun
        else:
            make_run_dir()
            self._process, self._control = prestart.take_init()
        try:
            if not self._begun:
                self._control.send(json.dumps(self.config.message()).encode())
            self._wait_ready()
            self._enter()
        except OSError as error:
            self.close()
            raise Failed(
                "sandbox-died",
                f"the sandbox died while it was created ({error.strerror or error}); see quickthaw doctor",
            ) from error
        except BaseException:
            self.close()
            raise
        self._reader = threading.Thread(target=self._read, name="sandbox-reader", daemon=True)
        self._reader.start()

    def _wait_ready(self) -> None:
        """Wait until init reports that it is ready."""
        self._control.settimeout(READY_TIMEOUT_S)
        try:
            answer = self._control.recv(1 << 20)
        except TimeoutError as error:
            raise Failed("sandbox-stalled", f"the sandbox did not start within {READY_TIMEOUT_S:.0f} s") from error
        if not answer:
            raise ConnectionResetError(0, "init died")
        first = json.loads(answer)
        if first["event"] != "ready":
            raise HostLacks(
                "sandbox-refused", f"cannot create a sandbox: {first['error']}; quickthaw doctor lists what is missing"
            )
        self._control.settimeout(None)

    def _enter(self) -> None:
        """Find init's process number and open the sandbox's network namespace."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            raise ConnectionResetError(0, "init died")
        self._init_pid = int(children[0])
        self._network = os.open(f"/proc/{self._init_pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        if self.config.egress:
            from checkpoint.sandbox.egress import WayOut  # takes 1 ms, which few restores need

            self._way_out = WayOut(self.config.egress, self._network)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def init_pid(self) -> int:
        """Process number of the sandbox's init on the host."""
        return self._init_pid

    @property
    def control_dir(self) -> Path:
        """The sandbox's control folder as seen from the host, where engine processes write their answers."""
        return Path(f"/proc/{self._init_pid}/root{CONTROL_DIR}")

    # Requests to init

    def _read(self) -> None:
        try:
            while (data := self._receive()) is not None:
                self._on_message(json.loads(data))
        finally:
            with self._lock:
                self._closed = True
                pending, self._pending = list(self._pending.values()), {}
                running = self._roots - self._exits.keys()
            for future in pending:
                if not future.done():
                    future.set_exception(Failed("sandbox-gone", "the sandbox ended during the operation"))
            for pid in running:
                self._report_killed(pid)

    def _receive(self) -> bytes | None:
        try:
            return self._control.recv(1 << 20) or None
        except OSError:
            return None

    def _on_message(self, message: dict[str, Any]) -> None:
        if message.get("event") == "exit":
            self._report_exit(message["pid"], message["code"])
            return
        with self._lock:
            future = self._pending.pop(message["id"], None)
        if future and not future.done():
            future.set_result(message)

    def _report_killed(self, pid: int) -> None:
        """Report the end of a root process that ended together with init, which cannot report it.

        An owner that calls `close` gets no report.
        """
        if not self._closing:
            self._report_exit(pid, -signal.SIGKILL)

    def _report_exit(self, pid: int, code: int) -> None:
        self._exits[pid] = code
        if self.on_exit:
            try:
                self.on_exit(pid, code)
            except Exception:
                # A defect, but later requests must still get their answers.
                log.exception("sandbox: handling the exit of process %d failed", pid)

    def _ask(
        self, timeout_s: float = REQUEST_TIMEOUT_S, fds: Mapping[str, int | None] | None = None, **message: Any
    ) -> dict[str, Any]:
        """Send a request and return its answer.

        `fds` maps names to descriptors that init receives for this request; a value of None is left out.
        """
        passed = {name: fd for name, fd in (fds or {}).items() if fd is not None}
        future: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._closed:
                raise Failed("sandbox-gone", "the sandbox has ended")
            self._next_id += 1
            message["id"] = self._next_id
            self._pending[self._next_id] = future
            try:
                self._send(message, passed)
            except OSError as error:
                self._pending.pop(self._next_id, None)
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS):
                    raise Failed("sandbox-operation", f"{message['op']}: {error.strerror}") from error
                raise Failed("sandbox-gone", "the sandbox has ended") from error
        return self._answer(future, timeout_s, message["op"], message["id"])

    def _send(self, message: Mapping[str, Any], fds: Mapping[str, int]) -> None:
        """Send a request.

        A message longer than a packet (an environment may have hundreds of KB) is sent as a file.
        """
        data = json.dumps({**message, "fds": list(fds)}).encode()
        if len(data) <= _PACKET_BYTES:
            socket.send_fds(self._control, [data], list(fds.values()))
            return
        body = os.memfd_create("quickthaw-request", os.MFD_CLOEXEC)
        with open(body, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            head = {"id": message["id"], "op": message["op"], "fds": ["body", *fds]}
            socket.send_fds(self._control, [json.dumps(head).encode()], [body, *fds.values()])

    def _answer(self, future: Future[dict[str, Any]], timeout_s: float, op: str, number: int) -> dict[str, Any]:
        try:
            answer = future.result(timeout_s)
        except TimeoutError as error:
            if op == "exec":
                # A hung CRIU keeps the process tree frozen; killing it releases the tree.
                self._ask(op="cancel", command=number)
            raise Failed("sandbox-stalled", f"{op} took longer than {timeout_s:.0f} s") from error
        if "error" in answer:
            raise Failed("sandbox-operation", answer["error"])
        return answer

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: str,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> int:
        """Start a root process with its output on the given file descriptors of this process.

        Returns its number inside the sandbox. Raises Failed when it cannot be executed.
        """
        fds = {"stdout": stdout, "stderr": stderr}
        pid = int(self._ask(fds=fds, op="start", argv=list(argv), env=dict(env), cwd=cwd)["pid"])
        self._add_root(pid)
        return pid

    def execute(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        timeout_s: float,
        fds: Mapping[int, int] | None = None,
        adopt: int | None = None,
    ) -> int:
        """Run a helper (CRIU) to its end and return its exit code.

        `fds` maps a number in the helper to one of this process's descriptors. `adopt` is the process that a successful
        helper leaves behind as a root process of the sandbox.
        """
        answer = self._ask(
            timeout_s,
            {str(to): fd for to, fd in (fds or {}).items()},
            op="exec",
            argv=list(argv),
            env=dict(env),
            cwd="/",
            adopt=adopt,
        )
        return self._adopted(int(answer["code"]), adopt)

    def wait_unpacked(self, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        """Wait until init has unpacked the folders, as requested by checkpoint.snapshot.speculative. Raises Failed."""
        self._answer(self._begun[speculative.UNPACK], timeout_s, "unpack", speculative.UNPACK)

    def wait_criu(self, timeout_s: float, root: int) -> int:
        """Wait for CRIU, as requested by checkpoint.snapshot.speculative, and return its exit code.

        It leaves process `root` behind as a root process of the sandbox. Raises Failed.
        """
        code = int(self._answer(self._begun[speculative.EXEC], timeout_s, "exec", speculative.EXEC)["code"])
        return self._adopted(code, root)

    def _adopted(self, code: int, root: int | None) -> int:
        if root is not None and not code:
            self._add_root(root)
        return code

    def _add_root(self, root: int) -> None:
        with self._lock:
            self._roots.add(root)
            gone = self._closed
        if gone and root not in self._exits:
            self._report_killed(root)

    def resume(self, stopped: Sequence[int] = ()) -> None:
        """Resume every process that CRIU left stopped, except those that were stopped at the dump."""
        self._ask(op="resume", stopped=list(stopped))

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a process by its number inside the sandbox. Raises Failed when it is gone."""
        self._ask(op="signal", pid=pid, signal=number)

    def unpack(self, copies: Sequence[tuple[Path, str]]) -> None:
        """Copy folders of the host over folders of the sandbox (its /dev/shm, its TMPDIR)."""
        self._ask(op="unpack", copies=[[str(source), target] for source, target in copies])

    def attach(self, source: Path, target: Path) -> None:
        """Show folder `source` of the host at `target` in a running sandbox (for a lazy mount that came up later).

        The mount is cloned here and moved there through its descriptor (open_tree(2), move_mount(2)). It is
        read-only if its source is. Raises Failed (attach-failed).
        """
        fd = _libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, str(source).encode(), _OPEN_TREE_CLONE | os.O_CLOEXEC)
        if fd < 0:
            error = ctypes.get_errno()
            raise Failed("attach-failed", f"cannot show {source} in the sandbox: {os.strerror(error)}")
        try:
            self._ask(fds={"mount": fd}, op="attach", target=str(target))
        finally:
            os.close(fd)

    def raise_pids(self, above: int) -> None:
        """Give later processes numbers above this one.

        Restored process trees keep their numbers, and new processes must not collide with them.
        """
        self._ask(op="raise-pids", above=above)

    def exit_code(self, pid: int) -> int | None:
        """Return the exit code of a root process (negative for a signal), or None while it runs."""
        return self._exits.get(pid)

    @property
    def alive(self) -> bool:
        """Whether init still answers."""
        return not self._closed

    # Sockets inside

    def connect(self, port: int, host: str = "127.0.0.1") -> socket.socket:
        """Return a non-blocking TCP socket inside the sandbox's network, on which a connect was started.

        Raises Failed (sandbox-gone), HostLacks (sandbox-network), ConnectionRefusedError.
        """
        with self._entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        error = sock.connect_ex((host, port))
        if error not in (0, errno.EINPROGRESS, errno.EAGAIN):
            sock.close()
            raise ConnectionRefusedError(error, os.strerror(error))
        return sock

    @contextlib.contextmanager
    def _entered(self) -> Iterator[int]:
        """Let this thread be in the sandbox's network, and yield its descriptor. Raises Failed, HostLacks."""
        with self._network_lock:  # `close` must not close the descriptor meanwhile: its number could be reused
            if self._network is None:
                raise Failed("sandbox-gone", "the sandbox has ended")
            with inside(self._network):
                yield self._network

    def wait_egress(self) -> None:
        """Return once the way out is open, at once if there is none. Raises HostLacks (egress-failed)."""
        if self._way_out:
            self._way_out.wait()

    def close_outgoing(self) -> None:
        """Close the connections that leave the sandbox, before a dump. Raises Failed (egress-not-closed, sandbox-gone)."""
        if not self.config.egress:
            return
        try:
            with self._network_lock:
                if self._network is not None:
                    close_outgoing(self._network, self.config.egress.host_ports)
        except OSError as error:
            raise Failed(
                "egress-not-closed",
                f"this kernel does not close the engine's connections ({error.strerror}), and no snapshot can hold them; "
                "launch with --no-egress, or with --no-snapshot",
            ) from error

    # Shutdown

    def end(self) -> None:
        """Have every process of the sandbox killed. Thread-safe; does not wait.

        Pending requests fail with sandbox-gone. The owner must still call `close`.
        """
        with contextlib.suppress(OSError):
            self._control.send(b'{"op": "stop", "id": 0}')
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def close(self, timeout_s: float = 10.0) -> None:
        """Kill every process of the sandbox and wait until the kernel has removed its namespaces.

        Idempotent.
        """
        self._closing = True
        if self._way_out:
            self._way_out.close()
        self.end()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # Init dies with its parent (PDEATHSIG); only a process in uninterruptible sleep can remain.
            self._process.send_signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        self._control.close()
        with self._network_lock:
            network, self._network = self._network, None
            if network is not None:
                os.close(network)

    def wait(self, pid: int, timeout_s: float) -> int | None:
        """Wait until a root process has ended.

        Return its exit code, or None if it still runs after `timeout_s` seconds.
        """
        limit = time.monotonic() + timeout_s
        while (code := self._exits.get(pid)) is None and time.monotonic() < limit and not self._closed:
            time.sleep(0.005)
        return self._exits.get(pid, code)
