"""Reject process trees that a restore could not bring back, by examining what the dump recorded beside their memory.

A dump can succeed although it misses objects in the sandbox's namespaces that belong to no process (SysV IPC, POSIX
message queues), or a process outside the dumped tree. It can also contain what CRIU refuses to restore: a host file whose size has changed
by then, or a connection that is still being made. `examine` reads the images and a few files of /proc that were
copied while the tree was frozen, and rejects such a snapshot with a specific error. The engine keeps running, and no
later restore fails.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.criu.images import Message, messages, nested, number, text
from checkpoint.errors import Failed
from checkpoint.sandbox.network import is_inside
from checkpoint.sandbox.sandbox import QUEUES_DIR

FOLDER = "frozen"
"""Subfolder of the snapshot folder that holds `script`'s output while the snapshot is taken."""

_COPY = """\
mkdir "{folder}"
echo "$PPID" > "{folder}/criu"
cat /proc/[0-9]*/stat > "{folder}/stat" 2>/dev/null || :
cat /proc/sysvipc/sem /proc/sysvipc/msg /proc/sysvipc/shm > "{folder}/sysvipc" 2>/dev/null || :
ls -A {queues} > "{folder}/queues" 2>/dev/null || :
"""

_STOPPED = 3  # TASK_STOPPED, criu/include/image.h
_SYN_SENT, _CLOSED, _LISTEN = 2, 7, 10  # include/net/tcp_states.h
_TCP = 6
# Fields of PstreeEntry, CoreEntry and its TaskCoreEntry, FileEntry, RegFileEntry, InetSkEntry, RemapFilePathEntry (images/*.proto).
_PID, _TC, _TASK_STATE = 1, 3, 1
_REG, _ISK = 3, 4
_REG_ID, _REG_FLAGS, _REG_NAME, _REG_SIZE = 1, 2, 6, 8
_ISK_PROTOCOL, _ISK_STATE, _ISK_DST_PORT, _ISK_DST_ADDRESS = 5, 6, 8, 12
_REMAPPED = 1


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat: number, name, parent, start time in clock ticks, all as seen inside the sandbox."""

    pid: int
    name: str
    parent: int
    start_ticks: int


@dataclass(frozen=True)
class Frozen:
    """The facts about the process tree that the manifest keeps (see Snapshot)."""

    start_ticks: dict[str, int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)


def script(folder: Path) -> str:
    """Return the shell lines that CRIU runs inside the sandbox while the process tree is frozen; they write to `folder`."""
    return _COPY.format(folder=folder, queues=QUEUES_DIR)


def examine(folder: Path, images: Path, kept: Iterable[str]) -> Frozen:
    """Read `script`'s output in `folder` and CRIU's in `images`, and reject what a restore could not bring back.

    `kept` names the sandbox folders whose files are part of the snapshot. Raises Failed (process-left-out, sysv-ipc,
    message-queue, open-file-grows, connection-half-open, connection-open), or Integrity when an image is garbled.
    """
    tree = {number(entry, _PID) for entry in messages(images / "pstree.img")}
    processes = {process.pid: process for process in _processes(folder / "stat")}
    _refuse_left_out(processes, tree, int(_read(folder / "criu") or 0))
    _refuse_sysv(_read(folder / "sysvipc"))
    _refuse_queues(_read(folder / "queues").splitlines())
    entries = list(messages(images / "files.img"))
    _refuse_growing(entries, _remapped(images), tuple(f"{path.rstrip('/')}/" for path in kept))
    _refuse_half_open(entries)
    return Frozen(
        {str(pid): processes[pid].start_ticks for pid in sorted(tree & processes.keys())},
        sorted(pid for pid in tree if _state(images / f"core-{pid}.img") == _STOPPED),
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def _processes(file: Path) -> Iterator[Process]:
    # A process name may hold anything but NUL, so the name ends at the last parenthesis.
    for line in _read(file).splitlines():
        head, _, rest = line.rpartition(") ")
        pid, _, name = head.partition(" (")
        fields = rest.split()
        if pid.isdigit() and len(fields) > 19:
            yield Process(int(pid), name, int(fields[1]), int(fields[19]))


def _refuse_left_out(processes: dict[int, Process], tree: set[int], criu: int) -> None:
    def of_criu(process: Process | None) -> bool:
        while process is not None:
            if process.pid == criu:
                return True
            process = processes.get(process.parent)
        return False

    left = [process for pid, process in processes.items() if pid != 1 and pid not in tree and not of_criu(process)]
    if left:
        names = ", ".join(f"{process.pid} ({process.name})" for process in left[:5])
        raise Failed(
            "process-left-out",
            f"process {names} runs in the sandbox but not below the engine, so a restore would lose it; "
            "start it outside of the engine, or launch with --no-snapshot",
        )


def _refuse_sysv(tables: str) -> None:
    found = []
    kind = ""
    for line in tables.splitlines():
        words = line.split()
        if words[:1] == ["key"]:
            kind = {"semid": "semaphore set", "msqid": "message queue", "shmid": "shared memory segment"}[words[1]]
        elif len(words) > 1:
            found.append(f"{kind} {words[1]}")
    if found:
        raise sysv_refused(", ".join(found[:5]))


def sysv_refused(what: str) -> Failed:
    """Build the error for SysV objects."""
    return Failed(
        "sysv-ipc",
        f"the engine holds a SysV {what}, which a restore would lose; "
        "have it use POSIX ones (shm_open, sem_open), or launch with --no-snapshot",
    )


def refuse_open_queues(root: Path) -> None:
    """Raise Failed (message-queue) before the dump if the sandbox with this root folder has queues: CRIU fails on open ones."""
    try:
        _refuse_queues(os.listdir(f"{root}{QUEUES_DIR}"))
    except OSError:
        return  # a kernel without message queues


def _refuse_queues(names: Sequence[str]) -> None:
    if names:
        raise Failed(
            "message-queue",
            f"the engine holds the POSIX message queue {', '.join(f'/{name}' for name in sorted(names)[:5])}, "
            "which a restore would lose; have it use a socket or a pipe, or launch with --no-snapshot",
        )


def _remapped(images: Path) -> set[int]:
    """Return the ids of unlinked files, which CRIU keeps in the images or under another name."""
    file = images / "remap-fpath.img"
    return {number(entry, _REMAPPED) for entry in messages(file)} if file.exists() else set()


def _refuse_growing(entries: list[Message], remapped: set[int], kept: tuple[str, ...]) -> None:
    for entry in entries:
        for file in nested(entry, _REG):
            flags, size, name = number(file, _REG_FLAGS), number(file, _REG_SIZE, -1), text(file, _REG_NAME)
            if flags & os.O_ACCMODE == os.O_RDONLY or size <= 0 or number(file, _REG_ID) in remapped:
                continue  # CRIU records no size for an append-only file
            if not name.startswith(kept):
                raise Failed(
                    "open-file-grows",
                    f"the engine holds {name} open for writing, and a restore refuses a file whose size has changed; "
                    "have the engine open it for appending (O_WRONLY|O_APPEND) or below $TMPDIR",
                )


def _refuse_half_open(entries: list[Message]) -> None:
    for entry in entries:
        for sock in nested(entry, _ISK):
            if number(sock, _ISK_STATE) == _SYN_SENT:
                raise Failed(
                    "connection-half-open",
                    f"the engine was connecting to port {number(sock, _ISK_DST_PORT)}, and a restore cannot finish that; "
                    "the next cold start takes the snapshot",
                )
            if number(sock, _ISK_PROTOCOL) == _TCP and number(sock, _ISK_STATE) not in (_CLOSED, _LISTEN):
                words = [word for word in sock.get(_ISK_DST_ADDRESS, ()) if isinstance(word, int)]
                if words and not is_inside(struct.pack(f"={len(words)}I", *words)):
                    raise Failed(
                        "connection-open",
                        f"the engine was connected to port {number(sock, _ISK_DST_PORT)} of another host, and a restore cannot "
                        "go on with that; the next cold start takes the snapshot",
                    )


def _state(core: Path) -> int:
    """Return a process's state from its core image; 0 if it has none."""
    for entry in messages(core) if core.exists() else ():
        for task in nested(entry, _TC):
            return number(task, _TASK_STATE)
    return 0
