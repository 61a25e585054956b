"""The pack: a second copy of the working set's pages, in the order of need, as one file `.verified-pack`.

It lies beside the plans that use it. In the images these pages lie in thousands of small extents, which a cold disk
reads at a quarter of its speed. The pack is read in large pages, from disk or page cache. It is used only with the
plans it was made for (checkpoint.lazy_pages.plan_cache), which hold its fingerprint. If it is missing or differs, pages
are copied from the images. Mapped pages are not in it. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from array import array
from collections.abc import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from checkpoint.lazy_pages.address_space import Plan  # needs most of the page server; read_order only our name

FILE_NAME = ".verified-pack"
_MOST = 256 << 20
"""Maximum size in bytes. A larger working set is not worth storing twice: if nothing is mapped, most of it is weights."""
_AT_ONCE = 512  # extents per system call, below IOV_MAX


def write(path: str, plans: Mapping[int, Plan]) -> dict[int, array[int]] | None:
    """Write the non-zero extents of sealed plans; return the offsets of each plan's extents in the file (0 for zeros).

    Returns None, and leaves no file, if there are too many bytes, the disk refuses them, or another process writes a
    pack at the same time.
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
        # The file has no name until it is complete, so a killed process leaves nothing. File systems without O_TMPFILE
        # get no pack.
        fd = os.open(os.path.dirname(path), os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, total)  # few extents, and a full disk is detected before anything is written
            for at in range(0, len(pieces), _AT_ONCE):
                _write(
                    fd, [(ctypes.c_char * size).from_address(address) for address, size in pieces[at : at + _AT_ONCE]]
                )
            os.fsync(fd)  # its fingerprint is trusted after a crash, so its bytes must be on disk by then
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            # With src_dir_fd this is linkat(), which follows the link to the file; link() would not.
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
