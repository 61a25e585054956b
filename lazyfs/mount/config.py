"""What a mount is told, checked where it is made, and carried to the daemon and its fetcher as one JSON document.

It goes through a descriptor, never through the command line, which everybody on the host may read: a store's URL may hold a
password.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from lazyfs.cache.slots import LEAST_MB
from lazyfs.errors import Usage

TRANSPORTS = ("auto", "raw", "pyfuse3")
NATIVE = ("auto", "passthrough", "off")


@dataclass(frozen=True)
class MountConfig:
    """`cache_limit` in bytes: the disk that the cache occupies and the memory tiers of the mounts that stream, together (0:
    only the disk bounds it). Of a bounded cache a mount's tier is an eighth, at most `memory_mb` and at least 64 MB. Times
    in seconds.

    transport: `raw` speaks the kernel's protocol itself and can pass complete files through; `pyfuse3` needs no
    privilege.
    native: whether complete files are passed through.
    allow_other: whether users other than the mounting one may use the mount: modes decide then. The raw transport needs nothing
    more for it, pyfuse3 without root needs `user_allow_other` in /etc/fuse.conf.
    read_limit_s: a reader gets an error rather than wait longer.
    idle_exit_s: unmount after so long without an open file (0: never). orphan_exit_s: once unmounted, end after so long
    without an open file even though another mount namespace still shows the mount. background_mb_s: the bound on
    completing files that nobody asked for (0: no completion). record: "auto" records a trace when none is known;
    "always", "never".
    """

    manifest: str
    mountpoint: str
    store_url: str
    cache_dir: str
    log_file: str
    socket: str
    state_file: str
    home: str
    transport: str = "auto"
    native: str = "auto"
    allow_other: bool = False
    cache_limit: int = 0
    read_limit_s: float = 60.0
    fetch_limit_s: float = 30.0
    idle_exit_s: float = 0.0
    orphan_exit_s: float = 60.0
    background_mb_s: float = 400.0
    fetch_threads: int = 0
    record: str = "auto"
    use_origin: bool = True
    prefetch: bool = True
    memory_mb: int = 128

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise Usage(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        if self.native not in NATIVE:
            raise Usage(f"native must be one of {', '.join(NATIVE)}, not {self.native!r}")
        if self.record not in ("auto", "always", "never"):
            raise Usage(f"record must be auto, always or never, not {self.record!r}")
        if min(self.read_limit_s, self.fetch_limit_s) <= 0:
            raise Usage("read_limit_s and fetch_limit_s must be above 0")
        if (
            min(
                self.idle_exit_s,
                self.orphan_exit_s,
                self.background_mb_s,
                self.cache_limit,
                self.fetch_threads,
                self.memory_mb,
            )
            < 0
        ):
            raise Usage("limits and rates must not be negative")
        if self.memory_mb < LEAST_MB:
            raise Usage(f"memory_mb must be at least {LEAST_MB}: reads that span chunks need several slots at once")
        if not Path(self.mountpoint).is_absolute():
            raise Usage(f"the mount point must be an absolute path, not {self.mountpoint!r}")

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def to_fd(self) -> int:
        """A descriptor for a child process to read it from (`load_fd`); to be closed."""
        fd = os.memfd_create("quickthaw-mount", os.MFD_CLOEXEC)
        with open(os.dup(fd), "wb") as file:
            file.write(self.dump().encode())
        return fd

    @classmethod
    def load(cls, text: str) -> Self:
        """From JSON; unknown keys are refused."""
        values: dict[str, Any] = json.loads(text)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise Usage(f"unknown mount settings: {', '.join(sorted(unknown))}")
        return cls(**values)

    @classmethod
    def load_fd(cls, fd: int) -> Self:
        """From the descriptor that a parent process passed (`to_fd`), which is closed."""
        try:
            return cls.load(os.pread(fd, os.fstat(fd).st_size, 0).decode())
        finally:
            os.close(fd)
