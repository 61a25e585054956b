"""Work that a restoring command does before its imports: see `begin`. Standard library only.

As process 1 of a container the command would inherit every orphan and get no default signal actions. `fork_from_pid1`
therefore keeps process 1 for reaping children and forwarding signals, and resumes the command in a child. This costs
one fork, only in that case.
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

_PASSED_ON = {
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}

_PRINTS_ONLY = frozenset({"-h", "--help", "--version"})


def begin(arguments: Sequence[str]) -> None:
    """Start the helper processes and, if the last run of this command line ended in a restore, that restore speculatively.

    `arguments` is the command line, such as `restore NAME …`. One that asks for help starts nothing.
    """
    if not _PRINTS_ONLY.isdisjoint(arguments):
        return
    fork_from_pid1()
    prestart.start()
    speculative.begin_saved(state_home(), arguments)


def fork_from_pid1() -> None:
    """In process 1, fork and return in the child; process 1 exits with the child's exit code. Elsewhere return at once."""
    if os.getpid() != 1:
        return
    watched = _PASSED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    child = os.fork()
    if child == 0:
        # Make the child a foreground process group of its own, so that an interrupt typed at the terminal arrives once.
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
    """Reap children and forward signals until `child` ends; return its exit code as a shell reports it."""
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
