"""Set up a sandbox's namespaces, mounts, network, clock and system call filter, before init runs anything in it.

Standard library only: every restore waits for init (checkpoint.sandbox.init).
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x80, 0x20000, 0x8000000, 0x20000000, 0x40000000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE, MS_RDONLY, MS_REMOUNT = 2, 4, 8, 4096, 16384, 1 << 19, 1, 32
PR_SET_SECCOMP = 22
MESSAGE_BYTES = 1 << 20
KERNEL_FACTS = "/run/criu.kdat"  # CRIU's cache, see mount_run

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
def error_context(what: str) -> Iterator[None]:
    """Prefix an OSError's text with the operation."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {os.strerror(error.errno or 0)}") from error


def loopback_up() -> None:
    """Set the loopback interface up without iproute2 (netdevice(7): SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP)."""
    with error_context("loopback up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack_from("16sh", fcntl.ioctl(sock, 0x8913, request))[1]
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh22x", b"lo", flags | 1))


def add_address(address: str) -> None:
    """Give loopback a second address, and a default route that every other one precedes (netdevice(7), rtnetlink(7)).

    A restored socket can be bound to the address, or connected to one outside, before the sandbox's way out is up.
    """
    inet, netmask = socket.inet_aton(address), b"\xff" * 4
    with error_context("second address"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for request, value in ((0x8916, inet), (0x891C, netmask)):  # SIOCSIFADDR, SIOCSIFNETMASK
            fcntl.ioctl(sock, request, struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, value))
        nowhere, name = struct.pack("H14x", socket.AF_INET), ctypes.create_string_buffer(b"lo")
        route = struct.pack(
            "@L16s16s16sHhLPhPLLH", 0, nowhere, bytes(16), nowhere, 1, 0, 0, 0, 10000, ctypes.addressof(name), 0, 0, 0
        )
        fcntl.ioctl(sock, 0x890B, route)  # SIOCADDRT


def set_monotonic(wanted_ns: int) -> None:
    """Set the children's monotonic and boot clocks to `wanted_ns` (time_namespaces(7)).

    Call it before the first child is forked.
    """
    offset = wanted_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    seconds, nanoseconds = divmod(offset, 10**9)
    with error_context("set the clock"), open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {seconds} {nanoseconds}\nboottime {seconds} {nanoseconds}\n")


def make_network_and_clock(monotonic_ns: int, address: str) -> None:
    """Unshare the network, with loopback up and an `address` unless that is "", and the clock, set to `monotonic_ns` unless that is 0."""
    check(libc.unshare(CLONE_NEWNET), "unshare(network)")
    loopback_up()
    if address:
        add_address(address)
    check(libc.unshare(CLONE_NEWTIME), "unshare(time)")
    if monotonic_ns:
        set_monotonic(monotonic_ns)


def join_network_and_clock(monotonic_ns: int, address: str) -> None:
    """Join a network and a clock that belong to a user namespace of our own. Call it before CLONE_NEWPID.

    The creator of a user namespace has all capabilities over what belongs to it (user_namespaces(7)), so neither
    CAP_NET_ADMIN nor CAP_SYS_TIME is needed. Processes stay in their current user namespace.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if not child:
        try:
            check(libc.unshare(CLONE_NEWUSER), "unshare(user)")
            make_network_and_clock(monotonic_ns, address)
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
        make_network_and_clock(config["monotonic_ns"], config["address"])
    except PermissionError as direct:
        try:
            join_network_and_clock(config["monotonic_ns"], config["address"])
        except OSError as error:
            raise OSError(direct.errno, f"{direct.strerror}; in a user namespace {error.strerror}") from error
    check(libc.unshare(CLONE_NEWPID), "unshare(processes)")


def mount_run(kernel_facts: str) -> None:
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
    mount_run(config["kernel_facts"])
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    root = config["run_dir"]
    mount("quickthaw", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755")
    for name in ("tmp", "cache", "control", "queues"):
        os.mkdir(f"{root}/{name}", 0o700)
    # Lists the sandbox's POSIX message queues, which no snapshot can hold (checkpoint.snapshot.dump_check).
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
