"""Two signals that every process of an engine with our plugin answers: get small before a dump, be unique after a restore.

A signal reaches each process whatever it is waiting for and whichever engine it belongs to, with no port and no thread of ours in the
snapshot. Each answer is a file `<pid>.<name>` in the folder that QUICKTHAW_CONTROL_DIR names, written to a temporary name and renamed.
Processes without a handler (the resource tracker) must not be sent these: the default action of a real-time signal is to end the process.
The launcher's side is launchers/control.py.
"""

import contextlib
import os
import random
import signal
import sys
import threading

from . import cpu, renewal, start_times

SHRINK = signal.SIGRTMIN + 7
WAKE = signal.SIGRTMIN + 8
fresh = False
"""Whether this process was woken and nobody has asked for that since."""


def answer(name, text):
    """Leave `text` for the launcher as `<pid>.<name>`; nothing where no launcher listens."""
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    if not folder:
        return
    path = os.path.join(folder, f"{os.getpid()}.{name}")
    with contextlib.suppress(OSError):  # the launcher notices a missing answer, and says which process
        with open(path + ".new", "w") as file:
            file.write(text)
        os.replace(path + ".new", path)


def thin():
    """Whether the launcher wants the weights dropped too, at this shrinking."""
    folder = os.environ.get("QUICKTHAW_CONTROL_DIR")
    return folder is not None and os.path.exists(os.path.join(folder, "thin"))


def _on_shrink(number, frame):
    from . import memory

    start_times.keep()
    memory.trim()
    memory.close_nvml()
    answer("shrunk", "ok")


def _on_wake(number, frame):
    global fresh
    cpu.regain()
    start_times.refresh()
    renewed = renewal.renew()
    fresh = True
    reseed()
    answer("woken", f"renewed {renewed}")


def reseed():
    """New state for every random generator of this process, unless the user fixed the seed.

    Two replicas of one snapshot would otherwise draw the same numbers, and so sample the same tokens and make the same request ids.
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
    """Answer both signals in this process. Once; later calls do nothing. Only a main thread can."""
    start_times.keep()
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(SHRINK) in (signal.SIG_DFL, None):
        signal.signal(SHRINK, _on_shrink)
        signal.signal(WAKE, _on_wake)
