"""The working set's pages once more, in the order of need, as one file: `.verified-pack`, beside the plans that copy from it.

In the images they lie in thousands of small pieces, which a cold disk brings at a quarter of its speed. Here they are read as large pages,
from a disk or from the page cache. It is used only with the plans it was made for (checkpoint.lazy_pages.plan_cache), which say which file
it is by the same facts that the images are known by; where it is missing or another one, the images serve. What is mapped is not in it.
Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from array import array
from collections.abc import Mapping

from checkpoint.lazy_pages.address_space import Plan

FILE_NAME = ".verified-pack"
_MOST = 256 << 20
"""A larger working set is not worth its room on the disk a second time: without anything mapped, most of it are weights."""
_AT_ONCE = 512  # pieces a system call, below IOV_MAX

Stamp = tuple[int, int, int, int, int]


def stamp(path: str) -> Stamp:
    """Which file this is. Raises OSError."""
    info = os.stat(path)
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


def write(path: str, plans: Mapping[int, Plan]) -> dict[int, array[int]] | None:
    """Write the pieces of sealed plans that are not zeros; of each plan, where its pieces are in the file (0 for zeros).

    None where there are too many bytes, the disk refuses them, or somebody else writes one at the same time; nothing is left then.
    """
    order = sorted(
        ((batch, pid, index) for pid, plan in plans.items() for index, batch in enumerate(plan.batches)),
    )
    places = {pid: array("Q", bytes(8 * len(plan.starts))) for pid, plan in plans.items()}
    pieces: list[tuple[int, int]] = []
    total = 0
    for _, pid, index in order:
        plan = plans[pid]
        if not plan.zero[index]:
            places[pid][index] = total
            size = plan.ends[index] - plan.starts[index]
            pieces.append((plan.source(index), size))
            total += size
    if not pieces or total > _MOST:
        return None
    try:
        # Without a name until it is whole, so that nothing is left of who is killed; a file system that has no such files gets no pack.
        fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, total)  # few extents, and a full disk is known before anything is written
            for at in range(0, len(pieces), _AT_ONCE):
                _write(
                    fd, [(ctypes.c_char * size).from_address(address) for address, size in pieces[at : at + _AT_ONCE]]
                )
            os.fsync(fd)  # its facts are believed after a crash, so its bytes must be there by then
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            # With a descriptor it is linkat(), which follows this link to the file; link() would not.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)
    except OSError:
        return None
    return places


def _write(fd: int, parts: list[ctypes.Array[ctypes.c_char]]) -> None:
    left = sum(len(part) for part in parts)
    while left:
        done = os.writev(fd, parts)
        left -= done
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if parts and done:
            rest = len(parts[0]) - done
            parts[0] = (ctypes.c_char * rest).from_address(ctypes.addressof(parts[0]) + done)
