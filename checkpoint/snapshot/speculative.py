"""Begin a restore speculatively, before the command that restores has imported what it needs to validate it.

The helpers do most of a restore: the sandbox's init, the page server, CRIU. `begin` sends all their configurations
at once, as a serializable `Plan`. `save_plan` saves the plan of a successful restore under its command line. `begin_saved`,
at the next start of the same command line, begins that plan again while the command still imports.

No process of a snapshot runs before validation: CRIU leaves the process tree stopped, and
checkpoint.snapshot.restore resumes it only after it has validated the snapshot, made the plan again, and `take`
found both plans equal. A speculative restore that does not match is ended; it only costs some CPU time. With
required signatures, CRIU must not even read the images before the check, so no plan is saved. This module imports
little, and only from the standard library, because it delays every start.
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

from checkpoint.files import boot_id, lock_folder, write_private
from checkpoint.sandbox import prestart
from checkpoint.sandbox.prestart import Started

Plan = dict[str, Any]
"""A JSON object.

`run`, `snapshot`: folders. `init`: the sandbox's configuration. `unpack`: pairs of [source, target inside the
sandbox]. `pages`: the page server's configuration, or None. `criu`: argv (WORK stands for the work folder), env,
adopt (the root's process number), keep (the engine's streams, passed to CRIU as descriptors from FIRST_KEPT on).
"""

WORK = "{work}"
FIRST_KEPT = 20
UNPACK, EXEC = -1, -2
"""Ids of these requests to init; a Sandbox's own ids are above 0."""
LAZY_PAGES_SOCKET = "lazy-pages.socket"
"""Socket name that CRIU expects in its work folder."""
_VERSION = 2
_MAX_PLANS = 64


class BegunRestore:
    """A begun restore that no caller has taken yet.

    `close` ends it; a caller that continues it takes over its parts.
    """

    def __init__(self, plan: Plan, work: Path, lock_fd: int, outputs: Mapping[str, int]) -> None:
        self.plan = plan
        self.work = work
        self.outputs = dict(outputs)
        self.lock_fd = lock_fd
        """Descriptor that keeps the work folder locked; `Library.sweep` removes unlocked ones as leftovers of killed restores."""
        self.snapshot_lock_fd = -1
        """Descriptor that locks the snapshot against removal (Library.remove) until CRIU has opened its files; -1 if
        the caller holds that lock."""
        self.init: Started | None = None
        self.pages: Started | None = None

    def release(self) -> None:
        """Unlock the snapshot for removal, once CRIU has opened its files."""
        if self.snapshot_lock_fd >= 0:
            os.close(self.snapshot_lock_fd)
            self.snapshot_lock_fd = -1

    def close(self) -> None:
        """End every helper and remove the work folder."""
        if self.init:
            process, control = self.init
            control.close()
            prestart.end(process)
        if self.pages:
            process, control = self.pages
            control.close()
            # Do not wait for it: the next attempt must not be delayed.
            threading.Thread(target=process.wait, name="page-server-reaper", daemon=True).start()
        import shutil  # imported only on failure: takes 4 ms

        shutil.rmtree(self.work, ignore_errors=True)
        self.release()
        os.close(self.lock_fd)


def begin(plan: Plan, outputs: Mapping[str, int]) -> BegunRestore:
    """Send the helpers their configurations; takes about 2 ms.

    `outputs` maps `stdout`, `stderr` to the engine's output descriptors. The caller must keep the snapshot from being
    removed (Library.in_use). Raises OSError; then nothing is left.
    """
    begun = BegunRestore(plan, *_work_folder(Path(plan["run"])), outputs)
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
            "adopt": criu["adopt"],
            "fds": [str(FIRST_KEPT + index) for index in range(len(criu["keep"]))],
        }
        socket.send_fds(control, [json.dumps(message).encode()], [outputs[stream] for stream in criu["keep"]])
    except BaseException:
        begun.close()
        raise
    return begun


def _work_folder(run: Path) -> tuple[Path, int]:
    """Create and lock a new folder for one restore; return it and the lock's descriptor. Raises OSError."""
    while True:
        work = run / f"restore-{os.urandom(6).hex()}"
        work.mkdir(mode=0o700)
        # `sweep` may remove the folder before it is locked; then try again.
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if (held := lock_folder(work, fcntl.LOCK_EX)) >= 0:
                return work, held


def begin_pages(config: Mapping[str, Any], work: Path) -> Started:
    """Start a page server that listens in `work` for CRIU. Raises OSError."""
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
    """Bind to a path of any length: socket names are limited to 108 bytes, so name the folder by its descriptor."""
    (work / LAZY_PAGES_SOCKET).unlink(missing_ok=True)
    folder = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{LAZY_PAGES_SOCKET}")
    finally:
        os.close(folder)


# State of the one speculative restore, for the command line that started this process.

_lock = threading.Lock()
_plan_file: Path | None = None
_begun: BegunRestore | None = None
_pipes: dict[str, tuple[int, int]] = {}


def begin_saved(home: Path, arguments: Sequence[str]) -> None:
    """Begin the plan saved for this command line, if any.

    Never raises: after an error the normal restore starts from scratch.
    """
    global _plan_file, _begun
    # A hash collision or a changed environment only wastes work; `take` rejects the plan.
    ours = sorted((key, value) for key, value in os.environ.items() if key.startswith("QUICKTHAW_"))
    try:
        number = zlib.crc32(json.dumps([list(arguments), ours, os.getcwd()]).encode())
        _plan_file = home / "run" / f"next-{number:08x}.json"
        known = json.loads(_plan_file.read_bytes())
        if known["version"] != _VERSION or known["boot"] != boot_id():
            return
        plan = known["plan"]
        for stream in plan["criu"]["keep"]:
            _pipes[stream] = os.pipe()
        in_use = lock_folder(Path(plan["snapshot"]), fcntl.LOCK_SH)  # as Library.in_use does
        if in_use < 0:
            return
        try:
            _begun = begin(plan, {stream: ends[1] for stream, ends in _pipes.items()})
        except BaseException:
            os.close(in_use)
            raise
        _begun.snapshot_lock_fd = in_use
        atexit.register(discard)  # for a command that fails before it restores anything
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return


def take_pipe(stream: str) -> tuple[int, int]:
    """Return a pipe (read end, write end) for an engine stream: the speculative restore's, or a new one."""
    return _pipes.pop(stream, None) or os.pipe()


def _take() -> BegunRestore | None:
    """Return the speculative restore to the first caller only, else None."""
    global _begun
    with _lock:
        begun, _begun = _begun, None
    return begun


def take(plan: Plan, outputs: Mapping[str, int]) -> BegunRestore | None:
    """Return the speculative restore if it matches `plan` and `outputs`; otherwise end it and return None."""
    begun = _take()
    if begun is None:
        return None
    if begun.plan == plan and begun.outputs == {stream: outputs.get(stream) for stream in plan["criu"]["keep"]}:
        return begun
    begun.close()
    return None


def discard() -> None:
    """End a speculative restore that was not taken and close its pipes."""
    begun = _take()
    if begun is not None:
        begun.close()
    while _pipes:
        for fd in _pipes.popitem()[1]:
            os.close(fd)


def save_plan(plan: Plan) -> None:
    """Save the plan for the next start of this command line.

    Disk errors only cost time, so they are reported as warnings.
    """
    if _plan_file is None:
        return
    from checkpoint import disk

    data = json.dumps({"version": _VERSION, "boot": boot_id(), "plan": plan}).encode()
    with disk.optional("the next restore begins a little later", "restore-plan-not-kept"):
        if _plan_file.exists() and _plan_file.read_bytes() == data:
            os.utime(_plan_file)  # the oldest are removed first
            return
        write_private(_plan_file, data)
        with contextlib.suppress(FileNotFoundError):  # another start removes the same files
            plans = sorted(
                _plan_file.parent.glob("next-*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True
            )
            for old in plans[_MAX_PLANS:]:
                old.unlink(missing_ok=True)


def remove_plans(run: Path, snapshot: Path) -> None:
    """Remove all plans of a removed snapshot."""
    for path in run.glob("next-*.json"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            if json.loads(path.read_bytes())["plan"]["snapshot"] == str(snapshot):
                path.unlink()
