"""The sandbox's init (process 1).

It enters the sandbox's namespaces (checkpoint.sandbox.namespaces), runs engines and CRIU on request, and ends everything
in the sandbox when it exits. checkpoint.sandbox.prestart forks or spawns it. Its configuration is the first message on
the control socket (one JSON object per message, SOCK_SEQPACKET). It uses only the standard library and starts in 15 ms,
because every restore waits for it.

Guarantees:
- The control socket's other end is the owner. When the owner ends, for whatever reason, every process of the sandbox
  is killed and init exits: the kernel then removes the PID namespace, the mounts and the network.
- There are two processes: the outer one enters the namespaces and waits; the inner one is process 1. Each ends when
  the other dies.
- Orphans of the process tree are reaped. The exit of a started or restored root process is reported as an event.
"""

import contextlib
import errno
import fcntl
import json
import os
import selectors
import signal
import socket
from collections.abc import Sequence

from checkpoint.sandbox.namespaces import (
    MESSAGE_BYTES,
    Message,
    check,
    enter_namespaces,
    libc,
    prepare_mounts,
    refuse_io_uring,
)

PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
# Engine processes get numbers above this one. A restore needs those numbers free, and leaves the ones below to init,
# CRIU and its helpers.
FIRST_ENGINE_PID = 1000


def copy_sparse(source: str, target: str) -> None:
    """Copy a file and keep its holes.

    Shared memory segments are mostly unwritten (vLLM's: 160 MB mapped, 0.1 MB written).
    """
    with open(source, "rb") as data, open(target, "wb") as copy:
        size = os.fstat(data.fileno()).st_size
        os.ftruncate(copy.fileno(), size)
        at = 0
        while at < size:
            try:
                at = os.lseek(data.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole remains
                raise
            end = os.lseek(data.fileno(), at, os.SEEK_HOLE)
            os.lseek(copy.fileno(), at, os.SEEK_SET)
            while at < end and (sent := os.sendfile(copy.fileno(), data.fileno(), at, end - at)):
                at += sent


class Init:
    """Process 1: handles the owner's requests until the control socket closes."""

    def __init__(self, control: socket.socket, config: Message) -> None:
        self.control = control
        self.config = config
        self.roots: set[int] = set()  # processes whose exits are reported to the owner
        # pid of a running helper → (message id, pid that becomes a root when the helper succeeds)
        self.commands: dict[int, tuple[int, int | None]] = {}

    def send(self, **message: object) -> None:
        try:
            self.control.send(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the owner is gone; everything in the sandbox ends with this process

    def run(self) -> None:
        wake_r, wake_w = os.pipe()
        for end in (wake_r, wake_w):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        selector = selectors.DefaultSelector()
        selector.register(self.control, selectors.EVENT_READ, "control")
        selector.register(wake_r, selectors.EVENT_READ, "wake")
        self.send(event="ready")
        while True:
            for key, _ in selector.select():
                if key.data == "wake":
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_r, 4096)
                    self.reap()
                    continue
                data, fds, _, _ = socket.recv_fds(self.control, MESSAGE_BYTES, 16)
                if not data:
                    return  # the owner is gone
                message = self.read(json.loads(data), fds)
                try:
                    names = message.get("fds", ())
                    if len(names) != len(fds):
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                    message["fds"] = dict(zip(names, fds, strict=True))
                    if not self.handle(message):
                        return
                except OSError as error:
                    self.send(
                        id=message["id"], error=f"{message['op']}: {error.strerror or error}", errno=error.errno or 0
                    )
                finally:
                    for fd in fds:
                        os.close(fd)

    @staticmethod
    def read(message: Message, fds: list[int]) -> Message:
        """Return a request; a long request's body is in the first descriptor's file.

        The descriptors left in `fds` belong to this request.
        """
        for fd in fds:
            os.set_inheritable(fd, False)  # recvmsg created them without close-on-exec
        if message.get("fds", ())[:1] != ["body"] or not fds:
            return message
        with open(fds.pop(0), "rb") as file:
            file.seek(0)
            found: Message = json.load(file)
        return found

    def handle(self, message: Message) -> bool:
        op = message["op"]
        if op == "stop":
            return False
        if op == "start":
            self.raise_pids(FIRST_ENGINE_PID)
            pid = self.spawn(message, seccomp=self.config["refuse_io_uring"])
            self.roots.add(pid)
            self.send(id=message["id"], pid=pid)
        elif op == "exec":
            self.commands[self.spawn(message, seccomp=False)] = (message["id"], message.get("adopt"))
        elif op == "cancel":
            for pid, (ident, _) in self.commands.items():
                if ident == message["command"]:
                    os.kill(pid, signal.SIGKILL)
            self.send(id=message["id"])
        elif op == "signal":
            os.kill(message["pid"], message["signal"])
            self.send(id=message["id"])
        elif op == "resume":
            self.resume(message.get("stopped", ()))
            self.send(id=message["id"])
        elif op == "unpack":
            # Restore the files that the images refer to before CRIU opens them.
            for source, target in message["copies"]:
                self.copy_tree(source, target)
            self.send(id=message["id"])
        elif op == "attach":
            # move_mount(2), MOVE_MOUNT_F_EMPTY_PATH: the descriptor is the mount.
            check(
                libc.syscall(429, message["fds"]["mount"], b"", -100, message["target"].encode(), 4),
                f"attach {message['target']}",
            )
            self.send(id=message["id"])
        elif op == "raise-pids":
            self.raise_pids(message["above"])
            self.send(id=message["id"])
        else:
            raise OSError(errno.EINVAL, f"unknown operation {op}")
        return True

    @staticmethod
    def resume(stopped: Sequence[int]) -> None:
        """Resume every process of the sandbox except init (kill(2)) and those that were stopped at the dump."""
        pids = [-1] if not stopped else [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        for pid in pids:
            if pid not in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @staticmethod
    def raise_pids(above: int) -> None:
        with open("/proc/sys/kernel/ns_last_pid", "r+") as file:
            if int(file.read()) < above:
                file.seek(0)
                file.write(str(above))

    @classmethod
    def copy_tree(cls, source: str, target: str, seen: dict[tuple[int, int], str] | None = None) -> None:
        """Copy folders, files and links with their modes.

        Skip sockets: CRIU creates them again when it binds them. Hard links stay links: `link_remap.N` and the
        semaphore it stands for are one file to the processes that share it.
        """
        seen = {} if seen is None else seen
        os.makedirs(target, exist_ok=True)
        for entry in os.scandir(source):
            to = os.path.join(target, entry.name)
            if entry.is_symlink():
                if not os.path.lexists(to):
                    os.symlink(os.readlink(entry.path), to)
            elif entry.is_dir():
                cls.copy_tree(entry.path, to, seen)
                os.chmod(to, entry.stat().st_mode & 0o7777)
            elif entry.is_file():
                stat = entry.stat()
                inode = (stat.st_dev, stat.st_ino)
                if stat.st_nlink > 1 and inode in seen:
                    os.link(seen[inode], to)
                    continue
                copy_sparse(entry.path, to)
                os.chmod(to, stat.st_mode & 0o7777)
                seen[inode] = to

    def spawn(self, message: Message, seccomp: bool) -> int:
        """Fork and exec.

        The child reports a failed start through a close-on-exec pipe, and this method raises it as OSError.
        """
        report_r, report_w = os.pipe()
        pid = os.fork()
        if pid:
            os.close(report_w)
            with open(report_r, "rb") as answer:
                failure = answer.read(4096)
            if failure:
                os.waitpid(pid, 0)
                code, _, text = failure.decode().partition(" ")
                raise OSError(int(code), text)
            return pid
        try:
            os.close(report_r)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            null = os.open("/dev/null", os.O_RDWR)
            passed = message["fds"]
            out = passed.pop("stdout", null)
            err = passed.pop("stderr", out)
            streams = [null, out, err]
            # Move all above 64 first, so that no source is overwritten before it was duplicated.
            streams = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 64) for stream in streams]
            for number, stream in enumerate(streams):
                os.dup2(stream, number, inheritable=True)
            moved = {int(to): fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 128) for to, fd in passed.items()}
            for to, fd in moved.items():
                os.dup2(fd, to, inheritable=True)
            # Every other descriptor that this process inherited or opened is close-on-exec.
            os.chdir(message["cwd"])
            os.umask(message.get("umask", 0o022))
            if message["op"] == "start":
                # A helper that daemonises stays below the engine, so a dump of the engine's tree includes it (prctl(2);
                # execve keeps this).
                libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
            if seccomp:
                refuse_io_uring()
            os.execvpe(message["argv"][0], message["argv"], message["env"])
        except BaseException as error:  # noqa: BLE001 - a forked child has no caller to raise to
            why = getattr(error, "errno", None) or errno.EIO
            os.write(report_w, f"{why} {message['argv'][0]}: {getattr(error, 'strerror', None) or error}".encode())
        finally:
            os._exit(127)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid in self.commands:
                ident, adopt = self.commands.pop(pid)
                if adopt and not code:
                    self.roots.add(adopt)
                self.send(id=ident, code=code)
            elif pid in self.roots:
                self.roots.discard(pid)
                self.send(event="exit", pid=pid, code=code)


def close_on_exec() -> None:
    """Set close-on-exec on all descriptors above 2.

    One that leaked into an engine would become part of its snapshot.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)


def main(control_fd: int) -> int:
    """Run init (see the module's docstring). Return the exit code of the outer process."""
    control = socket.socket(fileno=control_fd)
    # Init shares its owner's command line and control group, so it receives the signals that stop the owner. Ignore
    # them: the owner stops the engine in order, and init ends with it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        first = control.recv(MESSAGE_BYTES)
    except ConnectionResetError:
        first = b""
    if not first:
        return 0  # prestarted (checkpoint.sandbox.prestart) and not needed, or the owner was killed
    config = json.loads(first)
    close_on_exec()
    try:
        enter_namespaces(config)
    except OSError as error:
        control.send(json.dumps({"event": "failed", "errno": error.errno, "error": str(error.strerror)}).encode())
        return 1
    inner = os.fork()
    if inner:
        control.close()
        _, status = os.waitpid(inner, 0)
        return os.waitstatus_to_exitcode(status) & 0xFF
    # Executed processes inherit ignored signals, so restore the defaults. The kernel protects process 1 either way
    # (pid_namespaces(7)).
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_NAME, b"quickthaw-init")
    try:
        prepare_mounts(config)
    except OSError as error:
        control.send(json.dumps({"event": "failed", "errno": error.errno, "error": str(error.strerror)}).encode())
        os._exit(1)
    os.setsid()
    with contextlib.suppress(ConnectionError):  # the owner was killed in the middle of a message
        Init(control, config).run()
    os._exit(0)  # init exits: the kernel kills every other process of the sandbox
