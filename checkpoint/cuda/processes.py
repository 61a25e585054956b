"""What /proc says of processes that use a GPU: open device files, and the memory that the driver keeps their state in."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from checkpoint.errors import Failed, Integrity

log = logging.getLogger("quickthaw")
Areas = list[tuple[int, int]]
"""(start, end) of parts of an address space, ascending."""
AREAS_FILE = "gpu-areas.json"
"""Beside the images: by process number in the sandbox, the areas that the driver has put its state into."""


def name_of(pid: int) -> str:
    """Return a process's name, or "gone"."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "gone"


def nvidia_files(pid: int, prefix: str = "/dev/nvidia") -> list[str]:
    """List the GPU device files that a process has open. CRIU refuses to dump them."""
    found = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    target = str(Path(entry.path).readlink())
                except OSError:
                    continue  # closed meanwhile
                if target.startswith(prefix):
                    found.add(target)
    except OSError:
        return []  # ended meanwhile
    return sorted(found)


def check_released(pids: Sequence[int], prefix: str = "/dev/nvidia") -> None:
    """Raise Failed (gpu-handle-open) while a process still has a GPU's device file open (mostly by NVML)."""
    for pid in pids:
        if files := nvidia_files(pid, prefix):
            raise Failed(
                "gpu-handle-open",
                f"process {pid} ({name_of(pid)}) still has {', '.join(files)} open; shut down NVML in it first",
            )


def anonymous_areas(pid: int) -> Areas:
    """List a process's private mappings without a file, adjacent ones joined; none if it has ended."""
    found: Areas = []
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        place, access, _, _, inode, *name = line.split(maxsplit=5)
        if access[3] != "p" or inode != "0" or (name and name[0] != "[heap]" and not name[0].startswith("[anon")):
            continue
        start, end = (int(word, 16) for word in place.split("-"))
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def added(before: Areas, after: Areas) -> Areas:
    """Return the parts of `after` that no area of `before` covers."""
    found: Areas = []
    first = 0
    for start, end in after:
        while first < len(before) and before[first][1] <= start:
            first += 1
        at = first
        while at < len(before) and before[at][0] < end:
            low, high = before[at]
            if start < low:
                found.append((start, low))
            start = max(start, high)
            at += 1
        if start < end:
            found.append((start, end))
    return found


def record(gained: Mapping[int, Areas], inner: Mapping[int, int], images: Path, name: str) -> None:
    """Write the driver's areas beside a snapshot's images, and log which processes have how much of it.

    `inner`: the processes' numbers in the sandbox.
    """
    if not gained:
        return
    (images / AREAS_FILE).write_bytes(msgspec.json.encode({str(inner[pid]): areas for pid, areas in gained.items()}))
    held = ", ".join(
        f"{name_of(pid)} ({inner[pid]}) {sum(end - start for start, end in areas) >> 20} MiB"
        for pid, areas in sorted(gained.items())
    )
    log.info("snapshot %s: GPU state of %s", name, held)


def recorded(images: Path) -> dict[str, Areas]:
    """Return what `record` wrote; nothing for a snapshot without it. Raises Integrity (image-garbled)."""
    file = images / AREAS_FILE
    if not file.exists():
        return {}
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Areas])
    except msgspec.MsgspecError as error:
        raise Integrity("image-garbled", f"{file} is damaged: {error}") from error
