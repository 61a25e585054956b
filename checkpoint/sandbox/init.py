"""The sandbox's init (process 1).

It creates the namespaces, runs engines and CRIU on request, and ends everything in the sandbox when it exits. It is run
by checkpoint.sandbox.prestart, forked or as `python -I -S init.py CONTROL_FD`. Its configuration is the first message
on the control socket (one JSON object per message, SOCK_SEQPACKET). It uses only the standard library and starts in 15
ms, because every restore waits for it.

Guarantees:
- The control socket's other end is the owner. When the owner ends, for whatever reason, every process of the sandbox
  is killed and init exits: the kernel then removes the PID namespace, the mounts and the network.
- There are two processes: the outer one enters the namespaces and waits; the inner one is process 1. Each ends when
  the other dies.
- Orphans of the process tree are reaped. The exit of a started or restored root process is reported as an event.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x80, 0x20000, 0x8000000, 0x20000000, 0x40000000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE, MS_RDONLY, MS_REMOUNT = 2, 4, 8, 4096, 16384, 1 << 19, 1, 32
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 15, 22, 36
MESSAGE_BYTES = 1 << 20
# Engine processes get numbers above this one. A restore needs those numbers free, and leaves the ones below to init,
# CRIU and its helpers.
FIRST_ENGINE_PID = 1000
KERNEL_FACTS = "/run/criu.kdat"  # CRIU's cache, see cover_run

Message = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    check(
        libc.mount(
            source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
        ),
        f"mount {target}",
    )


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Prefix an OSError's text with the operation."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}") from error


def loopback_up() -> None:
    """Set the loopback interface up without iproute2 (netdevice(7): SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP)."""
    with doing("loopback up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(sock, 0x8913, request))[1]
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh22x", b"lo", flags | 1))


def set_monotonic(wanted_ns: int) -> None:
    """Set the children's monotonic and boot clocks to `wanted_ns` (time_namespaces(7)).

    Call it before the first child is forked.
    """
    offset = wanted_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    seconds, nanoseconds = divmod(offset, 10**9)
    with doing("set the clock"), open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {seconds} {nanoseconds}\nboottime {seconds} {nanoseconds}\n")


def make_network_and_clock(monotonic_ns: int) -> None:
    """Unshare the network, with loopback up, and the clock, set to `monotonic_ns` unless that is 0."""
    check(libc.unshare(CLONE_NEWNET), "unshare(network)")
    loopback_up()
    check(libc.unshare(CLONE_NEWTIME), "unshare(time)")
    if monotonic_ns:
        set_monotonic(monotonic_ns)


def join_network_and_clock(monotonic_ns: int) -> None:
    """Join a network and a clock that belong to a user namespace of our own. Call it before CLONE_NEWPID.

    The creator of a user namespace has all capabilities over what belongs to it (user_namespaces(7)), so neither
    CAP_NET_ADMIN nor CAP_SYS_TIME is needed. Processes stay in their current user namespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            check(libc.unshare(CLONE_NEWUSER), "unshare(user)")
            make_network_and_clock(monotonic_ns)
            fds = [
                os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("net", "time_for_children")
            ]
            socket.send_fds(theirs, [b"made"], fds)
        except OSError as error:
            theirs.send(json.dumps([error.errno, error.strerror]).encode())
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        answer, fds, _, _ = socket.recv_fds(ours, MESSAGE_BYTES, 2)
    os.waitpid(child, 0)
    if answer != b"made":
        raise OSError(*json.loads(answer)) if answer else OSError(errno.ECHILD, "the helper for the network was killed")
    for fd, kind in zip(fds, (CLONE_NEWNET, CLONE_NEWTIME), strict=True):
        check(libc.setns(fd, kind), "join the network and the clock")
        os.close(fd)


def enter_namespaces(config: Message) -> None:
    """Unshare all namespaces.

    Raises OSError, whose text names the failed operation and the fallback that was tried.
    """
    check(libc.unshare(CLONE_NEWNS | CLONE_NEWIPC), "unshare")
    try:
        make_network_and_clock(config["monotonic_ns"])
    except PermissionError as direct:
        try:
            join_network_and_clock(config["monotonic_ns"])
        except OSError as error:
            raise OSError(direct.errno, f"{direct.strerror}; in a user namespace {error.strerror}") from error
    check(libc.unshare(CLONE_NEWPID), "unshare(processes)")


def cover_run(kernel_facts: str) -> None:
    """Mount a tmpfs over a /run that is not one (in most containers), and bind the existing entries into it.

    CRIU caches kernel features in /run/criu.kdat, but only on a tmpfs, which a reboot empties. Without the cache,
    every restore probes the kernel again, for 40 ms and more. `kernel_facts` is an earlier cache, saved by
    checkpoint.criu.binary.
    """
    with open("/proc/mounts") as mounts:
        if any(line.split(" ", 3)[1:3] == ["/run", "tmpfs"] for line in mounts):
            return  # CRIU keeps its cache there, for the whole host
    below = os.open("/run", os.O_RDONLY | os.O_DIRECTORY)  # the covered folder stays reachable through its descriptor
    try:
        entries = list(os.scandir(below))
        mount("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
        for entry in entries:
            target = f"/run/{entry.name}"
            if entry.name.startswith("criu.kdat"):
                continue
            if entry.is_symlink():
                os.symlink(os.readlink(entry.name, dir_fd=below), target)
                continue
            if entry.is_dir():
                os.mkdir(target)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
            mount(f"/proc/self/fd/{below}/{entry.name}", target, "", MS_BIND | MS_REC)
    finally:
        os.close(below)
    with contextlib.suppress(FileNotFoundError), open(kernel_facts, "rb") as known, open(KERNEL_FACTS, "wb") as file:
        file.write(known.read())


def prepare_mounts(config: Message) -> None:
    # Slave: unmounts on the host propagate into the sandbox, so a sandbox never keeps a lazy mount of the host alive.
    mount("none", "/", "", MS_REC | MS_SLAVE)
    cover_run(config["kernel_facts"])
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    root = config["run_dir"]
    mount("quickthaw", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("tmp", "cache", "control", "queues"):
        os.mkdir(f"{root}/{name}", 0o700)
    # Lists the sandbox's POSIX message queues, which no snapshot can hold (checkpoint.snapshot.frozen).
    with contextlib.suppress(OSError):  # a kernel without message queues
        mount("queues", f"{root}/queues", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    # Inductor writes precompiled headers (150 MB) below TMPDIR regardless of its cache setting; link them into the
    # cache.
    os.symlink(f"{root}/cache/tmp-inductor", f"{root}/tmp/torchinductor_{config['user']}")
    for source, target, read_only in config["binds"]:
        if not os.path.isdir(target):
            os.makedirs(target)
        mount(source, target, "", MS_BIND)
        if read_only:
            mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def refuse_io_uring() -> None:
    """Make io_uring calls fail with ENOSYS: CRIU cannot dump its rings, and libuv opens one by default.

    Snapshots keep the filter. The filter is five instructions, written by hand (seccomp(2)): the call numbers are the
    same on every architecture, and engine images may lack libseccomp and the compiler with which Python would look for
    it.
    """
    enosys = 0x50000 | errno.ENOSYS  # SECCOMP_RET_ERRNO
    program = (
        (0x20, 0, 0, 0),  # load the call's number
        (0x35, 0, 2, 425),  # below io_uring_setup: allow
        (0x25, 1, 0, 427),  # above io_uring_register: allow
        (0x06, 0, 0, enosys),
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    # Init has CAP_SYS_ADMIN, so it does not need no_new_privs, which would break setuid helpers of the engine.
    check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.c_ulong(ctypes.addressof(head)), 0, 0), "seccomp filter")


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
    def __init__(self, control: socket.socket, config: Message) -> None:
        self.control = control
        self.config = config
        self.roots: set[int] = set()  # processes whose exits are reported to the owner
        self.commands: dict[
            int, tuple[int, int | None]
        ] = {}  # pid of a running helper → (message id, pid to report as a root)

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
                    lent = message.get("lent", ())
                    if len(lent) != len(fds):
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                    message["lent"] = dict(zip(lent, fds, strict=True))
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
        if message.get("lent", ())[:1] != ["body"] or not fds:
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
            self.commands[self.spawn(message, seccomp=False)] = (message["id"], message.get("adopts"))
        elif op == "abandon":
            for pid, (ident, _) in self.commands.items():
                if ident == message["command"]:
                    os.kill(pid, signal.SIGKILL)
            self.send(id=message["id"])
        elif op == "signal":
            os.kill(message["pid"], message["signal"])
            self.send(id=message["id"])
        elif op == "go-on":
            self.go_on(message.get("stopped", ()))
            self.send(id=message["id"])
        elif op == "unpack":
            # Restore the files that the images refer to before CRIU opens them.
            for source, target in message["copies"]:
                self.copy_tree(source, target)
            self.send(id=message["id"])
        elif op == "attach":
            # move_mount(2), MOVE_MOUNT_F_EMPTY_PATH: the descriptor is the mount.
            check(
                libc.syscall(429, message["lent"]["mount"], b"", -100, message["target"].encode(), 4),
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
    def go_on(stopped: Sequence[int]) -> None:
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
            lent = message["lent"]
            out = lent.pop("stdout", null)
            err = lent.pop("stderr", out)
            streams = [null, out, err]
            # Move all above 64 first, so that no source is overwritten before it was duplicated.
            streams = [fcntl.fcntl(stream, fcntl.F_DUPFD_CLOEXEC, 64) for stream in streams]
            for number, stream in enumerate(streams):
                os.dup2(stream, number, inheritable=True)
            moved = {int(to): fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 128) for to, fd in lent.items()}
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
                ident, adopts = self.commands.pop(pid)
                if adopts and not code:
                    self.roots.add(adopts)
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


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
