"""How large the cache may grow: a number of bytes, without a bound, or what leaves part of its file system free (the default).

A bound is an int: AUTO, UNBOUNDED, or bytes. A mount's own setting takes precedence over the host's, which is
`$QUICKTHAW_CACHE_LIMIT`, else the file `limit` in the cache's folder (`quickthaw cache limit`). Without any the bound is AUTO.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from lazyfs.errors import Usage
from lazyfs.paths import private_dir, write_atomic

AUTO, UNBOUNDED = -1, 0
FILE_NAME, VARIABLE = "limit", "QUICKTHAW_CACHE_LIMIT"
# AUTO leaves a tenth of the file system free, and at least this; on a small one, which may be there for the cache alone, a quarter.
_LEAST_KEPT = 20_000_000_000
_TEXTS = {"auto": AUTO, "none": UNBOUNDED}


def kept_free(total: int) -> int:
    """Return the bytes that AUTO leaves free on a file system of `total` bytes."""
    return min(max(total // 10, _LEAST_KEPT), total // 4)


def low_water(total: int) -> int:
    """Return the free bytes below which cached files are removed for others' writes: nine tenths of `kept_free`."""
    return kept_free(total) * 9 // 10


def parse(text: str) -> int:
    """Return the bound that a user wrote: `auto`, `none`, or a number of GB (0 means none). Raises ValueError."""
    if text.lower() in _TEXTS:
        return _TEXTS[text.lower()]
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ValueError(f"{text!r} is not a cache limit; write auto, none or a number of GB")
    # Never round a tiny limit to 0, which would mean none.
    return max(1, int(gigabytes * 1e9)) if gigabytes else UNBOUNDED


def shown(bound: int) -> str:
    """Return the bound as a user writes it."""
    return {AUTO: "auto", UNBOUNDED: "none"}.get(bound) or f"{bound / 1e9:g}"


def host_bound(root: Path) -> int:
    """Return the bound of this host's cache at `root`: AUTO if nobody has set one, or if what was set cannot be read."""
    try:
        if given := os.environ.get(VARIABLE):
            return parse(given)
        return parse((root / FILE_NAME).read_text().strip())
    except (OSError, ValueError):
        return AUTO


def set_host_bound(root: Path, bound: int) -> None:
    """Set the host's bound. Running mounts without a bound of their own heed it from their next chunk on.

    Raises Usage for a negative number of bytes, or what `write_atomic` raises.
    """
    if bound < AUTO:
        raise Usage(f"a cache limit must not be negative, not {bound}")
    if bound == AUTO:
        (root / FILE_NAME).unlink(missing_ok=True)
        return
    write_atomic(private_dir(root) / FILE_NAME, f"{shown(bound)}\n".encode())


def blocks_below(folder: Path) -> int:
    """Return the bytes of disk that the files below a folder occupy; 0 if it does not exist. Follows no links."""
    total, folders = 0, [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except (FileNotFoundError, NotADirectoryError):
            continue  # removed meanwhile
    return total
