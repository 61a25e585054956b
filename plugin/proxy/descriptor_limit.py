"""The limit on open files, which bounds the connections of this process: each request in flight needs two."""

from __future__ import annotations

import errno
import resource

_WANTED = 65535  # the limit that vLLM and SGLang set for themselves
LEAST_FILES, LEAST_FILES_WITH_ENGINE = 64, 256
"""Open files that a proxy needs for a few clients, and that a launch needs besides: pipes, the sandbox, the page server."""
_RESERVED = 32  # listeners, pipes, logs, a hook, files opened by imports
SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of a connect caused by this host, not the replica. EADDRNOTAVAIL is not among them: it may also mean that this
host lacks the replica's address family.
"""


class TooFewFiles(Exception):
    """The limit on open files is too low."""

    code = "open-files"

    def __init__(self) -> None:
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        super().__init__(
            f"this process may open {files} files, which is too few; "
            "raise the limit: ulimit -n 65535, LimitNOFILE= of systemd, --ulimit nofile= of a container"
        )


def require_files(least: int) -> None:
    """Raise the soft limit on open files to `least` if it is lower. Raises TooFewFiles if it cannot be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return
    if hard != resource.RLIM_INFINITY and hard < least:
        raise TooFewFiles
    resource.setrlimit(resource.RLIMIT_NOFILE, (least, hard))


def raise_files() -> int:
    """Raise the soft limit on open files to 65,535 or the hard limit, and return it (shells give 1,024).

    Child processes started later inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft


def most_clients() -> int:
    """Return how many clients may connect so that each can also have a connection to a replica."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (1 << 30) if soft == resource.RLIM_INFINITY else max(1, (soft - _RESERVED) // 2)
