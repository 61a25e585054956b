"""Which layers this host can do, found out in a few file operations, and said once.

A layer that is off never stops a launch (unless `--strict`): the engine then starts as it would alone, with what is left.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from checkpoint.criu import Criu
from checkpoint.errors import HostLacks

CAP_SYS_ADMIN = 21


@dataclass(frozen=True)
class Layers:
    """For each layer None where it works, else why it is off and what to do, in one line."""

    mount: str | None = None
    sandbox: str | None = None
    snapshots: str | None = None

    def off(self) -> dict[str, str]:
        """The layers that are off, with the reason."""
        named = {"lazy weights": self.mount, "sandbox": self.sandbox, "snapshots": self.snapshots}
        return {name: why for name, why in named.items() if why}


def _has_cap_sys_admin() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_ADMIN & 1)
    return False


def detect(home: Path) -> tuple[Layers, Criu | None]:
    """What this host offers, and its CRIU. Takes under a millisecond; what only shows in use is reported then."""
    admin = _has_cap_sys_admin()
    mount = sandbox = snapshots = None
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        mount = "/dev/fuse cannot be opened; run as root, in a container add --device /dev/fuse"
    elif not admin:
        mount = "mounting needs CAP_SYS_ADMIN; run as root, in a container add --cap-add SYS_ADMIN"
    if not admin:
        sandbox = "namespaces need CAP_SYS_ADMIN; run as root, in a container add --cap-add SYS_ADMIN"
    elif not Path("/proc/self/ns/pid_for_children").exists():
        sandbox = "this kernel has no PID namespaces"
    criu = None
    if sandbox:
        snapshots = sandbox
        mount = mount or sandbox
    else:
        try:
            criu = Criu.find(home)
        except HostLacks as error:
            snapshots = str(error)
    return Layers(mount, sandbox, snapshots), criu
