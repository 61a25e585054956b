"""Detect this process's privileges: capabilities, seccomp, user namespace, devices.

Takes well under a millisecond. `missing` lists everything that a feature of quickthaw needs and this process lacks;
`remedy` says how to grant it. docs/deploy.md has the list.
"""

from __future__ import annotations

import ctypes
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

CAPABILITIES = {
    "CAP_SETPCAP": 8,
    "CAP_NET_ADMIN": 12,
    "CAP_SYS_CHROOT": 18,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_TIME": 25,
}
FUSE = "/dev/fuse"
SECCOMP = "seccomp=unconfined"
HOST_USERS = "the host's user namespace"
OWN_NETWORK = "a network of this user namespace"
FEATURES: dict[str, tuple[str, ...]] = {
    "mount": ("CAP_SYS_ADMIN", FUSE),
    # unshare(2), mount(2); setns(2) back into the own network after connecting into a sandbox.
    "sandbox": ("CAP_SYS_ADMIN", OWN_NETWORK),
    # CRIU: SO_SNDBUFFORCE (CAP_NET_ADMIN, valid only in the host's user namespace), PR_CAPBSET_DROP, chroot(2).
    "snapshots": ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SETPCAP", "CAP_SYS_CHROOT", HOST_USERS),
    # PTRACE_O_SUSPEND_SECCOMP and PTRACE_SECCOMP_GET_FILTER, which the kernel refuses to a filtered process. A restore needs neither.
    "dumps": (SECCOMP,),
    # userfaultfd(2) that also handles faults in system calls.
    "pages": ("CAP_SYS_PTRACE",),
}
_FLAGS = {FUSE: "--device /dev/fuse", SECCOMP: "--security-opt seccomp=unconfined", HOST_USERS: "--userns host"}
_FUSE_NUMBER = os.makedev(10, 229)
_CLONE_NEWNET = 0x40000000
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_libc = ctypes.CDLL(None, use_errno=True)


class Privileges(NamedTuple):
    """The detected privileges.

    `apparmor` is the profile's name; empty if there is none or it confines nothing.
    """

    effective: int
    seccomp: bool = False
    apparmor: str = ""
    host_users: bool = True
    own_network: bool = True
    fuse: bool = True
    page_faults: bool = True
    traces_children_only: bool = False
    """Yama: only CAP_SYS_PTRACE may attach to processes that are not children (as CRIU must)."""
    user_namespaces: bool = True
    uid: int = 0

    @classmethod
    def current(cls) -> Privileges:
        """Return this process's privileges. Unreadable ones count as granted; their use will show."""
        status = dict(line.split(":\t", 1) for line in _text("/proc/self/status").splitlines() if ":\t" in line)
        return cls(
            effective=int(status.get("CapEff", "0"), 16),
            seccomp=status.get("Seccomp", "0") != "0",
            apparmor=_apparmor(),
            host_users=_text("/proc/self/uid_map").split() in ([], ["0", "0", "4294967295"]),
            own_network=_may_return(),
            fuse=_opens_fuse(),
            page_faults=_page_faults(),
            traces_children_only=_text("/proc/sys/kernel/yama/ptrace_scope").strip() not in ("", "0"),
            user_namespaces=_text("/proc/sys/user/max_user_namespaces").strip() != "0",
            uid=os.geteuid(),
        )

    def has(self, name: str) -> bool:
        """Return whether a capability, or another privilege named in FEATURES, is granted."""
        if name in CAPABILITIES:
            return bool(self.effective >> CAPABILITIES[name] & 1)
        return {
            FUSE: self.fuse,
            SECCOMP: not self.seccomp,
            HOST_USERS: self.host_users,
            OWN_NETWORK: self.own_network,
        }[name]

    def missing(self, *features: str) -> tuple[str, ...]:
        """Return everything that these features need and this process lacks, without duplicates."""
        wanted = dict.fromkeys(name for feature in features for name in FEATURES[feature])
        if "pages" in features and self.page_faults:
            del wanted["CAP_SYS_PTRACE"]
        elif "pages" in features and self.has("CAP_SYS_PTRACE"):
            wanted[SECCOMP] = None  # the filter forbids userfaultfd(2), as runtimes' default profiles do
        if "snapshots" in features:
            wanted |= {"CAP_SYS_PTRACE": None} if self.traces_children_only else {}
            # The clock of a restored engine: our own user namespace suffices, too (checkpoint.sandbox.namespaces).
            wanted |= {} if self.user_namespaces else {"CAP_SYS_TIME": None}
        return tuple(name for name in wanted if not self.has(name))

    @property
    def key(self) -> str:
        """Return a file name part for the privileges that change what the kernel allows."""
        profile = f"-{zlib.crc32(self.apparmor.encode()):08x}" if self.apparmor else ""
        user = f"-u{self.uid}" if self.uid else ""
        return f"{self.effective:x}{'-seccomp' * self.seccomp}{'-users' * (not self.host_users)}{user}{profile}"


def remedy(missing: Iterable[str]) -> str:
    """Return `missing CAP_X, …; run as root, in a container add …` in one line."""
    names = list(missing)
    flags = [_FLAGS.get(name) or f"--cap-add {name.removeprefix('CAP_')}" for name in names if name != OWN_NETWORK]
    return f"missing {', '.join(names)}; run as root, in a container add {' '.join(flags) or '--userns host'}"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _opens_fuse() -> bool:
    """Return whether /dev/fuse is the device and opens: a container's device rules may forbid what its mode allows."""
    try:
        fd = os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        return stat.S_ISCHR(found.st_mode) and found.st_rdev == _FUSE_NUMBER
    finally:
        os.close(fd)


def _apparmor() -> str:
    label = _text("/proc/self/attr/apparmor/current").strip("\0\n ")
    return "" if label == "unconfined" or not label.endswith("(enforce)") else label.partition(" ")[0]


def _may_return() -> bool:
    """Return whether setns(2) into the own network is allowed; it is not in a user namespace without its own network."""
    try:
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _libc.setns(fd, _CLONE_NEWNET) == 0 or ctypes.get_errno() != 1 or not _is_admin()
    finally:
        os.close(fd)


def _is_admin() -> bool:
    """Return whether this process has CAP_SYS_ADMIN; without it, a failed setns(2) says nothing about the network."""
    line = next((line for line in _text("/proc/self/status").splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(line.split()[1], 16) >> CAPABILITIES["CAP_SYS_ADMIN"] & 1)


def _page_faults() -> bool:
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is None:
        return True
    fd = _libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        return ctypes.get_errno() != 1  # EPERM; another error is not about privileges
    os.close(fd)
    return True
