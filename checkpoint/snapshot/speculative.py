"""What the helpers of a restore are told, and telling it before the command that restores has imported what it needs to judge it.

A restore is the work of others: process 1 of its sandbox, the page server, CRIU. `begin` tells them everything at once, as a `Plan`, which
can be written down. `note` keeps the plan of a restore that went well, under the command line that it was for; `foresee`, at the next
start of the same command line, begins it again while the command still imports.

Nothing of a snapshot runs unjudged: CRIU leaves the tree stopped, and checkpoint.snapshot.restore lets it go on only after the snapshot was
judged, the plan made once more, and `take` found both to be the same. Whatever else was begun is ended, at the cost of some of the
processor's time. Where a signature has to be judged, CRIU must not even read the images before: then nothing is noted. Standard library
only, and little of it: it is what a start waits for.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint.files import aside
from checkpoint.locks import locked
from checkpoint.sandbox import prestart
from checkpoint.sandbox.prestart import Started

Plan = dict[str, Any]
"""Of JSON's types. `run` and `snapshot`: folders; `init`: the sandbox's configuration; `unpack`: [from, to inside it]; `pages`: the page
server's configuration, or None; `criu`: argv (WORK stands for the work folder), env, adopts (the root's number), keep (the engine's
streams, which CRIU gets as descriptors from FIRST_KEPT on)."""

WORK = "{work}"
FIRST_KEPT = 20
UNPACK, EXEC = -1, -2
"""The numbers of these requests to process 1; those that a Sandbox makes itself are above 0."""
LAZY_PAGES_SOCKET = "lazy-pages.socket"
"""The name that CRIU looks for in its work folder."""
_VERSION = 1
_NOTES_KEPT = 64


class Begun:
    """A restore under way, of which nobody has heard yet. `close` ends it; who goes on with it takes its parts instead."""

    def __init__(self, plan: Plan, work: Path, held: int, outputs: Mapping[str, int]) -> None:
        self.plan = plan
        self.work = work
        self.outputs = dict(outputs)
        self.held = held
        """Keeps the work folder locked: one that nobody holds is a killed restore's (Library.sweep)."""
        self.in_use = -1
        """Where nobody else does, keeps the snapshot from being removed (Library.remove) until CRIU has opened its files."""
        self.init: Started | None = None
        self.pages: Started | None = None

    def release(self) -> None:
        """CRIU has opened what it needs: the snapshot may be removed."""
        if self.in_use >= 0:
            os.close(self.in_use)
            self.in_use = -1

    def close(self) -> None:
        """End every helper and what it made, and remove the work folder."""
        if self.init:
            process, control = self.init
            control.close()
            prestart.end(process)
        if self.pages:
            process, control = self.pages
            control.close()
            # It may serve other trees by now (checkpoint.lazy_pages.main), so nobody may end it, or wait for its end.
            threading.Thread(target=process.wait, name="page-server-reaper", daemon=True).start()
        import shutil  # 4 ms that only a failure needs

        shutil.rmtree(self.work, ignore_errors=True)
        self.release()
        os.close(self.held)


def begin(plan: Plan, outputs: Mapping[str, int]) -> Begun:
    """Tell the helpers; returns in about 2 ms. `outputs` maps streams (`stdout`, `stderr`) to descriptors for the engine's output.

    The caller keeps the snapshot from being removed meanwhile (Library.in_use). Raises OSError; then nothing is left.
    """
    begun = Begun(plan, *_work_folder(Path(plan["run"])), outputs)
    try:
        begun.init = prestart.take_init()
        _, control = begun.init
        control.send(json.dumps(plan["init"]).encode())
        control.send(json.dumps({"op": "unpack", "id": UNPACK, "copies": plan["unpack"]}).encode())
        if plan["pages"]:
            begun.pages = begin_pages(plan["pages"], begun.work)
        criu = plan["criu"]
        message = {
            "op": "exec",
            "id": EXEC,
            "argv": [word.replace(WORK, str(begun.work)) for word in criu["argv"]],
            "env": criu["env"],
            "cwd": "/",
            "adopts": criu["adopts"],
            "lent": [str(FIRST_KEPT + index) for index in range(len(criu["keep"]))],
        }
        socket.send_fds(control, [json.dumps(message).encode()], [outputs[stream] for stream in criu["keep"]])
    except BaseException:
        begun.close()
        raise
    return begun


def _work_folder(run: Path) -> tuple[Path, int]:
    """A new folder for one restore, and the descriptor that keeps it locked. Raises OSError."""
    while True:
        work = run / f"restore-{os.urandom(6).hex()}"
        work.mkdir(mode=0o700)
        # A sweep may take it for a killed restore's before it is locked.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if (held := locked(work, fcntl.LOCK_EX)) >= 0:
                return work, held


def begin_pages(config: Mapping[str, Any], work: Path) -> Started:
    """A page server that listens in `work` for the CRIU that follows. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    started: Started | None = None
    with listener:
        try:
            _bind(listener, work)
            listener.listen(1)
            started = prestart.take_page_server()
            socket.send_fds(started[1], [json.dumps(config).encode()], [listener.fileno()])
        except OSError:
            if started:
                started[1].close()
                started[0].kill()
                prestart.end(started[0])
            raise
    return started


def _bind(listener: socket.socket, work: Path) -> None:
    """bind() with a path of any length: a socket's name has 108 bytes, so name the folder by its descriptor."""
    (work / LAZY_PAGES_SOCKET).unlink(missing_ok=True)
    folder = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{LAZY_PAGES_SOCKET}")
    finally:
        os.close(folder)


# What is foreseen: one restore, of the command line that this process was started with.

_lock = threading.Lock()
_note: Path | None = None
_begun: Begun | None = None
_pipes: dict[str, tuple[int, int]] = {}


def foresee(home: Path, arguments: Sequence[str]) -> None:
    """Begin what this command line ended in last time, where that is known; never raises, and what goes wrong is done again in its turn."""
    global _note, _begun
    # What a collision of this short a name, or a changed environment, begins in vain is not taken.
    ours = sorted((key, value) for key, value in os.environ.items() if key.startswith("QUICKTHAW_"))
    try:
        number = zlib.crc32(json.dumps([list(arguments), ours, os.getcwd()]).encode())
        _note = home / "run" / f"next-{number:08x}.json"
        known = json.loads(_note.read_bytes())
        if known["version"] != _VERSION or known["boot"] != _boot():
            return
        plan = known["plan"]
        for stream in plan["criu"]["keep"]:
            _pipes[stream] = os.pipe()
        in_use = locked(Path(plan["snapshot"]), fcntl.LOCK_SH)  # as Library.in_use does
        if in_use < 0:
            return
        try:
            _begun = begin(plan, {stream: ends[1] for stream, ends in _pipes.items()})
        except BaseException:
            os.close(in_use)
            raise
        _begun.in_use = in_use
        atexit.register(discard)  # a command that fails before it restores anything
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return


def pipe(stream: str) -> tuple[int, int]:
    """A pipe (read end, write end) for a stream of the engine's: the one that a foreseen restore has already, or a new one."""
    return _pipes.pop(stream, None) or os.pipe()


def _taken() -> Begun | None:
    """To one thread only."""
    global _begun
    with _lock:
        begun, _begun = _begun, None
    return begun


def take(plan: Plan, outputs: Mapping[str, int]) -> Begun | None:
    """What was foreseen, where it is what `plan` says; else None, and nothing of it is left."""
    begun = _taken()
    if begun is None:
        return None
    if begun.plan == plan and begun.outputs == {stream: outputs.get(stream) for stream in plan["criu"]["keep"]}:
        return begun
    begun.close()
    return None


def discard() -> None:
    """End what was foreseen and did not come."""
    begun = _taken()
    if begun is not None:
        begun.close()
    while _pipes:
        for fd in _pipes.popitem()[1]:
            os.close(fd)


def note(plan: Plan) -> None:
    """Keep the plan for the next start of this command line, where the disk lets us: it is only about time."""
    if _note is None:
        return
    from checkpoint import disk

    data = json.dumps({"version": _VERSION, "boot": _boot(), "plan": plan}).encode()
    with disk.optional("the next restore begins a little later", "restore-plan-not-kept"):
        if _note.exists() and _note.read_bytes() == data:
            os.utime(_note)  # the oldest go first
            return
        with aside(_note) as new:
            new.touch(mode=0o600)
            new.write_bytes(data)
        with contextlib.suppress(FileNotFoundError):  # another start removes the same
            notes = sorted(_note.parent.glob("next-*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for old in notes[_NOTES_KEPT:]:
                old.unlink(missing_ok=True)


def forget(run: Path, snapshot: Path) -> None:
    """Remove the plans of a snapshot that is gone, whatever command line they are for."""
    for path in run.glob("next-*.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads(path.read_bytes())["plan"]["snapshot"] == str(snapshot):
                path.unlink()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
