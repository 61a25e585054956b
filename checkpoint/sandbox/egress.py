"""A way out of a sandbox: `pasta` (of passt) carries the connections that an engine makes into this host's network.

pasta needs no privilege in the host's network, opens no port for others, and ends with its owner. The sandbox has one and the
same address before a dump and after a restore; what was connected at the dump is closed before it (network.close_outgoing).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint.errors import CheckpointError, HostLacks
from checkpoint.sandbox.network import ADDRESS, inside

if TYPE_CHECKING:
    from checkpoint.sandbox.resolver import ResolverRelay

log = logging.getLogger("quickthaw")
GATEWAY, NETMASK, INTERFACE = "10.0.2.2", "24", "quickthaw0"
UP_LIMIT_S = 10.0
AGAIN_S, AGAIN_AT_MOST_S = 1.0, 60.0
_PR_SET_PDEATHSIG = 1
_LISTENS = "0A"
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Egress:
    """`program`: pasta. `host_ports`: TCP ports of this host's loopback that are to be reached at the sandbox's."""

    program: str
    host_ports: tuple[int, ...] = ()

    @classmethod
    def find(cls, host_ports: tuple[int, ...] = ()) -> Egress:
        """Return the way out that this host can make. Raises HostLacks (egress-missing)."""
        program = os.environ.get("QUICKTHAW_PASTA") or shutil.which("pasta")
        if not program or not os.access(program, os.X_OK):
            raise HostLacks("egress-missing", "there is no pasta here; install it (the package passt)")
        return cls(program, host_ports)

    def command(self) -> list[str]:
        """Return the command line; its standard input is the sandbox's network."""
        ports = ",".join(map(str, self.host_ports)) or "none"
        return [
            *(self.program, "--foreground", "--quiet", "--runas", "0", "--netns-only", "--netns", "/proc/self/fd/0"),
            *("--config-net", "--ipv4-only", "--ns-ifname", INTERFACE, "--no-map-gw"),
            *("--address", ADDRESS, "--netmask", NETMASK, "--gateway", GATEWAY),
            *("--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", ports, "--udp-ns", "none"),
        ]


class WayOut:
    """A running pasta, which is started again if it ends. `close` ends it."""

    def __init__(self, egress: Egress, network: int) -> None:
        """Begin to start it for the network of this descriptor; `wait` returns when it is up."""
        self._egress, self._network = egress, os.dup(network)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._failed: str | None = None
        self._ever_up = False
        self._resolver = self._relay_names()
        # Its own thread starts it: the kernel ends it together with the thread that started it.
        self._thread = threading.Thread(target=self._keep, name="egress", daemon=True)
        self._thread.start()

    def wait(self, limit_s: float = UP_LIMIT_S) -> None:
        """Return once the sandbox has its route. Raises HostLacks (egress-failed), Failed (sandbox-gone)."""
        limit = time.monotonic() + limit_s
        while self._failed is not None or not self._routed():
            if self._failed is not None or time.monotonic() > limit:
                why = self._failed or f"no route within {limit_s:.0f} s"
                raise HostLacks(
                    "egress-failed", f"pasta cannot serve the sandbox ({why}); it needs root and /dev/net/tun"
                )
            time.sleep(0.002)
        self._ever_up = True

    def close(self) -> None:
        """End it. Idempotent."""
        with self._lock:
            self._closed.set()
            if self._process:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGKILL)
        self._thread.join(5.0)
        resolver, self._resolver = self._resolver, None
        if resolver:
            resolver.close()
        network, self._network = self._network, -1
        if network >= 0:
            os.close(network)

    def _relay_names(self) -> ResolverRelay | None:
        """Make this host's resolvers on loopback answer in the sandbox, if it has any."""
        from checkpoint.sandbox.resolver import ResolverRelay, loopback_resolvers

        servers = loopback_resolvers()
        try:
            return ResolverRelay(self._network, servers) if servers else None
        except (OSError, CheckpointError) as error:
            log.warning("egress-resolver: names are not resolved in the sandbox: %s", error)
            return None

    def _routed(self) -> bool:
        """Return whether the sandbox has its route, and the host's ports."""
        folder = Path("/proc/thread-self/net")
        try:
            with inside(self._network):
                routes, sockets = (folder / "route").read_text(), (folder / "tcp").read_text()
        except OSError:
            return False
        rows = [line.split(maxsplit=4) for line in sockets.splitlines()[1:]]
        listening = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTENS}
        routed = any(line.split()[:2] == [INTERFACE, "00000000"] for line in routes.splitlines())
        return routed and listening.issuperset(self._egress.host_ports)

    def _keep(self) -> None:
        again_s = AGAIN_S
        while True:
            try:
                why = self._run()
            except (OSError, subprocess.SubprocessError) as error:
                why = f"it could not be started: {error}"
            if why is None:
                return
            self._failed = why
            if not self._ever_up:
                return
            log.warning("egress-ended: pasta %s; starting it again", why.removeprefix("it "))
            if self._closed.wait(again_s):
                return
            again_s = min(2 * again_s, AGAIN_AT_MOST_S)

    def _run(self) -> str | None:
        """Run it until it ends; return why it did, or None once closed. Raises OSError, SubprocessError."""
        with open(os.memfd_create("pasta", os.MFD_CLOEXEC), "w+b", buffering=0) as output:
            if not self._begin(output.fileno()):
                return None
            assert self._process is not None
            code = self._process.wait()
            output.seek(0)
            words = output.read(1 << 16).decode(errors="replace").split("\n")
        if self._closed.is_set():
            return None
        last = next((line for line in reversed(words) if line and "syslog" not in line), "")
        return f"it ended with {code}: {last}"

    def _begin(self, output: int) -> bool:
        with self._lock:
            if self._closed.is_set():
                return False
            self._failed = None
            self._process = subprocess.Popen(
                self._egress.command(),
                stdin=self._network,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", os.defpath)},  # no keys and tokens of the engine
                preexec_fn=functools.partial(_end_with_owner, os.getpid()),
            )
            return True


def _end_with_owner(owner: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != owner:  # it ended before that
        os._exit(1)
