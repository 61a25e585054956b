"""Handle two signals in every process of an engine that loads this plugin: TRIM before a dump, WAKE after a restore.

A signal reaches each process, whatever it waits for and whichever engine it belongs to, without a port or an extra
thread in the snapshot. Each answer is a file `<pid>.<name>` in the folder QUICKTHAW_CONTROL_DIR, written under a
temporary name and renamed. Never send these signals to a process without a handler (the resource tracker): a real-time
signal ends it by default. The launcher's side is launchers/control.py.
"""

import contextlib
import os
import random
import signal
import sys
import threading

from . import cpu, environment_renewal, joining, process_start_times

TRIM = signal.SIGRTMIN + 7
WAKE = signal.SIGRTMIN + 8
fresh = False
"""True from a wake until the first `_after_overlap_choice` (SGLang) has used it."""


def answer(name, content):
    """Write a text or bytes for the launcher as `<pid>.<name>`; do nothing without a control folder."""
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    if not folder:
        return
    path = os.path.join(folder, f"{os.getpid()}.{name}")
    with contextlib.suppress(OSError):  # the launcher detects a missing answer and reports the process
        with open(path + ".new", "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(path + ".new", path)


def model_folders():
    """Return the folders (or single files) of the model whose weights the launcher wants dropped during this trim, else None."""
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    if folder is None:
        return None
    try:
        with open(os.path.join(folder, "thin"), encoding="utf-8", errors="surrogateescape") as file:
            return [path for path in file.read().split("\0") if path]
    except OSError:
        return None


def _on_trim(number, frame):
    from . import memory

    process_start_times.patch_psutil()
    memory.trim()
    memory.close_nvml()
    answer("trimmed", "ok")


def _on_wake(number, frame):
    global fresh
    cpu.request_components()
    cpu.accept_smaller_readings()
    process_start_times.refresh()
    renewed = environment_renewal.renew()
    fresh = joining.allowed = True
    reseed()
    answer("woken", f"renewed {renewed}")


def reseed():
    """Reseed every random generator of this process, unless the user fixed the seed.

    Two replicas of one snapshot would otherwise draw the same numbers: they would sample the same tokens and make the
    same request ids.
    """
    if os.environ.get("QUICKTHAW_FIXED_SEED") == "1":
        return
    random.seed(os.urandom(32))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "default_generator"):
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(int.from_bytes(os.urandom(8), "little") >> 1)


def install():
    """Install both signal handlers in this process; later calls do nothing. Only the main thread can install them."""
    process_start_times.patch_psutil()
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(TRIM) in (signal.SIG_DFL, None):
        signal.signal(TRIM, _on_trim)
        signal.signal(WAKE, _on_wake)
