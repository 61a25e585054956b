"""What a command that restores does before it imports what it needs: `begin`. Standard library only.

As process 1 of a container it gets every orphan from the kernel, and no signal's default action: `stand_in` leaves that process to do what
only it can, reap whatever ends and pass signals on, and goes on in a child. Costs one fork, and nothing anywhere else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from checkpoint.sandbox import prestart
from checkpoint.snapshot import speculative
from plugin.runtime.home import state_home
from plugin.startup import prefetch as ahead

_PASSED_ON = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}


def begin(arguments: Sequence[str]) -> None:
    """For a command line (`restore NAME …`): helpers start, and with them, where it is known, the restore that it ended in last time."""
    stand_in()
    prestart.start()
    speculative.foresee(state_home(), arguments)
    if arguments[0] == "restore":
        ahead.start(arguments[1:])


def stand_in() -> None:
    """Return in a child where this is process 1 (which then ends with the child's exit code), at once elsewhere."""
    if os.getpid() != 1:
        return
    watched = _PASSED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        # A group of its own, in the foreground where there is a terminal: an interrupt typed there must arrive once.
        os.setpgid(0, 0)
        if sys.stdin is not None and sys.stdin.isatty():
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            with contextlib.suppress(OSError):
                os.tcsetpgrp(0, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os._exit(_watch(child, watched))


def _watch(child: int, watched: set[signal.Signals]) -> int:
    """Reap and pass on until the child ends; its exit code as a shell reports it."""
    while True:
        number = signal.sigwait(watched)
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, number)
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return 1
            if not pid:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return 128 - code if code < 0 else code
