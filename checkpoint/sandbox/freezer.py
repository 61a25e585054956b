"""Freeze every process of a sandbox but its init, and continue them: in a cgroup (version 2), or by SIGSTOP and SIGCONT.

A cgroup freezes all of them at once, unnoticed by any of them. Where none can be made (a read-only cgroup file system,
version 1 alone), parents are stopped before their children and continue after them: whoever watches another sleeps at
least as long as the watched. A process that was stopped before stays stopped. SIGKILL ends a frozen process either way,
so the end of the sandbox's init, which is never frozen, ends all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import time
from pathlib import Path

from checkpoint.errors import Failed
from checkpoint.sandbox.process_tree import processes, state

FREEZE_LIMIT_S = 10.0
"""Seconds within which every process must stand still; one in uninterruptible sleep delays it."""
_POLL_S = 0.001
_NAME = "quickthaw-"
_numbers = itertools.count()


class Freezer:
    """The frozen state of one sandbox. Not thread-safe; `close` it after the sandbox."""

    def __init__(self, init_pid: int, cgroups: Path | None = None) -> None:
        """`cgroups`: the folder in which to make a cgroup; None finds this process's own. It need not be usable."""
        self._init_pid = init_pid
        self._parent = own_cgroup() if cgroups is None else cgroups
        self._folder: Path | None = None
        self._frozen: dict[int, int] = {}
        """Process number to pidfd of every process that was frozen, parents first."""
        self._stopped: list[int] = []
        """Those of `_frozen` that this object stopped by a signal."""
        self._dead: set[int] = set()
        """Those of `_frozen` that had ended already, and whose parents had not noticed yet."""

    @property
    def by_cgroup(self) -> bool:
        """Return True if the processes are frozen, or were last, by a cgroup."""
        return self._folder is not None

    def freeze(self, limit_s: float = FREEZE_LIMIT_S) -> None:
        """Freeze every process, also those that start meanwhile.

        Raises Failed (freeze-timeout) if one did not stand still within `limit_s` seconds; all of them run then.
        """
        limit = time.monotonic() + limit_s
        try:
            self._dead.clear()
            if not self._freeze_in_cgroup(limit):
                self._stop_all(limit)
            self._dead = set(self.lost())
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> None:
        """Continue every process that `freeze` froze."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # a cgroup that somebody removed freezes nobody
                (self._folder / "cgroup.freeze").write_text("0")
        for pid in reversed(self._stopped):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._frozen[pid], signal.SIGCONT)
        self._stopped.clear()

    def lost(self) -> list[int]:
        """List the processes that have ended since they were frozen. A frozen one ends only because it was killed."""
        poll = select.poll()
        for fd in self._frozen.values():
            poll.register(fd, select.POLLIN)
        ended = {fd for fd, _ in poll.poll(0)}
        return [pid for pid, fd in self._frozen.items() if fd in ended and pid not in self._dead]

    def close(self, limit_s: float = 2.0) -> None:
        """Release what was made for the frozen state, after every process of the sandbox has ended. Idempotent."""
        self._forget()
        folder, self._folder = self._folder, None
        limit = time.monotonic() + limit_s
        while folder is not None:
            try:
                folder.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > limit:
                    return  # `sweep` removes it later
                time.sleep(0.01)
            else:
                return

    def _forget(self) -> None:
        for fd in self._frozen.values():
            os.close(fd)
        self._frozen.clear()

    def _open_new(self) -> list[int]:
        """Open every process of the sandbox that is not open yet; list the new ones, parents first."""
        found = {}
        for pid in processes(self._init_pid):
            if pid not in self._frozen:
                with contextlib.suppress(ProcessLookupError):
                    found[pid] = os.pidfd_open(pid)
        # A number may have been reused before it was opened. What is in the sandbox now is the process that was opened.
        inside = set(processes(self._init_pid)) if found else set()
        for pid, fd in found.items():
            if pid in inside:
                self._frozen[pid] = fd
            else:
                os.close(fd)
        return [pid for pid in found if pid in inside]

    # In a cgroup

    def _freeze_in_cgroup(self, limit: float) -> bool:
        """Freeze by a cgroup and return True; return False, with nothing changed, where none can be used."""
        if self._folder is None:
            self._folder = _make(self._parent)
        if self._folder is None:
            return False
        self._forget()
        try:
            # A process in the cgroup starts its children there, so a pass that finds no new one has found all.
            while new := self._open_new():
                for pid in new:
                    with contextlib.suppress(ProcessLookupError):
                        (self._folder / "cgroup.procs").write_text(str(pid))
            (self._folder / "cgroup.freeze").write_text("1")
        except OSError:
            self.thaw()
            self._give_up_cgroup()
            return False
        while "frozen 1" not in (self._folder / "cgroup.events").read_text():
            if time.monotonic() > limit:
                raise Failed("freeze-timeout", "a process of the engine did not stand still in time; it runs on")
            time.sleep(_POLL_S)
        return True

    def _give_up_cgroup(self) -> None:
        """Move the processes back and remove the cgroup, which refused something."""
        folder, self._folder, self._parent = self._folder, None, None
        if folder is None:
            return
        with contextlib.suppress(OSError):
            for pid in (folder / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    (folder.parent / "cgroup.procs").write_text(pid)
            folder.rmdir()
        self._forget()

    # By signals

    def _stop_all(self, limit: float) -> None:
        self._forget()
        while True:
            new = self._open_new()
            for pid in new:
                if state(pid) in "Tt":
                    continue  # stopped by somebody else, who continues it
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._frozen[pid], signal.SIGSTOP)
                    self._stopped.append(pid)
            if not new and all(state(pid) in "TtZX" for pid in self._stopped):
                return
            if time.monotonic() > limit:
                raise Failed("freeze-timeout", "a process of the engine did not stop in time; it runs on")
            if not new:
                time.sleep(_POLL_S)


def own_cgroup() -> Path | None:
    """Return the folder of this process's cgroup of version 2, or None if there is none."""
    from checkpoint.control_groups import groups  # needed only to freeze; a start need not wait for the import

    with contextlib.suppress(OSError, ValueError):
        return next((group.folder for group in groups() if group.own), None)
    return None


def sweep(parent: Path | None = None) -> None:
    """Remove the cgroups that killed processes left below `parent` (None: this process's own)."""
    parent = own_cgroup() if parent is None else parent
    for old in () if parent is None else parent.glob(f"{_NAME}*"):
        owner = old.name.removeprefix(_NAME).partition("-")[0]
        # Without a number it is another's: a rehearsal's (plugin/rehearsal/priority.py) is empty until its process enters it.
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):  # a sandbox that is just ending
                old.rmdir()


def _make(parent: Path | None) -> Path | None:
    """Make a cgroup below `parent`. Return None where that is not allowed."""
    if parent is None:
        return None
    try:
        folder = parent / f"{_NAME}{os.getpid()}-{next(_numbers)}"
        folder.mkdir()
    except OSError:
        return None
    if not (folder / "cgroup.freeze").exists():
        folder.rmdir()
        return None
    return folder
