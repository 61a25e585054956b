"""Launcher side of the engine processes' signals: trim before a dump, wake after a restore.

The engine side is plugin/engine/control.py. This module also writes the key that a control call to vLLM needs
(plugin/engine/vllm_control.py). Only processes that have installed the handler are signalled: the default action of a
real-time signal kills a process.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from checkpoint.sandbox.process_tree import processes

TRIM = signal.SIGRTMIN + 7
WAKE = signal.SIGRTMIN + 8
ENVIRONMENT = "environment"
WEIGHTS_SOCKET = "weights.sock"


def _answers(pid: int, number: int) -> bool:
    """Return whether the process catches the signal (proc(5): SigCgt)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    except OSError:
        pass  # exited meanwhile
    return False


def notify(init_pid: int, number: int) -> list[int]:
    """Signal every process of the sandbox that handles the signal; return their pids on the host."""
    notified = []
    for pid in processes(init_pid):
        if _answers(pid, number):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
            notified.append(pid)
    return notified


def renew(answers: Path, then: Collection[str], now: Mapping[str, str]) -> None:
    """Write the environment for every process of a restored engine to the control folder, before WAKE.

    plugin/engine/environment_renewal.py reads it. `then`: the names set before the snapshot; those missing from `now` are removed.
    Raises OSError.
    """
    records = [name for name in then if name not in now] + [f"{name}={value}" for name, value in now.items()]
    fd = os.open(answers / ENVIRONMENT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write("\0".join(records).encode(errors="surrogateescape"))


def _inner_pid(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return pid


def trim_all(init_pid: int, answers: Path, limit_s: float = 10.0) -> int:
    """Signal every process to collect garbage and trim; wait for their answers in `answers` (as seen from the host).

    Returns how many answered within `limit_s` seconds. A process too busy to answer costs memory in the snapshot, not
    correctness.
    """
    wanted = []
    for pid in notify(init_pid, TRIM):
        try:
            wanted.append(answers / f"{_inner_pid(pid)}.trimmed")
        except OSError:
            continue
    limit = time.monotonic() + limit_s
    while time.monotonic() < limit and not all(file.exists() for file in wanted):
        time.sleep(0.01)
    return sum(file.exists() for file in wanted)


def bytes_dropped(answers: Path, what: str) -> int:
    """Return the bytes of `kv` cache or `weights` dropped at the last trim, as reported by the engine's processes.

    Removes the reports.
    """
    total = 0
    for note in answers.glob(f"*.{what}"):
        total += int(note.read_text())
        note.unlink()
    return total


def weight_areas(answers: Path) -> dict[str, list[tuple[int, int]]]:
    """Return the reported addresses of the weights, as (address, bytes) by pid inside the sandbox; removes the reports.

    Used only to describe the contents of a snapshot: an unreadable report is skipped.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for note in answers.glob("*.areas"):
        try:
            areas = [(int(start), int(size)) for start, size in json.loads(note.read_text())]
        except (ValueError, TypeError):
            areas = []
        if areas:
            found[note.name.partition(".")[0]] = areas
        note.unlink()
    return found


def exclude_weights(answers: Path, model: str | None) -> None:
    """Set whether the next trim drops the weights too: those that were loaded from `model`, a folder or file as the engine sees it."""
    flag = answers / "thin"
    if model is not None:
        flag.write_text(model, errors="surrogateescape")
    else:
        flag.unlink(missing_ok=True)


def offers_weights(answers: Path | None) -> bool:
    """Return whether the engine finds its weights in a ring (plugin/runtime/weight_ring)."""
    return answers is not None and (answers / WEIGHTS_SOCKET).exists()


@contextlib.contextmanager
def key(folder: Path) -> Iterator[str]:
    """Write a new key into the control folder for one control call, and remove it after the call.

    Raises OSError.
    """
    text = secrets.token_hex(32)
    new, file = folder / ".key", folder / "key"
    new.unlink(missing_ok=True)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    new.rename(file)
    try:
        yield text
    finally:
        with contextlib.suppress(OSError):  # the sandbox may be gone, and the key with it
            file.unlink()
