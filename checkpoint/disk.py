"""What a disk that is full, read-only or over its quota means for this package: one line with a stable code, from whatever wrote.

with required("snapshot x could not be removed", "snapshot-not-removed"):   raises Failed
with optional("the restore is not remembered"):                            logs a line and goes on
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator

from checkpoint.errors import Failed

log = logging.getLogger("quickthaw")
_ROOM = "make room (quickthaw snapshot rm, quickthaw weights gc) or set QUICKTHAW_HOME to a larger disk"
_KINDS = {
    errno.ENOSPC: ("disk-full", _ROOM),
    errno.EDQUOT: ("disk-full", _ROOM),
    errno.EROFS: ("disk-read-only", "remount it to be written, or set QUICKTHAW_HOME to another disk"),
}


def failure(what: str, error: OSError, code: str = "disk-failed") -> Failed:
    """An error of the operating system as ours. `what` failed; `code` stands where the disk itself is not to blame."""
    found, remedy = _KINDS.get(error.errno or 0, (code, ""))
    place = f" ({error.filename})" if error.filename else ""
    return Failed(found, f"{what}: {error.strerror or error}{place}{'; ' if remedy else ''}{remedy}")


@contextlib.contextmanager
def required(what: str, code: str = "disk-failed") -> Iterator[None]:
    """Raise Failed where the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise failure(what, error, code) from error


@contextlib.contextmanager
def optional(what: str, code: str = "disk-failed") -> Iterator[None]:
    """Log a line where the block raises OSError: what it wrote is of use, and nobody waits for it."""
    try:
        yield
    except OSError as error:
        log.warning("%s", failure(what, error, code))
