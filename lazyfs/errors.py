"""The error tree of lazyfs, and the one place where an error becomes an errno.

    LazyfsError
    ├── Usage        the caller asked for something that cannot be meant      (exit code 2)
    ├── NotFound     a chunk, manifest, tag, file or mount is not there
    ├── Integrity    bytes do not hash to what names them
    ├── Temporary    worth another try: a timeout, a reset, 429, 503
    ├── Permanent    trying again will not help: refused, forbidden, malformed
    ├── Busy         something living still uses what should go
    ├── DiskFull     no space left where it would have to be written
    └── HostLacks    this machine cannot: no /dev/fuse, no privilege           (exit code 3)

Each carries a stable `code` in kebab-case and a message of one line that names the cause and the way out.
"""

from __future__ import annotations

import errno


class LazyfsError(Exception):
    """Base of everything lazyfs raises on purpose. `code` is stable; scripts may rely on it."""

    code = "lazyfs-error"
    errno = errno.EIO
    exit_code = 1

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class Usage(LazyfsError):
    """The request makes no sense: an unknown URL scheme, a file where a directory is needed."""

    code = "usage"
    errno = errno.EINVAL
    exit_code = 2


class NotFound(LazyfsError):
    """What was named is not there."""

    code = "not-found"
    errno = errno.ENOENT


class Integrity(LazyfsError):
    """Bytes that do not match the digest they are named by. Never served."""

    code = "integrity"
    errno = errno.EIO


class Temporary(LazyfsError):
    """A failure that may pass: callers retry with backoff until their limit. `retry_after` is in seconds."""

    code = "temporary"
    errno = errno.EIO

    def __init__(self, message: str, *, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class Permanent(LazyfsError):
    """A failure that another try would meet again: forbidden, malformed, unsupported."""

    code = "permanent"
    errno = errno.EIO


class Busy(LazyfsError):
    """Something alive still uses it: an open file below the mount, an import while collecting garbage."""

    code = "busy"
    errno = errno.EBUSY


class DiskFull(LazyfsError):
    """No space (or quota) left; what had been begun was removed."""

    code = "disk-full"
    errno = errno.ENOSPC


class HostLacks(LazyfsError):
    """This machine cannot do it: no /dev/fuse, no privilege to mount."""

    code = "host-lacks"
    errno = errno.ENOTSUP
    exit_code = 3


def to_errno(error: BaseException) -> int:
    """The errno a reader of the mount gets for `error`; anything unforeseen is EIO, and the log says why."""
    if isinstance(error, LazyfsError):
        return error.errno
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    # An OSError of our own disk says nothing about the reader's file: ENOENT of a cache file is an I/O error to them.
    return errno.EIO


def from_os_error(error: OSError, what: str) -> LazyfsError:
    """Turn an OSError met while doing `what` into the matching LazyfsError, with the cause in the message."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: {reason}; free some space or point QUICKTHAW_HOME / --store at a larger disk")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(f"{what}: {reason}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Permanent(f"{what}: {reason}; check owner and mode", code="permission-denied")
    if error.errno in (errno.EINTR, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE, errno.ENFILE):
        return Temporary(f"{what}: {reason}")
    return Permanent(f"{what}: {reason}", code="io-error")
