"""Mount from outside: start the detached daemon once, find a running one, recover the mount point of a killed one.

Standard library only. The fast path (a healthy daemon already serves this manifest here) is one Unix-socket round trip.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lazyfs.errors import Busy, LazyfsError, NotFound, Permanent, Temporary, Usage, os_errors
from lazyfs.mount.control import ask
from lazyfs.paths import (
    child_environment,
    default_store_url,
    flock_within,
    home,
    mount_namespace,
    open_fd,
    private_dir,
    state_dir,
)
from lazyfs.stores.urls import normal_url, shown_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.mount.config import MountConfig

_PING_S = 2.0
# A running daemon that does not answer counts as slow for this long: engines read through it, and killing it breaks them.
_PATIENCE_S = 20.0
_LOCK_S = 60.0
_END_S = 1.0
_RECORD_KEPT_S = 30 * 24 * 3600.0
# Same limit as the kernel's.
_MAX_LINKS = 40


class MountHandle(NamedTuple):
    """A live mount. `pid` is its daemon, which outlives the process that holds this handle."""

    pid: int
    mountpoint: Path
    socket: Path
    manifest: str
    store_url: str
    log_file: Path

    def status(self, limit_s: float = 10.0) -> dict[str, Any]:
        """Return the daemon's status. Raises NotFound if it is gone, Temporary after `limit_s` seconds."""
        return ask(self.socket, {"op": "status"}, limit_s)

    def control(self, op: str, **values: Any) -> dict[str, Any]:
        """Send any request to the control socket (see `lazyfs.mount.control`)."""
        return ask(self.socket, {"op": op, **values})

    def daemon(self) -> Literal["runs", "stopped", "gone"]:
        """Return the kernel's state of the daemon, without a request to it: a daemon too busy to answer also runs."""
        if _recorded_pid(state_dir("mounts") / f"{_name(str(self.mountpoint))}.json") != self.pid:
            return "gone"
        if _runs(self.pid):
            return "runs"
        return "gone" if _gone(self.pid, 0) else "stopped"

    def unmount(self, *, force: bool = False, limit_s: float = 10.0) -> bool:
        """Unmount and wait for the daemon to exit; return whether it exited.

        The daemon keeps running while another mount namespace (a sandbox) still shows the mount, and exits with that one. Raises
        Busy while files are open below it here; `force` cuts those files off instead.
        """
        from lazyfs.mount import kernel

        where = str(self.mountpoint)
        entry = kernel.mount_at(where)
        try:
            ask(self.socket, {"op": "unmount", "force": force}, limit_s)
        except NotFound:
            # The daemon exited before it could answer; the mount may be gone too.
            left = kernel.mount_at(where)
            if left is not None and left.fstype == kernel.FSTYPE:
                kernel.unmount(where, lazy=True)
        except LazyfsError as error:
            if error.code == "busy":
                raise Busy(str(error)) from None
            raise
        # While another namespace or an open file keeps the mount, its daemon keeps running. Otherwise it exits, slowly on a busy host.
        kept = entry is not None and kernel.exists(entry.device)
        if _gone(self.pid, min(limit_s, _END_S) if kept else limit_s):
            return True
        if not force:
            return False
        # SIGKILL closes the connection, which cuts off every remaining user (another namespace, an open file).
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if _gone(self.pid, _END_S):
            return True
        # A thread of the daemon waits for this very mount. Abort it only now: the kernel reuses the device number of a mount
        # that is gone.
        if entry is not None and entry.fstype == kernel.FSTYPE:
            kernel.abort(entry.device)
        if not _gone(self.pid, limit_s):
            raise Busy(f"the daemon of {where} (pid {self.pid}) does not exit after SIGKILL")
        return True


def mount(
    manifest_digest: str,
    mountpoint: Path,
    *,
    store_url: str | None = None,
    cache_dir: Path | None = None,
    log_file: Path | None = None,
    ready_timeout_s: float = 30.0,
    **settings: Any,
) -> MountHandle:
    """Mount a manifest at `mountpoint` (created if needed); return when it is served, at once if it already is.

    `settings` are fields of MountConfig (native, transport, idle_exit_s, cache_limit, …); peers are those of `QUICKTHAW_PEERS` unless
    they are among them. They apply to a new daemon, not to one
    that already runs; only `trust_keys` is asked of that, too. Raises Busy if another manifest or file system is mounted there,
    HostLacks without /dev/fuse or privilege, NotFound for a manifest that the store lacks, Integrity for one that no trusted key
    signed, Temporary if the daemon is not ready in time.
    """
    where = _absolute(mountpoint)
    url = normal_url(store_url or default_store_url())
    name = _name(where)
    socket = state_dir("run") / f"{name}.sock"

    def config() -> MountConfig:
        from lazyfs.mount.config import MountConfig, peers_of_environment

        return MountConfig(
            manifest=manifest_digest,
            mountpoint=where,
            store_url=url,
            cache_dir=str(cache_dir or home() / "cache"),
            log_file=str(log_file or state_dir("logs") / f"mount-{_path_name(where)}.log"),
            socket=str(socket),
            state_file=str(state_dir("mounts") / f"{name}.json"),
            home=str(home()),
            **{**peers_of_environment(), **settings},
        )

    def served(found: MountHandle) -> MountHandle:
        handle = _check_same_manifest(found, manifest_digest, where)
        if settings.get("trust_keys"):
            # Whoever mounted it may have asked for no signature.
            from lazyfs.mount.manifest_source import load_manifest

            load_manifest(config())
        return handle

    found = _ping_or_none(socket)
    if found is not None:
        return served(found)
    with mount_lock(where):
        found = _ping_or_none(socket)
        if found is not None:
            return served(found)
        found = _wait_for_slow_daemon(socket, name)
        if found is not None:
            return served(found)
        _refuse_other_home(where, name)
        _recover(where, name, socket)
        _forget_gone(where)
        return _start(config(), ready_timeout_s)


def find_mount(mountpoint: Path) -> MountHandle | None:
    """Return the live mount at that path, or None."""
    where = _absolute(mountpoint)
    return _ping_or_none(state_dir("run") / f"{_name(where)}.sock")


def no_mount_error(mountpoint: Path) -> LazyfsError:
    """Return the error to raise if `find_mount` returns None: Temporary if a daemon exists but does not answer, else NotFound."""
    where = _absolute(mountpoint)
    pid = _recorded_pid(state_dir("mounts") / f"{_name(where)}.json")
    if pid is None:
        return NotFound(f"no daemon serves {where}")
    return Temporary(
        f"the daemon of {where} (pid {pid}) does not answer; mount there again to replace it", code="daemon-silent"
    )


def unmount(mountpoint: Path, *, force: bool = False, limit_s: float = 10.0) -> bool:
    """Unmount whatever quickthaw mounted there, whether its daemon is alive or not.

    Raises NotFound if nothing is mounted, Busy while files are open.
    """
    from lazyfs.mount import kernel

    where = _absolute(mountpoint)
    name = _name(where)
    socket = state_dir("run") / f"{name}.sock"
    found = _ping_or_none(socket)
    if found is None and not force:
        found = _wait_for_slow_daemon(socket, name)
    if found is not None:
        return found.unmount(force=force, limit_s=limit_s)
    if kernel.mount_at(where) is None:
        raise NotFound(f"nothing is mounted at {where}")
    _recover(where, name, socket)
    return True


def _absolute(mountpoint: Path) -> str:
    # Not resolve(): stat of a stale mount point fails. Resolve its parent only; readlink of a mount point never reaches its daemon.
    path = Path(os.path.abspath(Path(mountpoint).expanduser()))
    for _ in range(_MAX_LINKS):
        path = Path(os.path.realpath(path.parent)) / path.name
        try:
            target = path.readlink()
        except OSError:
            return str(path)
        path = Path(os.path.abspath(path.parent / target))
    raise Usage(f"{mountpoint}: too many symbolic links")


def _path_name(where: str) -> str:
    """Return the name of a mount point's lock and log."""
    return _digest(where)


def _name(where: str) -> str:
    """Return the name of a mount point's record and socket: one per mount namespace, in which alone the mount is visible.

    Containers and hosts that share a state folder so leave each other's daemons alone.
    """
    return f"{_digest(where)}-{_digest(mount_namespace())[:8]}"


def _digest(text: str) -> str:
    import hashlib

    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _forget_gone(where: str) -> None:
    """Remove records and sockets that killed containers left for this mount point long ago. The caller holds its lock."""
    for record in state_dir("mounts").glob(f"{_path_name(where)}-*.json"):
        socket = state_dir("run") / f"{record.stem}.sock"
        with contextlib.suppress(OSError):
            if time.time() - record.stat().st_mtime > _RECORD_KEPT_S and not _answers(socket):
                record.unlink()
                socket.unlink(missing_ok=True)


def _answers(socket: Path) -> bool:
    try:
        ask(socket, {"op": "ping"}, _PING_S)
    except Temporary:
        return True  # slow
    except LazyfsError:
        return False
    return True


def _ping_or_none(socket: Path) -> MountHandle | None:
    try:
        return _ping(socket)
    except LazyfsError:
        return None


def _wait_for_slow_daemon(socket: Path, name: str) -> MountHandle | None:
    """Wait for the mount of a slow daemon.

    Return None at once if it does not run (exited or stopped), and after `_PATIENCE_S` if it hangs.
    """
    pid = _recorded_pid(state_dir("mounts") / f"{name}.json")
    deadline = time.monotonic() + _PATIENCE_S
    while pid is not None and _runs(pid) and time.monotonic() < deadline:
        try:
            return _ping(socket)
        except Temporary:
            time.sleep(0.01)
        except LazyfsError:
            # The socket is closed: the daemon is exiting, or serves another mount.
            return None
    return None


def _runs(pid: int) -> bool:
    """Return whether the process exists and has neither exited nor been stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZXTt"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _ping(socket: Path) -> MountHandle | None:
    answer = ask(socket, {"op": "ping"}, _PING_S)
    from lazyfs.mount import kernel

    if kernel.mount_at(str(answer["mountpoint"])) is None:
        # Unmounted by other means, but kept alive by another namespace: it must give up the name.
        with contextlib.suppress(LazyfsError):
            ask(socket, {"op": "withdraw"}, _PING_S)
        return None
    return _handle(answer)


def _handle(answer: dict[str, Any]) -> MountHandle:
    return MountHandle(
        int(answer["pid"]),
        Path(answer["mountpoint"]),
        Path(answer["socket"]),
        str(answer["manifest"]),
        str(answer["store"]),
        Path(answer["log"]),
    )


def _check_same_manifest(found: MountHandle, manifest_digest: str, where: str) -> MountHandle:
    if found.manifest == manifest_digest and str(found.mountpoint) == where:
        return found
    raise Busy(
        f"{where} already shows manifest {found.manifest[:12]}; unmount it first (`quickthaw mount --unmount {where}`)",
        code="mounted-otherwise",
    )


@contextlib.contextmanager
def mount_lock(where: str) -> Iterator[None]:
    """Hold the lock of a mount point (an absolute path) in this state folder. Raises Temporary (mount-locked) after a minute."""
    path = state_dir("mounts") / f"{_path_name(where)}.lock"
    with contextlib.ExitStack() as held:
        with os_errors(f"cannot create {path}"):
            fd = held.enter_context(open_fd(path, os.O_RDWR | os.O_CREAT))
        if not flock_within(fd, _LOCK_S):
            raise Temporary(
                f"another process that mounts there has held {path} for {_LOCK_S:.0f} s", code="mount-locked"
            )
        yield


def _refuse_other_home(where: str, name: str) -> None:
    """Raise Busy if a daemon of another QUICKTHAW_HOME serves the mount point and answers."""
    import threading

    from lazyfs.mount import kernel

    entry = kernel.mount_at(where)
    if (
        entry is None
        or entry.fstype != kernel.FSTYPE
        or _recorded_pid(state_dir("mounts") / f"{name}.json") is not None
    ):
        return
    alive: list[bool] = []

    def call_statvfs() -> None:
        with contextlib.suppress(OSError):
            os.statvfs(where)  # Never answered by the kernel alone.
            alive.append(True)

    # In a thread: if it hangs, it returns when the mount is aborted.
    thread = threading.Thread(target=call_statvfs, daemon=True)
    thread.start()
    thread.join(_PING_S)
    if alive:
        raise Busy(
            f"{where} is served by a daemon of another QUICKTHAW_HOME; unmount it first (`quickthaw mount --unmount {where}`)",
            code="mounted-otherwise",
        )


def _recover(where: str, name: str, socket: Path) -> None:
    """Remove what a killed or unresponsive daemon left behind.

    Raises Busy if another file system is mounted there.
    """
    from lazyfs.mount import kernel

    state_file = state_dir("mounts") / f"{name}.json"
    pid = _recorded_pid(state_file)
    if pid is not None:
        # It holds the mount and did not answer a ping: no process waiting for it would ever be served.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _gone(pid, 5.0)
    entry = kernel.mount_at(where)
    while entry is not None:
        if entry.fstype != kernel.FSTYPE:
            raise Busy(f"{where} is a mount point of another file system ({entry.fstype}); choose another path")
        kernel.abort(entry.device)
        kernel.unmount(where, lazy=True)
        entry = kernel.mount_at(where)
    socket.unlink(missing_ok=True)
    state_file.unlink(missing_ok=True)


def _recorded_pid(state_file: Path) -> int | None:
    """Return the pid from a state file if that process still is a daemon of this mount, else None."""
    try:
        record = json.loads(state_file.read_bytes())
        pid = int(record["pid"])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = b"lazyfs.mount.daemon" in arguments and any(os.fsencode(str(record["socket"])) in a for a in arguments)
    return pid if ours else None


def _gone(pid: int, limit_s: float) -> bool:
    """Wait up to `limit_s` for the process to exit; return whether it did.

    A zombie counts as exited, unless threads of it still wait in the kernel.
    """
    deadline, pause = time.monotonic() + limit_s, 0.001
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state in ("Z", "X") and len(os.listdir(f"/proc/{pid}/task")) <= 1:
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(0.05, pause * 2)


def _start(config: MountConfig, limit_s: float) -> MountHandle:
    import subprocess

    made = not os.path.lexists(config.mountpoint)
    with os_errors(f"cannot prepare {config.mountpoint}"):
        private_dir(Path(config.mountpoint))
        private_dir(Path(config.log_file).parent)
        log_fd = os.open(config.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    read_end, write_end = os.pipe()
    with open(read_end, "rb", buffering=0), open(config.to_fd(), "rb", buffering=0) as passed:
        with open(write_end, "wb", buffering=0), open(log_fd, "ab") as log:
            launcher = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "lazyfs.mount.daemon",
                    config.socket,
                    str(passed.fileno()),
                    str(write_end),
                ],
                pass_fds=[passed.fileno(), write_end],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment(),
                start_new_session=True,
            )
        answer = _read_answer(read_end, limit_s)
        launcher.wait(10)
    if made and not (answer and answer.get("ok")):
        with contextlib.suppress(OSError):
            Path(config.mountpoint).rmdir()
    if answer is None:
        with contextlib.suppress(LazyfsError):
            _recover(config.mountpoint, _name(config.mountpoint), Path(config.socket))
        raise Temporary(
            f"the mount at {config.mountpoint} is not ready after {limit_s:g} s (store: {shown_url(config.store_url)}); "
            f"see {config.log_file}",
            code="mount-slow",
        )
    if not answer.get("ok"):
        raise _error_of(answer, config)
    return _handle(answer)


def _read_answer(fd: int, limit_s: float) -> dict[str, Any] | None:
    """Read the daemon's one-line answer; an error answer if it exits without one; None after `limit_s` seconds."""
    deadline, data = time.monotonic() + limit_s, b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        part = os.read(fd, 65536)
        if not part:
            return {"ok": False, "code": "daemon-died", "error": "the mount's daemon exited before it was ready"}
        data += part
    answer: dict[str, Any] = json.loads(data)
    return answer


def _error_of(answer: dict[str, Any], config: MountConfig) -> LazyfsError:
    from lazyfs import errors

    kinds = {c.__name__: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, LazyfsError)}
    kind = kinds.get(str(answer.get("kind")), Permanent)
    return kind(f"{answer['error']} (log: {config.log_file})", code=str(answer["code"]))
