"""Turn errors of a full, read-only or over-quota disk into one line with a stable code.

with required("snapshot x could not be removed", "snapshot-not-removed"):   raises Failed
with optional("the restore is not remembered"):                            logs a line and continues
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
    errno.EROFS: ("disk-read-only", "remount it writable, or set QUICKTHAW_HOME to another disk"),
}


def failure(what: str, error: OSError, code: str = "disk-failed") -> Failed:
    """Convert an OSError into Failed. `what` failed; `code` is used unless the disk itself is the cause."""
    found, remedy = _KINDS.get(error.errno or 0, (code, ""))
    place = f" ({error.filename})" if error.filename else ""
    return Failed(found, f"{what}: {error.strerror or error}{place}{'; ' if remedy else ''}{remedy}")


@contextlib.contextmanager
def required(what: str, code: str = "disk-failed") -> Iterator[None]:
    """Raise Failed if the block raises OSError."""
    try:
        yield
    except OSError as error:
        raise failure(what, error, code) from error


@contextlib.contextmanager
def optional(what: str, code: str = "disk-failed") -> Iterator[None]:
    """Log a warning if the block raises OSError, for writes that are useful but not required."""
    try:
        yield
    except OSError as error:
        log.warning("%s", failure(what, error, code))
