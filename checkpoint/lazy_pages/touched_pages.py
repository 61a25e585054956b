"""Find the mapped image pages that restored processes have used.

The kernel's page tables show them; userfaultfd does not see them. This runs once per snapshot, just after a first
token, and checkpoint.lazy_pages.read_order caches the result. Standard library only.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from collections.abc import Iterable, Mapping

from checkpoint.criu.pagemap import PAGE, ProcessImage, within
from checkpoint.lazy_pages.working_set import Range

_PRESENT = 1 << 63
_ENTRY = 8


def namespace_of(peer: socket.socket) -> int:
    """Return the inode of the connected process's pid namespace; 0 if unknown."""
    process, _, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        return os.stat(f"/proc/{process}/ns/pid").st_ino
    except OSError:
        return 0


def _processes(namespace: int) -> dict[int, int]:
    """Map the process numbers inside a namespace to those outside."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if os.stat(f"/proc/{name}/ns/pid").st_ino == namespace:
                with open(f"/proc/{name}/status", encoding="ascii", errors="replace") as file:
                    numbers = next(line for line in file if line.startswith("NSpid:")).split()
                found[int(numbers[-1])] = int(name)
        except (OSError, StopIteration):
            continue  # it has ended, or we may not read it
    return found


def touched(
    namespace: int, images: Mapping[int, ProcessImage], known: Iterable[Range]
) -> dict[int, list[tuple[int, int, int]]]:
    """Return each process's used mapped memory outside the `known` ranges, as (first address, end address, offset).

    A process that cannot be inspected has an empty list.
    """
    ranges: dict[int, list[tuple[int, int]]] = {}
    for pid, start, end in known:
        ranges.setdefault(pid, []).append((start, end))
    here = _processes(namespace)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for pid, image in images.items():
        found[pid] = []
        if pid in here and image.mapped:
            try:
                fd = os.open(f"/proc/{here[pid]}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                for start, end in _beside(image, ranges.get(pid, [])):
                    found[pid] += [
                        run for low, high in _present(fd, start, end) for run in within(image.mapped, low, high)
                    ]
            except OSError:
                continue
            finally:
                os.close(fd)
    return found


def _beside(image: ProcessImage, known: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the mapped ranges without the known ranges."""
    found = []
    known.sort()
    at = 0
    for start, end, _ in image.mapped:
        while at < len(known) and known[at][1] <= start:
            at += 1
        position, index = start, at
        while index < len(known) and known[index][0] < end:
            if position < known[index][0]:
                found.append((position, known[index][0]))
            position = max(position, known[index][1])
            index += 1
        if position < end:
            found.append((position, end))
    return found


def _present(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """Return the runs of pages in [start, end) that are present in the page table."""
    entries = array("Q")
    entries.frombytes(os.pread(fd, (end - start) // PAGE * _ENTRY, start // PAGE * _ENTRY))
    found: list[tuple[int, int]] = []
    for at, entry in enumerate(entries):
        if entry & _PRESENT:
            low = start + at * PAGE
            if found and found[-1][1] == low:
                found[-1] = (found[-1][0], low + PAGE)
            else:
                found.append((low, low + PAGE))
    return found
