"""Settings of a mount, validated on creation, and passed to the daemon and its fetcher as one JSON document.

The document is passed through a descriptor, never on the command line, which every user of the host may read: a store's URL
may hold a password.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from lazyfs.cache.bound import AUTO
from lazyfs.cache.slots import LEAST_MB
from lazyfs.errors import Usage
from lazyfs.peers.order import parse_address, parse_peers

TRANSPORTS = ("auto", "raw", "pyfuse3")
NATIVE = ("auto", "passthrough", "off")


def peers_of_environment() -> dict[str, str]:
    """Return the settings of peers that this process's variables name: a launch's mounts ask the same peers as the commands."""
    given = {name: os.environ.get(f"QUICKTHAW_{name.upper()}", "") for name in ("peers", "peer_token", "peer_self")}
    return given if given["peers"] else {}


@dataclass(frozen=True)
class MountConfig:
    """Settings of one mount. Times are in seconds.

    cache_limit: bytes of disk that the cache may occupy plus the memory tiers of streaming mounts, in total. AUTO: this
    host's bound, else what leaves part of the file system free (`lazyfs.cache.bound`). 0: only the disk limits. In a cache
    bounded by bytes a mount's memory tier is an eighth of it, at most `memory_mb` and at least 64 MB.
    transport: `raw` (and `auto`) speaks the kernel's protocol directly, and supports passthrough of complete files where the process may
    mount; `pyfuse3` goes through libfuse.
    native: whether complete files are passed through.
    allow_other: users other than the mounting one may use the mount; file modes decide. Without root it
    needs `user_allow_other` in /etc/fuse.conf.
    read_limit_s: a read fails with an error after this time.
    idle_exit_s: unmount after this time without an open file (0: never).
    orphan_exit_s: after unmounting, exit after this time without an open file, even if another mount namespace still shows
    the mount; after idle_exit_s where that is shorter.
    background_mb_s: rate limit for completing files in the background (0: no completion).
    peers: hosts that are asked for a chunk before the store (`lazyfs.peers.order`), with the bearer token `peer_token`; `peer_self`: which
    of them is this host's own, if its address does not say so.
    trust_keys: files of public keys, one of which must have signed the manifest; without any, none is asked for.
    record: "auto" records an access log if none is known; "always"; "never".
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
    cache_limit: int = AUTO
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
    peers: str = ""
    peer_token: str = ""
    peer_self: str = ""
    trust_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.transport not in TRANSPORTS:
            raise Usage(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        if self.native not in NATIVE:
            raise Usage(f"native must be one of {', '.join(NATIVE)}, not {self.native!r}")
        if self.record not in ("auto", "always", "never"):
            raise Usage(f"record must be auto, always or never, not {self.record!r}")
        if min(self.read_limit_s, self.fetch_limit_s) <= 0:
            raise Usage("read_limit_s and fetch_limit_s must be above 0")
        limits = (self.idle_exit_s, self.orphan_exit_s, self.background_mb_s, self.fetch_threads)
        if min(limits) < 0 or self.cache_limit < AUTO:
            raise Usage("limits and rates must not be negative")
        parse_peers(self.peers)
        parse_address(self.peer_self)
        if self.memory_mb < LEAST_MB:
            raise Usage(f"memory_mb must be at least {LEAST_MB}: reads that span chunks need several slots at once")
        if not Path(self.mountpoint).is_absolute():
            raise Usage(f"the mount point must be an absolute path, not {self.mountpoint!r}")

    @classmethod
    def without_mount(cls, manifest: str, store_url: str, home: Path, **more: Any) -> Self:
        """Return the settings of what only fetches into the cache."""
        nowhere = str(home / "run" / "no-mount")
        return cls(manifest, nowhere, store_url, str(home / "cache"), nowhere, nowhere, nowhere, str(home), **more)

    @property
    def access_log(self) -> Path:
        """Return the path of the manifest's access log."""
        return Path(self.home) / "traces" / f"{self.manifest}.json"

    def to_fd(self) -> int:
        """Return a descriptor from which a child process reads the settings (`load_fd`).

        The caller closes it.
        """
        fd = os.memfd_create("quickthaw-mount", os.MFD_CLOEXEC)
        with open(os.dup(fd), "wb") as file:
            file.write(json.dumps(asdict(self)).encode())
        return fd

    @classmethod
    def load(cls, text: str) -> Self:
        """Parse the settings from JSON. Raises Usage for unknown keys."""
        values: dict[str, Any] = json.loads(text)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise Usage(f"unknown mount settings: {', '.join(sorted(unknown))}")
        return cls(**values)

    @classmethod
    def load_fd(cls, fd: int) -> Self:
        """Read the settings from a descriptor passed by the parent process (`to_fd`), and close it."""
        try:
            return cls.load(os.pread(fd, os.fstat(fd).st_size, 0).decode())
        finally:
            os.close(fd)
