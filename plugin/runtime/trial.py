"""Trying out what no list of features can promise: a small process is dumped and restored for real, in 0.2 s.

`quickthaw doctor` and the first cold start of a host do the same (`run`); a cold start does it in a thread while the engine loads, and
takes no snapshot where it failed. Everything lies in the memory of the trial's own sandbox: a full disk does not spoil it, and a killed
launch leaves nothing. A success is noted for each boot, CRIU and set of privileges; a failure is tried again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

from checkpoint.criu.binary import Criu
from checkpoint.errors import CheckpointError, Failed
from checkpoint.sandbox.privileges import Privileges
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox, SandboxConfig

LIMIT_S = 30.0
_HOUR_NS = 3600 * 10**9


def sandbox_reason(error: Exception) -> str:
    """Return why no sandbox could be made, with what usually forbids it."""
    profile = Privileges.here().apparmor
    hint = f"; the AppArmor profile {profile} may forbid it: in a container add --security-opt apparmor=unconfined"
    return f"{error}{hint if profile else ''}"


def run(criu: Criu) -> None:
    """Dump and restore a process. Raises a CheckpointError that says what failed."""
    # Another clock than the host's, as every restore has.
    clock = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + _HOUR_NS
    with Sandbox(SandboxConfig(monotonic_ns=clock)) as sandbox:
        inside = Path(TMP_DIR, "trial")
        outside = Path(f"/proc/{sandbox.init_pid}/root{inside}")
        try:
            outside.mkdir(mode=0o700)
        except OSError as error:
            raise Failed(
                "sandbox-unreachable", f"{outside}: {error.strerror}; is /proc mounted with hidepid?"
            ) from error
        pid = sandbox.start(["/bin/sleep", "60"], {}, "/")
        criu.dump(sandbox, pid, inside, Path("/bin/true"), LIMIT_S, seen_at=outside)
        sandbox.signal(pid, signal.SIGKILL)
        sandbox.wait(pid, LIMIT_S)
        criu.restore(sandbox, pid, inside, LIMIT_S, inside, {}, seen_at=outside)
        sandbox.signal(pid, 0)  # it lives


class Trial:
    """A trial in a thread of its own, begun by its making. `wait` returns why it failed, or None."""

    def __init__(self, criu: Criu, home: Path) -> None:
        self._criu = criu
        self._note = home / "run" / f"restores-{criu.kernel_facts(home).name}"
        self._why: str | None = None
        self._thread: threading.Thread | None = None
        if not self._note.exists():
            self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            run(self._criu)
        except CheckpointError as error:
            self._why = f"{sandbox_reason(error)}; quickthaw doctor tries it again"
            return
        with contextlib.suppress(OSError):  # a full disk costs the next cold start another trial
            self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._note.touch(mode=0o600)

    def wait(self) -> str | None:
        """Wait for the end, which is long past when an engine has loaded; why dump and restore do not work here, or None."""
        if self._thread is not None:
            self._thread.join(3 * LIMIT_S)
            if self._thread.is_alive():
                return f"sandbox-stalled: dump and restore of a small process took longer than {3 * LIMIT_S:.0f} s"
        return self._why
