"""Try CRIU on this host: dump and restore a small process for real, in 0.2 s.

`quickthaw doctor` and a host's first cold start both call `run`. A cold start runs it in a thread while the engine
loads, and takes no snapshot if it failed. All files are in the memory of the trial's own sandbox, so a full disk does
not affect it and a killed launch leaves nothing. A success is recorded per boot, CRIU and set of privileges; a failure
is tried again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

from checkpoint import disk
from checkpoint.criu.binary import Criu
from checkpoint.errors import CheckpointError, Failed
from checkpoint.files import private_folder
from checkpoint.sandbox.sandbox import TMP_DIR, Sandbox, SandboxConfig
from plugin.runtime.capabilities import sandbox_reason

LIMIT_S = 30.0
_HOUR_NS = 3600 * 10**9


@disk.required("a small process was not dumped and restored", "host-io")
def run(criu: Criu) -> None:
    """Dump and restore a process. Raises CheckpointError naming the step that failed."""
    # Use a clock that differs from the host's, as in every restore.
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
        criu.dump(sandbox, pid, inside, Path("/bin/true"), LIMIT_S, host_path=outside)
        sandbox.signal(pid, signal.SIGKILL)
        sandbox.wait(pid, LIMIT_S)
        criu.restore(sandbox, pid, inside, LIMIT_S, inside, {}, host_path=outside)
        sandbox.signal(pid, 0)  # check that it is alive


def _note(criu: Criu, home: Path) -> Path:
    return home / "run" / f"restores-{criu.kernel_facts(home).name}"


def try_out(criu: Criu, home: Path) -> str | None:
    """Run the trial now and return why it failed, or None. A success is remembered; a failure forgets an earlier one."""
    note = _note(criu, home)
    try:
        run(criu)
    except CheckpointError as error:
        with contextlib.suppress(OSError):
            note.unlink(missing_ok=True)
        return sandbox_reason(error)
    with contextlib.suppress(OSError):  # on a full disk the next cold start repeats the trial
        private_folder(note.parent)
        note.touch(mode=0o600)
    return None


class Trial:
    """Run a trial in a thread, started by the constructor. `wait` returns why it failed, or None."""

    def __init__(self, criu: Criu, home: Path) -> None:
        self._why: str | None = None
        self._thread: threading.Thread | None = None
        if not _note(criu, home).exists():
            self._thread = threading.Thread(target=self._run, args=(criu, home), name="trial", daemon=True)
            self._thread.start()

    def _run(self, criu: Criu, home: Path) -> None:
        if why := try_out(criu, home):
            self._why = f"{why}; quickthaw doctor tries it again"

    def wait(self) -> str | None:
        """Wait for the trial and return why dump and restore do not work here, or None. It ends long before an engine has loaded."""
        if self._thread is not None:
            self._thread.join(3 * LIMIT_S)
            if self._thread.is_alive():
                return f"sandbox-stalled: dump and restore of a small process took longer than {3 * LIMIT_S:.0f} s"
        return self._why
