"""The exceptions of lazyfs, and their mapping to errno.

    LazyfsError
    ├── Usage        invalid input                                            (exit code 2)
    ├── NotFound     a chunk, manifest, tag, file or mount does not exist
    ├── Integrity    bytes do not match their digest
    ├── Temporary    a retry may succeed: timeout, connection reset, 429, 503
    ├── Permanent    a retry will fail again: refused, forbidden, malformed
    ├── Busy         a live process uses the object
    ├── DiskFull     no disk space left
    └── HostLacks    this machine lacks a requirement: /dev/fuse, a privilege  (exit code 3)

Each exception has a stable `code` in kebab-case and a one-line message with the cause and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))
}


def one_line(text: str) -> str:
    """Escape control characters in text that may hold names from a store, before it reaches a terminal or a log.

    Also escapes bidirectional controls. A name then cannot end a line, move the cursor or hide the text beside it.
    """
    return text.translate(_ESCAPES)


class LazyfsError(Exception):
    """Base class of all lazyfs exceptions. `code` is stable; scripts may rely on it."""

    code = "lazyfs-error"
    errno = errno.EIO
    exit_code = 1

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(one_line(message))
        if code is not None:
            self.code = code


class Usage(LazyfsError):
    """Invalid input: an unknown URL scheme, a file where a directory is needed."""

    code = "usage"
    errno = errno.EINVAL
    exit_code = 2


class NotFound(LazyfsError):
    """The named object does not exist."""

    code = "not-found"
    errno = errno.ENOENT


class Integrity(LazyfsError):
    """Bytes that do not match their digest. Such bytes are never served."""

    code = "integrity"
    errno = errno.EIO


class Temporary(LazyfsError):
    """A failure that may pass; callers retry with backoff up to their limit.

    `retry_after` is in seconds.
    """

    code = "temporary"
    errno = errno.EIO

    def __init__(self, message: str, *, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Permanent(LazyfsError):
    """A failure that a retry would meet again: forbidden, malformed, unsupported."""

    code = "permanent"
    errno = errno.EIO


class Busy(LazyfsError):
    """A live process still uses the object: an open file below the mount, an import during a garbage collection."""

    code = "busy"
    errno = errno.EBUSY


class DiskFull(LazyfsError):
    """No space (or quota) left. Partial files were removed."""

    code = "disk-full"
    errno = errno.ENOSPC


class HostLacks(LazyfsError):
    """This machine lacks a requirement: /dev/fuse, the privilege to mount."""

    code = "host-lacks"
    errno = errno.ENOTSUP
    exit_code = 3


def to_errno(error: BaseException) -> int:
    """Return the errno that a reader of the mount gets for `error`.

    Unexpected errors give EIO; the log has the reason.
    """
    if isinstance(error, LazyfsError):
        return error.errno
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    # An OSError of the cache's own disk does not describe the reader's file: ENOENT of a cache file is an I/O error to the reader.
    return errno.EIO


def from_os_error(error: OSError, what: str) -> LazyfsError:
    """Convert an OSError raised while doing `what` into the matching LazyfsError, with the cause in the message."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: {reason}; free some space, or move QUICKTHAW_HOME or --store to a larger disk")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{what}: {reason}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Permanent(f"{what}: {reason}; check owner and mode", code="permission-denied")
    if error.errno in (errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE, errno.ENFILE):
        return Temporary(f"{what}: {reason}")
    return Permanent(f"{what}: {reason}", code="io-error")


@contextlib.contextmanager
def os_errors(what: str) -> Iterator[None]:
    """Raise an OSError of the block as the matching LazyfsError. `what`: the failed action, such as "cannot read PATH"."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, what) from error
